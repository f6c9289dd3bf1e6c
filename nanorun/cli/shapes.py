"""From MODEL to the shapes it may have: a file, a source model or a name, here or elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nanorun.errors import ModelError, UsageError

if TYPE_CHECKING:
    from nanorun.model.arch import HybridArch
    from nanorun.plan.shape import ModelShape

_MOST_CONFIG_BYTES = 2**20


def shapes_of_model(model: str, recipe: str | None = None) -> list[ModelShape]:
    """The shapes that MODEL may have: one for a file, one a recipe for what is to be converted.

    Args:
        model: Library name, GGUF file or its address (`https://`, `owner/name/file.gguf` on the
            Hub), folder of a source model or its repository on the Hub. Library names need nothing
            on this machine, but for that of the bundled model; of what is elsewhere only the header
            or the config.json is read.
        recipe: The recipe to take; None for all that may be chosen from.

    Raises:
        UsageError: If there is no such model or recipe.
        ModelError: If the model cannot be used, or its shape is not known.
        NanorunError: If it is elsewhere and cannot be reached.
    """
    from nanorun.library import resolve_model
    from nanorun.plan.remote import parse_remote, read_remote_gguf
    from nanorun.plan.shape import shape_of_gguf

    source = _of_known(model, recipe) or _of_source(model, recipe)
    if source is not None:
        return source
    if recipe is not None:
        raise UsageError(
            f"--recipe {recipe} is for models that are still to be converted; {model} is a file",
            tries=[f"nanorun plan {model}"],
        )
    remote = None if Path(model).exists() else parse_remote(model)
    if remote is not None:
        # There is no file to open here, whatever the header is called in messages.
        return [replace(shape_of_gguf(model, read_remote_gguf(remote)), path=None)]
    return [shape_of_file(model, resolve_model(model))]


def shape_of_file(name: str, path: Path) -> ModelShape:
    """The shape of a GGUF file.

    Raises:
        ModelError: If it is damaged or no model that nanorun runs.
    """
    from nanorun.model.gguf import read_gguf
    from nanorun.plan.shape import shape_of_gguf

    return shape_of_gguf(name, read_gguf(path))


def _of_known(model: str, recipe: str | None) -> list[ModelShape] | None:
    """The shapes of a model of the library that is not bundled, by its name or its repository."""
    from nanorun.library import CATALOG

    name, _, size = model.partition(":")
    by_repository = {known.repository: known for known in CATALOG.values()}
    known = by_repository.get(model) or CATALOG.get(name)
    if known is None or known.repository is None:
        return None
    recipe = recipe or size or None
    if known.arch is None:
        return _of_repository(model, known.repository, recipe)
    return _of_arch(model, known.arch, recipe, known.repository)


def _of_source(model: str, recipe: str | None) -> list[ModelShape] | None:
    """The shapes of a source model in a folder or on the Hub, by its config.json."""
    from nanorun_converters.source.hub import parse_repository

    if (Path(model) / "config.json").is_file():
        return _of_folder(Path(model), recipe)
    name = model.removeprefix("hf://")
    if Path(model).exists() or name.lower().endswith(".gguf") or parse_repository(name) is None:
        return None
    return _of_repository(model, name, recipe)


def _of_folder(folder: Path, recipe: str | None) -> list[ModelShape]:
    path = folder / "config.json"
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    return _of_arch(str(folder), _arch_of_config(text, str(path), str(folder)), recipe, None)


def _of_repository(name: str, argument: str, recipe: str | None) -> list[ModelShape]:
    from nanorun_converters.source.hub import HubFiles, parse_repository

    repository, revision = parse_repository(argument) or (argument, None)
    files = HubFiles(repository, revision)
    config = files.find("config.json")
    if config is None:
        ggufs = [file for file in files.names() if file.lower().endswith(".gguf")]
        raise ModelError(
            f"{argument}: expected a source model's config.json, found none",
            tries=[f"nanorun plan {argument}/{file}" for file in ggufs[:3]],
        )
    where = f"{argument}/{config.name}"
    if config.n_bytes > _MOST_CONFIG_BYTES:
        raise ModelError(f"{where}: {config.n_bytes:,} bytes are more than a config.json has")
    arch = _arch_of_config(config.read(0, config.n_bytes).tobytes(), where, argument)
    return _of_arch(name, arch, recipe, repository)


def _arch_of_config(text: bytes, where: str, source: str) -> HybridArch:
    import codecs
    import json

    from nanorun_converters.family.config import arch_from_config
    from nanorun_converters.options import ConvertOptions

    try:
        config = json.loads(text.removeprefix(codecs.BOM_UTF8))
    except ValueError as error:
        raise ModelError(f"{where} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{where}: expected an object, found {type(config).__name__}")
    return arch_from_config(config, where, again=ConvertOptions().again(source))


def _of_arch(
    name: str, arch: HybridArch, recipe: str | None, repository: str | None
) -> list[ModelShape]:
    from nanorun.plan.shape import shape_of_recipe, shapes_of_recipes

    if recipe is not None:
        return [shape_of_recipe(name, arch, recipe, repository)]
    return shapes_of_recipes(name, arch, repository)
