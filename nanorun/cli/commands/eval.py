"""`nanorun eval`: how well a model predicts a text."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nanorun.cli import options as opt
from nanorun.cli.diagnostics import StatusLine, write_data, write_json
from nanorun.cli.interrupts import Interrupts
from nanorun.cli.models import context_size, find_model
from nanorun.errors import UsageError

if TYPE_CHECKING:
    from nanorun.runtime.client import EngineClient

# llama.cpp's perplexity tool reads 512 tokens at a time; figures compare only at the same size.
_DEFAULT_N_CTX = 512
_KEYS = ("n_tokens", "ppl", "kld_mean", "kld_p99", "top1_agreement")


def command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Library name (pico) or path of a GGUF file; several with --against.",
        ),
    ],
    text: Annotated[
        str,
        typer.Option(
            "--text",
            metavar="FILE",
            help="UTF-8 text to predict; - for standard input.",
            rich_help_panel="Text",
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="REF",
            help="Compare with this model: KL divergence and agreement.",
            rich_help_panel="Comparison",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            help="Draw bits per weight against divergence, as SVG.",
            rich_help_panel="Comparison",
        ),
    ] = None,
    special: Annotated[
        bool,
        typer.Option(
            "--parse-special",
            help="Read <|im_start|> and the like in the text as control tokens (with --against).",
            rich_help_panel="Text",
        ),
    ] = False,
    n_ctx: Annotated[
        str | None,
        typer.Option(
            "--n-ctx",
            metavar="N",
            help=f"Tokens of one window; figures compare only at the same N.  [default: "
            f"{_DEFAULT_N_CTX}]",
            rich_help_panel=opt.ENGINE,
        ),
    ] = None,
    as_json: opt.JsonOption = False,
) -> None:
    """Measure a model's perplexity on a text.

    The text is cut into windows of N tokens, and the second half of each is predicted. Lower is
    better: a perplexity of 8 is the uncertainty of a fair choice among 8 tokens. With --against,
    also how far the predictions are from those of another file of the model: the mean KL divergence
    in nats, its 99th percentile, and how often the likeliest token is the same.
    """
    from nanorun.model.engine_options import EngineOptions
    from nanorun.runtime.client import EngineClient

    content = read_source(text)
    if against is not None:
        return _compare(models, against, content, n_ctx, plot, special, as_json)
    if len(models) > 1 or plot is not None or special:
        raise UsageError(
            "several models, --plot and --parse-special go with --against",
            tries=[f"nanorun eval {' '.join(models)} --text {text} --against REF"],
        )
    path = find_model(models[0])
    n_window = context_size(n_ctx, path, default=_DEFAULT_N_CTX)
    client = EngineClient(path, EngineOptions(n_ctx=n_window, n_parallel=1))
    n_tokens, ppl = Interrupts().run(_score(client, content, n_window))
    if as_json:
        write_json({"n_tokens": n_tokens, "ppl": ppl})
    else:
        write_data(f"perplexity {ppl:.4f} over {n_tokens} tokens (n_ctx {n_window})\n")


def _compare(
    names: list[str],
    against: str,
    text: str,
    n_ctx: str | None,
    plot: Path | None,
    special: bool,
    as_json: bool,
) -> None:
    from nanorun.model.engine_options import EngineOptions
    from nanorun.runtime.measure.divergence import measure, render_plot

    reference, paths = find_model(against), [find_model(name) for name in names]
    n_window = context_size(n_ctx, reference, default=_DEFAULT_N_CTX)
    status = StatusLine()

    def progress(path: Path, n_done: int, n_total: int) -> None:
        status.show(f"{path.name}: {n_done} of {n_total} windows of {n_window} tokens")

    try:
        results = measure(
            reference, paths, text, n_window, EngineOptions(), progress, special=special
        )
    finally:
        status.clear()
    if plot is not None:
        plot.write_text("\n".join(render_plot(results)), encoding="utf-8")
    rows = [
        {key: value for key, value in asdict(result).items() if len(results) > 1 or key in _KEYS}
        for result in results
    ]
    if as_json:
        write_json(rows[0] if len(rows) == 1 else {"models": rows})
        return
    write_data(f"{'KLD mean':>10} {'KLD p99':>10} {'same top':>8} {'ppl':>10} {'bpw':>6}  file\n")
    for result in results:
        write_data(
            f"{result.kld_mean:10.6f} {result.kld_p99:10.6f} {result.top1_agreement:8.2%}"
            f" {result.ppl:10.4f} {result.bpw:6.3f}  {result.path}\n"
        )


def read_source(name: str) -> str:
    """The text of a file, or of standard input for `-`.

    Raises:
        UsageError: If it cannot be read, is not UTF-8, or is empty.
    """
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}") from error
    text = opt.read_text(content, "standard input" if name == "-" else name)
    if not text.strip():
        raise UsageError(f"{name} holds no text")
    return text


async def _score(client: EngineClient, text: str, n_ctx: int) -> tuple[int, float]:
    status = StatusLine()

    def progress(n_done: int, n_total: int) -> None:
        status.show(f"{n_done} of {n_total} windows of {n_ctx} tokens")

    try:
        status.show("loading ...")
        await client.start()
        return await client.score(text, n_ctx, progress)
    finally:
        status.clear()
        await client.close()
