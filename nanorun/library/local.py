"""From the name or path a person gives to a GGUF file on this machine."""

from __future__ import annotations

import difflib
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nanorun.errors import ModelError, NanorunError, UsageError
from nanorun.library.bundled import BUNDLED_MODELS, BundledFiles
from nanorun.library.catalog import CATALOG, KnownModel

if TYPE_CHECKING:
    from nanorun_converters.convert import ConvertProgress

BUNDLED_RECIPE = "q8_0"
CACHE_VARIABLE = "NANORUN_CACHE_DIR"
"""The environment variable that names another folder than the platform's cache."""

Progress = Callable[["ConvertProgress"], None]


def models_folder() -> Path:
    """Where nanorun keeps the models it made; it may not exist yet."""
    return _cache_folder() / "models"


def states_folder() -> Path:
    """Where conversations' prompt states outlive the process; it may not exist yet."""
    return _cache_folder() / "states"


def responses_file() -> Path:
    """Where the endpoint keeps what it answered, for those who go on from it."""
    return _cache_folder() / "responses.sqlite3"


def _cache_folder() -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    try:
        if named:
            return Path(named).expanduser()
        import platformdirs

        return Path(platformdirs.user_cache_dir("nanorun"))
    except RuntimeError as error:
        raise NanorunError(
            "there is no home folder to keep models in", tries=[f"export {CACHE_VARIABLE}=FOLDER"]
        ) from error


def resolve_model(name_or_path: str, *, progress: Progress | None = None) -> Path:
    """The GGUF file that a name of the library or a path stands for.

    What comes with nanorun is converted on its first use. A name of the library wins over a file
    of that name in the working folder; `./pico` means the file.

    Args:
        name_or_path: What a person wrote as MODEL.
        progress: Told how far a conversion is, if one is needed.

    Raises:
        UsageError: If nothing is called so.
        ModelError: If it is no GGUF, or a model that is not on this machine.
        NanorunError: If a bundled model cannot be written to the cache.
    """
    bundled = BUNDLED_MODELS.get(name_or_path)
    if bundled is not None:
        return _bundled_model(bundled, progress)
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


def _bundled_model(source: BundledFiles, progress: Progress | None) -> Path:
    folder = models_folder()
    target = folder / f"{source.name}-{BUNDLED_RECIPE}-{source.fingerprint()}.gguf"
    if not target.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _convert_bundled(source, target, progress)
        except OSError as error:
            raise NanorunError(
                f"{target} cannot be written: {error.strerror or error}",
                tries=[f"{CACHE_VARIABLE}=FOLDER nanorun run {source.name}"],
            ) from error
    return target


def _convert_bundled(source: BundledFiles, target: Path, progress: Progress | None) -> None:
    """Convert in a folder of its own, then rename: two first uses at once cannot meet."""
    from nanorun_converters.convert import convert
    from nanorun_converters.options import ConvertOptions

    work = Path(tempfile.mkdtemp(prefix=f".{source.name}-", dir=target.parent))
    try:
        made = work / target.name
        convert(source, ConvertOptions(out=made, recipe=BUNDLED_RECIPE), progress)
        try:
            made.replace(target)
        except PermissionError:
            # Windows cannot replace a file that another process has mapped; that one is as good.
            if not target.is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


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
    from nanorun_converters.source.files import LocalFiles
    from nanorun_converters.source.policy import refuse_other_kinds

    if (path / "config.json").is_file():
        out = f"{path.resolve().name}.gguf"
        return ModelError(
            f"{path} is a source model, which has to be converted first",
            tries=[f"nanorun convert {_quoted(path)} --out {_quoted(out)}"],
        )
    source = LocalFiles(path)
    try:
        refuse_other_kinds(source, source.names())
    except ModelError as error:
        return error
    except OSError as error:
        return ModelError(f"{path}: {error.strerror or error}")
    files = _ggufs(path)[:3]
    return ModelError(
        f"{path} is a folder without a source model: expected config.json, found none",
        tries=[f"nanorun chat {_quoted(file)}" for file in files],
    )


def _missing(text: str) -> NanorunError:
    path = Path(text)
    if path.suffix.lower() == ".gguf":
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
        names = [file.name for file in _ggufs(path.parent)]
    name_of = {name.lower(): name for name in names}
    nearest = [name_of[n] for n in difflib.get_close_matches(path.name.lower(), name_of, n=3)]
    return [f"nearest: {', '.join(nearest)}"] if nearest else []


def _ggufs(folder: Path) -> list[Path]:
    """The GGUF files of a folder, by name; not what macOS leaves beside them (`._NAME`)."""
    try:
        files = [file for file in folder.iterdir() if file.suffix.lower() == ".gguf"]
    except OSError:  # what may not be listed offers nothing
        return []
    return sorted(file for file in files if not file.name.startswith("._"))


def _quoted(path: Path | str) -> str:
    return shlex.quote(str(path))
