"""What the chat tests share: pico's template and control tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanorun.chat.template import ChatTemplate

CONTROL_TOKENS = (
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>",
    "</tool_call>", *(f"<SPECIAL_{i}>" for i in range(16, 32)),
)  # fmt: skip


@pytest.fixture(scope="session")
def template(pico_source: Path) -> ChatTemplate:
    """Pico's chat template, knowing pico's control tokens."""
    path = pico_source / "chat_template.jinja"
    source = path.read_text(encoding="utf-8")
    return ChatTemplate(source, name=path.name, special_tokens=CONTROL_TOKENS)


@pytest.fixture(scope="session")
def tokenizer_file(pico_source: Path) -> Path:
    """Pico's tokenizer.json, which must know the control tokens the tests assume."""
    path = pico_source / "tokenizer.json"
    added = json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
    assert {token["content"] for token in added} >= set(CONTROL_TOKENS)
    return path
