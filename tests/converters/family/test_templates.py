"""Chat templates wherever a source model keeps them, and what is said of those that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanorun.errors import UsageError
from nanorun.model.gguf import read_gguf
from nanorun_converters.convert import convert
from nanorun_converters.family.templates import chosen_template, read_chat_templates, syntax_error
from nanorun_converters.options import ConvertOptions
from nanorun_converters.source.open import open_source
from nanorun_converters.source.source_model import SourceModel
from tests.support.source_models import CHAT_TEMPLATE, write_json, write_source_model

FILE = "chat_template.jinja"


def opened(folder: Path, chat_template: Any = None, file: str | None = None) -> SourceModel:
    write_source_model(folder)
    (folder / FILE).unlink()
    if file is not None:
        (folder / FILE).write_text(file, encoding="utf-8")
    if chat_template is not None:
        write_json(folder / "tokenizer_config.json", {"chat_template": chat_template})
    return open_source(folder)


def test_list_without_a_default_is_carried_and_said(tmp_path: Path) -> None:
    entries = [{"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]
    source = opened(tmp_path, entries)
    assert read_chat_templates(source) == {"tool_use": "T", "rag": "R"}
    assert "no chat template is the default, only tool_use, rag" in source.notes[0]


def test_templates_by_name_in_an_object_are_read(tmp_path: Path) -> None:
    source = opened(tmp_path, {"default": "D", "rag": "R"})
    assert read_chat_templates(source) == {"default": "D", "rag": "R"}
    assert source.notes == []


def test_further_files_are_read_and_win(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R2")
    source = opened(tmp_path, [{"name": "rag", "template": "R"}], CHAT_TEMPLATE)
    assert read_chat_templates(source) == {"rag": "R2", "default": CHAT_TEMPLATE}
    assert source.notes == []


def test_none_is_said_with_the_way_out(tmp_path: Path) -> None:
    source = opened(tmp_path)
    assert read_chat_templates(source) == {}
    assert "there is no chat template; --chat-template FILE or" in source.notes[0]


@pytest.mark.parametrize("text", ["", " \n", "\ufeff"])
def test_empty_one_is_none(text: str, tmp_path: Path) -> None:
    source = opened(tmp_path, file=text)
    assert read_chat_templates(source) == {}
    assert f"{tmp_path / FILE}: chat template 'default' is empty" in source.notes[0]


def test_wrong_syntax_is_said_with_its_line(tmp_path: Path) -> None:
    source = opened(tmp_path, file="{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    read_chat_templates(source)
    assert f"{tmp_path / FILE}: chat template 'default' is none: line 2: " in source.notes[0]


@pytest.mark.parametrize(
    "text",
    [
        CHAT_TEMPLATE,
        "{% generation %}x{% endgeneration %}",
        "{% for m in x %}{% break %}{% endfor %}",
    ],
)
def test_syntax_of_the_engine_is_right(text: str) -> None:
    assert syntax_error(text) is None


@pytest.mark.parametrize(
    ("text", "problem"), [(None, "there is no such file"), ("", "it is empty"), ("{%", "line 1: ")]
)
def test_choice_that_is_none_is_refused(text: str | None, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=f"--chat-template .*: {problem}"):
        chosen_template(str(path))


def test_choice_is_written_and_taken_from_a_gguf_as_well(tmp_path: Path) -> None:
    source = opened(tmp_path / "model").origin
    mine, first, second = tmp_path / "m.jinja", tmp_path / "a.gguf", tmp_path / "b.gguf"
    mine.write_text("\ufeff{{ 'mine' }}", encoding="utf-8")
    convert(Path(source), ConvertOptions(out=first, recipe="bf16", chat_template="family"))
    family = read_gguf(first).metadata["tokenizer.chat_template"]
    assert "<|im_start|>assistant" in family
    convert(first, ConvertOptions(out=second, chat_template=str(mine)))
    assert read_gguf(second).metadata["tokenizer.chat_template"] == "{{ 'mine' }}"


def test_gguf_without_a_template_is_said(tmp_path: Path) -> None:
    source = Path(opened(tmp_path / "model").origin)
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    assert convert(source, ConvertOptions(out=first, recipe="bf16")).notes
    assert convert(first, ConvertOptions(out=second)).notes == (
        f"{first}: there is no chat template; --chat-template FILE or --chat-template family"
        " gives the file one",
    )


def test_template_without_the_tokens_of_its_turns_is_said(tmp_path: Path) -> None:
    source = Path(opened(tmp_path / "model", file="{{ '<|im_end|>' }}").origin)
    path = source / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_end|>", "<|other|>"))
    notes = convert(source, ConvertOptions(out=tmp_path / "a.gguf")).notes
    assert "ends turns with <|im_end|>, which is no token of this model" in notes[0]
