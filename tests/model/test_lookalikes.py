"""Telling what a file is that should be a model's."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from nanorun.errors import ModelError
from nanorun.model.gguf import read_gguf
from nanorun.model.lookalikes import look_alike
from nanorun_converters.source.open import open_source
from tests.support.source_models import write_source_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
KINDS = {
    "a Git LFS pointer": POINTER,
    "a web page": b"\n<!DOCTYPE html><html><body>404</body></html>",
    "what macOS leaves": b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ",
    "a zip archive": b"PK\x03\x04" + bytes(60),
    "text in UTF-16": "{}".encode("utf-16"),
    "a file of zeros": bytes(600),
}


@pytest.mark.parametrize("what", KINDS)
def test_gguf_that_is_something_else_is_called_what_it_is(what: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(KINDS[what])
    with pytest.raises(ModelError, match=f"model.gguf: header: expected a GGUF file, found {what}"):
        read_gguf(path)


@pytest.mark.parametrize("what", KINDS)
def test_weights_that_are_something_else_are_called_what_they_are(
    what: str, tmp_path: Path
) -> None:
    folder = write_source_model(tmp_path)
    (folder / "model.safetensors").write_bytes(KINDS[what])
    with pytest.raises(ModelError, match=f"expected a safetensors file, found {what}"):
        open_source(folder)


@pytest.mark.parametrize("what", ["a Git LFS pointer", "a web page", "what macOS leaves"])
def test_json_that_is_something_else_is_called_what_it_is(what: str, tmp_path: Path) -> None:
    folder = write_source_model(tmp_path)
    (folder / "tokenizer.json").write_bytes(KINDS[what])
    with pytest.raises(ModelError, match=rf"tokenizer\.json: expected .*, found {what}"):
        open_source(folder).read_json("tokenizer.json")


def test_pointer_says_how_to_get_the_file() -> None:
    found = look_alike(POINTER, "my models/model.gguf")
    assert found is not None
    assert found.tries == ("git lfs install", "git -C 'my models' lfs pull")


@pytest.mark.parametrize(
    "head", [b"", b"GGUF", codecs.BOM_UTF8 + b"{}", b"\x08" + bytes(7) + b"{}"]
)
def test_what_may_be_the_file_itself_is_nothing_else(head: bytes) -> None:
    assert look_alike(head, "model") is None
