"""`nanorun imatrix`: which inputs of a model's matrices are large, for quantizing to few bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nanorun.cli import options as opt
from nanorun.cli.commands.eval import read_source
from nanorun.cli.diagnostics import StatusLine, note, write_data, write_json
from nanorun.cli.models import find_model
from nanorun.file_names import readable

_DEFAULT_N_CTX = 512


def command(
    model: opt.ModelArgument,
    text: Annotated[
        str,
        typer.Option(
            "--text",
            metavar="FILE",
            help="UTF-8 text to run through the model; - for standard input.",
            rich_help_panel="Text",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FILE",
            help="File to write, or to continue.",
            rich_help_panel=opt.OUTPUT,
        ),
    ] = Path("imatrix.gguf"),
    special: Annotated[
        bool,
        typer.Option(
            "--parse-special",
            help="Read <|im_start|> and the like in the text as control tokens.",
            rich_help_panel="Text",
        ),
    ] = False,
    n_ctx: Annotated[
        int,
        typer.Option(
            "--n-ctx",
            metavar="N",
            min=16,
            help="Tokens of one chunk.",
            rich_help_panel=opt.ENGINE,
        ),
    ] = _DEFAULT_N_CTX,
    n_sensitivity: Annotated[
        int,
        typer.Option(
            "--sensitivity",
            metavar="N",
            min=0,
            help="Also measure how much noise in each tensor changes the predictions of N chunks: a"
            " pass over them for every tensor, for --target-size.",
            rich_help_panel="Text",
        ),
    ] = 0,
    gram: Annotated[
        bool,
        typer.Option(
            "--gram",
            help="Also collect how inputs go together, for error feedback in nanorun convert, which"
            " makes better files of 2 to 5 bits. Takes 4.4 GiB (Nano; Super: 21 GiB) of memory and"
            " disk.",
            rich_help_panel="Text",
        ),
    ] = False,
    n_threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            metavar="N",
            min=1,
            help="Threads of the engine.  [default: the physical cores]",
            rich_help_panel=opt.ENGINE,
        ),
    ] = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Collect a model's importance matrix on a text.

    It is for nanorun convert --imatrix. Run it on the best file that fits this machine (q8_0, say),
    with some 100,000 tokens of what the model will be used for. Ctrl-C keeps what is done; the same
    command continues. The file is llama.cpp's, and works with its tools.
    """
    from nanorun.model.engine_options import EngineOptions
    from nanorun.runtime.measure.imatrix import collect_imatrix
    from nanorun.runtime.measure.perplexity import Source
    from nanorun.runtime.measure.sensitivity import measure_sensitivity

    content, path = read_source(text), find_model(model)
    options = EngineOptions(n_threads=n_threads)
    status = StatusLine()

    def show(n_done: int, n_total: int) -> None:
        status.show(f"{n_done} of {n_total} chunks")

    def show_tensor(name: str, n_done: int, n_total: int) -> None:
        status.show(f"sensitivity: {n_done} of {n_total} tensors, {name}")

    dataset = readable(Path(text).name) if text != "-" else "stdin"
    try:
        status.show("loading ...")
        imatrix = collect_imatrix(
            path, content, dataset, out, n_ctx, options, show, special=special, grams=gram
        )
        if n_sensitivity:
            source = Source(content, n_ctx, special=special)
            imatrix = measure_sensitivity(path, source, out, n_sensitivity, options, show_tensor)
    except KeyboardInterrupt:
        status.clear()
        note(f"stopped; {out} keeps what is done, and the same command continues")
        raise
    finally:
        status.clear()
    n_unseen = sum(int((entry.counts == 0).sum()) for entry in imatrix.entries.values())
    if n_unseen:
        note(f"{n_unseen} expert matrices saw no token of this text, and count as if all inputs"
             " were alike")  # fmt: skip
    if as_json:
        write_json({
            "path": str(out), "n_chunks": imatrix.n_chunks, "n_tensors": len(imatrix.entries),
            "n_unseen": n_unseen, "n_sensitivity": len(imatrix.sensitivity),
            "n_grams": len(imatrix.grams),
        })  # fmt: skip
    else:
        write_data(
            f"{out}: {len(imatrix.entries)} tensors over {imatrix.n_chunks} chunks of"
            f" {imatrix.chunk_size} tokens\n"
        )
