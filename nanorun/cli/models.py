"""From the MODEL and `--n-ctx` of a command line to a file and a size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nanorun.cli.diagnostics import StatusLine, note
from nanorun.cli.options import DEFAULT_N_CTX
from nanorun.file_names import readable

if TYPE_CHECKING:
    from nanorun_converters.convert import ConvertProgress


def find_model(name: str) -> Path:
    """The GGUF file that MODEL stands for; a bundled model is converted on its first use.

    Raises:
        NanorunError: As `nanorun.library.resolve_model`.
    """
    from nanorun.library import resolve_model

    status = StatusLine()

    def show(progress: ConvertProgress) -> None:
        share = progress.n_bytes_done / max(1, progress.n_bytes)
        status.show(f"converting {name} for its first use: {share:.0%}")

    try:
        return resolve_model(name, progress=show)
    finally:
        status.clear()


def context_size(text: str | None, path: Path, *, default: int = DEFAULT_N_CTX) -> int:
    """The tokens that `--n-ctx` names for a model; `max` is what it was trained for.

    Without the flag it is the default, or less for a model that was trained for less.

    Raises:
        UsageError: If the text is no number of tokens.
        ModelError: If the model cannot be read.
    """
    from nanorun.model.units import parse_count

    wants_max = text is not None and text.strip().lower() == "max"
    n_ctx = None if text is None or wants_max else parse_count(text)
    n_trained = trained_n_ctx(path)
    if n_ctx is None:
        return n_trained if wants_max else min(default, n_trained)
    if n_ctx > n_trained:
        note(f"n_ctx {n_ctx} is beyond the {n_trained} tokens that {path.name} was trained for")
    return n_ctx


def trained_n_ctx(path: Path) -> int:
    """The longest context a model has seen.

    Raises:
        ModelError: If the file is no model.
    """
    from nanorun.model.gguf import read_gguf
    from nanorun.model.gguf_arch import arch_from_gguf

    return arch_from_gguf(read_gguf(path)).n_ctx_train


def display_name(model: str) -> str:
    """What a model is called: its library name, or its file's name without `.gguf`."""
    path = Path(model)
    return readable(path.stem if path.suffix.lower() == ".gguf" else path.name)


def state_folder(*, keep: bool) -> str | None:
    """Where prompt states are kept, if they are."""
    from nanorun.library.local import states_folder

    return str(states_folder()) if keep else None
