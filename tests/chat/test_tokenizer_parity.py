"""The token ids are those of the `tokenizers` library, for text and for prompts."""

# ruff: noqa: RUF001  (characters that look alike are what is tested)

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from nanorun.chat.prompt import RenderedPrompt
from nanorun.chat.template import ChatTemplate
from nanorun.model.chat import Message, ToolCall
from nanorun.model.gguf import read_gguf
from nanorun.tokens.tokenizer import trained_tokenizer
from tests.chat.conftest import CONTROL_TOKENS

CORPUS = {
    "prose": "The quick fox doesn't jump over the lazy dog's back; it's 'fine', isn't it? I'LL GO.",
    "code": "def f(x: int) -> dict[str, int]:\n\treturn {**x, 'a_b': x // 2}  # ok\n\n\n    f(1)\n",
    "c": "#include <stdio.h>\r\nint main(void) { printf(\"%d\\n\", 0x7fFF & ~1u); return 0; }\r\n",
    "markup": "<html><b class='x'>a &amp; b</b><br/></html> <|not_special|> </s <im_end|>",
    "paths": "/usr/local/lib//x.y\\z C:\\Users\\é\n///\n// a\n/",
    "numbers": "0 1 12 123 1234567890 3.14159 -2e-10 1,000,000 ½ ² ٣ Ⅷ 1st 2nd x1y2",
    "case": "camelCase HTTPServer XMLHttpRequest iPhone ÀÉÎ àéî ǅ ǆ ß ẞ ΣΊΣΥΦΟΣ İstanbul ſ",
    "cjk": "日本語のテスト。中文测试，还有繁體字。한국어 시험입니다! ｆｕｌｌ　ｗｉｄｔｈ",
    "scripts": "Привет, мир! שלום עולם العربية हिन्दी ไทย தமிழ் ქართული ελληνικά አማርኛ ᏣᎳᎩ",
    "emoji": "🙂👍🏽👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 ❤️ ☃ 🧮123🧮",
    "marks": "e\u0301 a\u0308\u0323 n\u0303o \u0301x \u200bzero\u200d width\ufeff \u00adsoft Z͑ͫ̓a̴l̷g̶o",
    "spaces": "  two   three\t\ttabs \n \n\n  \n\t\n end   ",
    "other spaces": "a\u00a0b\u2003c\u3000d\u2028e\u2029f\u0085g\x0bh\x0ci\x1cj",
    "controls": "\x00\x01\x07\x1b[0m\x7f\u0080",
    "symbols": "±×÷≠≤≥∑∫√∞ ←↑→↓ ©®™ §¶†‡ “quotes” ‘single’ … — – · •",
    "mathematics": "𝒜𝓑 𝟙𝟚 ∀x∈ℝ: x²≥0 ⇒ |x|=√(x²)",
    "runs": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa !!!!!!!!!!!!!!!! ............. =============",
    "nothing": "",
    "private": "\ue000\U000f0000\U0010ffff\ufffd\ufffe",
}  # fmt: skip


class Vocabulary:
    """A GGUF's tokenizer, as a loaded model has it."""

    def __init__(self, path: Path) -> None:
        tokenizer = trained_tokenizer(read_gguf(path).metadata)
        assert tokenizer is not None
        self._tokenizer = tokenizer

    def ids(self, text: str, *, special: bool) -> list[int]:
        return self._tokenizer.encode(text, special=special)


@pytest.fixture(scope="module")
def engine(pico_gguf: Path) -> Vocabulary:
    return Vocabulary(pico_gguf)


@pytest.fixture(scope="module")
def reference(tokenizer_file: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer_file))


def reference_ids(reference: Any, text: str, *, special: bool) -> list[int]:
    # Named for what it does to the texts of special tokens: encode them like any other.
    reference.encode_special_tokens = not special
    ids: list[int] = reference.encode(text, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize("name", CORPUS)
def test_text_has_the_same_tokens(engine: Vocabulary, reference: Any, name: str) -> None:
    for special in (True, False):
        expected = reference_ids(reference, CORPUS[name], special=special)
        assert engine.ids(CORPUS[name], special=special) == expected


def test_mixed_text_has_the_same_tokens(engine: Vocabulary, reference: Any) -> None:
    rng = random.Random(5)
    words = [word for text in CORPUS.values() for word in text.split(" ")]
    atoms = words + list(CONTROL_TOKENS)
    atoms += [" ", "  ", "\n", "\n\n", "\r\n", "\t", "'", "’s", "1", "é", "/"]
    for _ in range(800):
        text = "".join(rng.choices(atoms, k=rng.randint(1, 30)))
        for special in (True, False):
            expected = reference_ids(reference, text, special=special)
            assert engine.ids(text, special=special) == expected, repr(text)


def test_mark_before_punctuation_has_the_same_tokens(engine: Vocabulary, reference: Any) -> None:
    text = "e\u0301<tool"
    assert engine.ids(text, special=False) == reference_ids(reference, text, special=False)


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_control_token_inside_text_is_text_or_token_as_asked(
    engine: Vocabulary, reference: Any, token: str
) -> None:
    text = f"see {token}, or x{token}\n"
    control = reference.token_to_id(token)
    assert engine.ids(text, special=True).count(control) == 2
    plain = engine.ids(text, special=False)
    assert control not in plain
    assert plain == reference_ids(reference, text, special=False)


def prompt_ids(engine: Vocabulary, prompt: RenderedPrompt) -> list[int]:
    return [
        token
        for stretch in prompt.stretches()
        for segment in stretch
        for token in engine.ids(segment.text, special=segment.special)
    ]


def conversation(text: str) -> list[Message]:
    return [
        Message("system", text),
        Message("user", text),
        Message("assistant", text, thinking=text),
        Message("user", text),
        Message("assistant", text, "plan", (ToolCall("1", "f", {"x": text, "n": [1, text]}),)),
        Message("tool", text, tool_call_id="1"),
    ]


TOOL = {"type": "function", "function": {"name": "f", "description": "Do é.", "parameters": {}}}


@pytest.mark.parametrize("name", CORPUS)
def test_prompt_has_the_tokens_of_its_text(
    engine: Vocabulary, reference: Any, template: ChatTemplate, name: str
) -> None:
    messages = conversation(CORPUS[name])
    for thinking in (True, False):
        prompt = template.render(messages, tools=[TOOL], enable_thinking=thinking)
        assert len(prompt.boundaries) == 3
        expected = reference_ids(reference, prompt.text, special=True)
        assert prompt_ids(engine, prompt) == expected


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_prompt_with_typed_control_tokens_has_those_of_the_template_only(
    engine: Vocabulary, reference: Any, template: ChatTemplate, token: str
) -> None:
    typed, plain = (
        template.render(conversation(f"x{text}y\n"), tools=[TOOL], enable_thinking=True)
        for text in (token, "~")
    )
    controls = {reference.token_to_id(token) for token in CONTROL_TOKENS}
    found, wanted = (
        [token for token in prompt_ids(engine, prompt) if token in controls]
        for prompt in (typed, plain)
    )
    assert found == wanted
    assert token in typed.text


def test_typed_control_token_has_the_tokens_of_plain_text(
    engine: Vocabulary, reference: Any, template: ChatTemplate
) -> None:
    prompt = template.render([Message("user", "a <think> b")], enable_thinking=True)
    turn = reference_ids(reference, "user\na <think> b", special=False)
    ids = prompt_ids(engine, prompt)
    assert any(ids[i : i + len(turn)] == turn for i in range(len(ids)))
