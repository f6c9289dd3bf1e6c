"""The chat templates of a source model, wherever its folder keeps them.

They are read, never run: only the engine's process does that. What a person should know of them
(there is none, it is empty, it is no template) is told, since a file without a template converts
and then cannot chat.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from nanorun.errors import ModelError, UsageError
from nanorun_converters.source.files import TEMPLATES_FOLDER, local_file
from nanorun_converters.source.source_model import SourceModel, read_text

FAMILY = "family"
"""What `--chat-template` calls the reference template of the model's family."""
DEFAULT = "default"
_FAMILY_FILE = "chat_template.jinja"
TEMPLATE_HINT = "--chat-template FILE or --chat-template family gives the file one"


def read_chat_templates(source: SourceModel) -> dict[str, str]:
    """The chat templates by name; a file of its own wins over tokenizer_config.json, as in
    transformers.

    Raises:
        ModelError: If a field or a file of templates is damaged.
    """
    found: dict[str, str] = {}
    for where, name, text in (*_in_json(source), *_in_files(source)):
        if not text.strip():
            source.tell(f"{where}: chat template {name!r} is empty, which is none")
            continue
        found[name] = text
        problem = syntax_error(text)
        if problem is not None:
            source.tell(f"{where}: chat template {name!r} is none: {problem}; {TEMPLATE_HINT}")
    if not found:
        source.tell(f"{source.origin}: there is no chat template; {TEMPLATE_HINT}")
    elif DEFAULT not in found:
        names = ", ".join(found)
        source.tell(
            f"{source.origin}: no chat template is the default, only {names}; {TEMPLATE_HINT}"
        )
    return found


def chosen_template(choice: str) -> str:
    """The template that `--chat-template` names: a file's, or the reference of the family.

    Raises:
        UsageError: If there is no such file, or no template in it.
    """
    path = _family_path() if choice == FAMILY else Path(choice).expanduser()
    try:
        store = local_file(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"--chat-template {choice:.200}: {error}") from error
    if store is None:
        raise UsageError(
            f"--chat-template {choice:.200}: there is no such file",
            tries=["nanorun convert SRC --chat-template family"],
        )
    text = read_text(store, str(path))
    problem = syntax_error(text) if text.strip() else "it is empty"
    if problem is not None:
        raise UsageError(f"--chat-template {choice}: {problem}")
    return text


def syntax_error(text: str) -> str | None:
    """What is wrong with a template's syntax, and where; None if nothing is."""
    import jinja2
    from jinja2.ext import loopcontrols

    environment = jinja2.Environment(extensions=[_generation_tag(), loopcontrols])
    try:
        environment.parse(text)
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except (RecursionError, MemoryError, ValueError) as error:
        return f"it cannot be read ({type(error).__name__})"
    return None


def _generation_tag() -> Any:
    """The `{% generation %}` block of transformers, which marks what a model is trained on."""
    from jinja2.ext import Extension

    class GenerationTag(Extension):
        # Jinja2 declares it without ClassVar, and mypy holds subclasses to that.
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return GenerationTag


def _in_json(source: SourceModel) -> Iterator[tuple[str, str, str]]:
    """Where, name and text of the templates in a JSON file, from the weakest to the strongest."""
    for file in ("tokenizer_config.json", "chat_template.json"):
        value = (source.find_json(file) or {}).get("chat_template")
        where = str(source.origin / file)
        if isinstance(value, str):
            yield where, DEFAULT, value
        elif isinstance(value, Mapping):
            yield from ((where, *_checked(name, text, where)) for name, text in value.items())
        elif isinstance(value, list):
            yield from ((where, *_entry(entry, where)) for entry in value)
        elif value is not None:
            raise ModelError(f"{where}: chat_template: expected text, found {value!r:.80}")


def _entry(entry: object, where: str) -> tuple[str, str]:
    if not isinstance(entry, dict):
        entry = {}
    return _checked(entry.get("name"), entry.get("template"), where)


def _checked(name: object, text: object, where: str) -> tuple[str, str]:
    if not isinstance(name, str) or not isinstance(text, str):
        raise ModelError(
            f"{where}: chat_template: expected name and template, found {name!r:.40}, {text!r:.40}"
        )
    return name, text


def _in_files(source: SourceModel) -> Iterator[tuple[str, str, str]]:
    """Where, name and text of the templates that are files of their own."""
    for file in ("chat_template.jinja", *source.files.names()):
        path = PurePosixPath(file)
        is_further = str(path.parent) == TEMPLATES_FOLDER and path.suffix == ".jinja"
        if file != "chat_template.jinja" and not is_further:
            continue
        text = source.find_text(file)
        if text is not None:
            yield str(source.origin / file), path.stem if is_further else DEFAULT, text


def _family_path() -> Path:
    import nanorun

    return Path(nanorun.__file__).parent / "data" / "pico" / _FAMILY_FILE
