"""From the name or path a person gives to a GGUF file on this machine."""

from __future__ import annotations

import difflib
import hashlib
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nanorun import __version__
from nanorun.errors import ModelError, NanorunError, UsageError
from nanorun.library.catalog import CATALOG, KnownModel

if TYPE_CHECKING:
    from nanorun_converters.convert import ConvertProgress

BUNDLED_MODEL = "pico"
BUNDLED_RECIPE = "q8_0"
BUNDLED_SOURCE = Path(__file__).parents[1] / "data" / BUNDLED_MODEL
CACHE_VARIABLE = "NANORUN_CACHE_DIR"
"""The environment variable that names another folder than the platform's cache."""

Progress = Callable[["ConvertProgress"], None]


def models_folder() -> Path:
    """Where nanorun keeps the models it made; it may not exist yet."""
    return _cache_folder() / "models"


def states_folder() -> Path:
    """Where conversations' prompt states outlive the process; it may not exist yet."""
    return _cache_folder() / "states"


def _cache_folder() -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("nanorun"))


def resolve_model(name_or_path: str, *, progress: Progress | None = None) -> Path:
    """The GGUF file that a name of the library or a path stands for.

    `pico` is converted on its first use. A name of the library wins over a file of that name in
    the working folder; `./pico` means the file.

    Args:
        name_or_path: What a person wrote as MODEL.
        progress: Told how far a conversion is, if one is needed.

    Raises:
        UsageError: If nothing is called so.
        ModelError: If it is no GGUF, or a model that is not on this machine.
        NanorunError: If pico cannot be written to the cache.
    """
    if name_or_path == BUNDLED_MODEL:
        return _bundled_model(progress)
    known = _known(name_or_path)
    if known is not None and known.repository is not None:
        raise _not_here(known, known.repository)
    path = _existing(name_or_path)
    if path is None:
        raise _missing(name_or_path)
    if path.is_dir():
        raise _is_folder(path)
    return path


def _existing(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        return path if text and path.exists() else None
    except (OSError, RuntimeError, ValueError):
        # Too long for a path, of a user there is not, or with a zero byte.
        return None


def _known(text: str) -> KnownModel | None:
    # `nano:16g` names a size of `nano`.
    name = text.partition(":")[0]
    named = (model for model in CATALOG.values() if name in (model.name, model.repository))
    return next(named, None)


def _bundled_model(progress: Progress | None) -> Path:
    folder = models_folder()
    name = f"{BUNDLED_MODEL}-{BUNDLED_RECIPE}-{_fingerprint(BUNDLED_SOURCE)}.gguf"
    target = folder / name
    if not target.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _convert_bundled(target, progress)
        except OSError as error:
            raise NanorunError(
                f"{target} cannot be written: {error.strerror or error}",
                tries=[f"{CACHE_VARIABLE}=FOLDER nanorun run {BUNDLED_MODEL}"],
            ) from error
    return target


def _convert_bundled(target: Path, progress: Progress | None) -> None:
    """Convert in a folder of its own, then rename: two first uses at once cannot meet."""
    from nanorun_converters.convert import convert
    from nanorun_converters.plan import ConvertOptions

    work = Path(tempfile.mkdtemp(prefix=f".{BUNDLED_MODEL}-", dir=target.parent))
    try:
        made = work / target.name
        convert(BUNDLED_SOURCE, ConvertOptions(out=made, recipe=BUNDLED_RECIPE), progress)
        try:
            made.replace(target)
        except PermissionError:
            # Windows cannot replace a file that another process has mapped; that one is as good.
            if not target.is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fingerprint(source: Path) -> str:
    """Twelve hex digits that change with the source model and with the converter's version."""
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".md":
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _not_here(known: KnownModel, repository: str) -> ModelError:
    return ModelError(
        f"{known.name} is not on this machine",
        facts=[f"{known.summary} (https://huggingface.co/{repository})"],
        tries=[
            f"nanorun plan {known.name}",
            f"nanorun convert {repository} --recipe q4 --out {known.name}.gguf",
            f"nanorun chat {known.name}.gguf",
        ],
    )


def _is_folder(path: Path) -> ModelError:
    if (path / "config.json").is_file():
        out = f"{path.resolve().name}.gguf"
        return ModelError(
            f"{path} is a source model, which has to be converted first",
            tries=[f"nanorun convert {_quoted(path)} --out {_quoted(out)}"],
        )
    files = sorted(path.glob("*.gguf"))[:3]
    return ModelError(
        f"{path} is a folder without a source model: expected config.json, found none",
        tries=[f"nanorun chat {_quoted(file)}" for file in files],
    )


def _missing(text: str) -> NanorunError:
    path = Path(text)
    if path.suffix == ".gguf":
        return ModelError(f"{path}: no such file", facts=_neighbours(path))
    nearest = difflib.get_close_matches(text.lower(), CATALOG, n=2)
    names = ", ".join(CATALOG)
    return UsageError(
        f"there is no model {text!r}: it is no name of the library and no file",
        facts=[f"nearest: {', '.join(nearest)}" if nearest else f"names: {names}"],
    )


def _neighbours(path: Path) -> list[str]:
    """What a missing file may have been meant to be."""
    names: list[str] = []
    with suppress(OSError, ValueError):
        names = [file.name for file in path.parent.glob("*.gguf")]
    nearest = difflib.get_close_matches(path.name, names, n=3)
    return [f"nearest: {', '.join(nearest)}"] if nearest else []


def _quoted(path: Path | str) -> str:
    return shlex.quote(str(path))
