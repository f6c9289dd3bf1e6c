"""A client without an engine that does all that comes before the model: frame, template, form.

What a request breaks here it would break in the engine's process.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from llguidance import LLMatcher, LLTokenizer

import nanorun
from nanorun.chat.call_grammar import call_grammar, reply_grammar
from nanorun.chat.template import ChatTemplate
from nanorun.errors import UsageError
from nanorun.model.chat import GenerateOptions, Prompt, RawPrompt
from nanorun.runtime.process.frames import REQUESTS, Generate
from nanorun.runtime.process.wire import HEADER_BYTES
from tests.support.byte_tokens import byte_tokenizer
from tests.support.fakes import FakeClient, FakeGeneration, Step, reply

TEMPLATE = Path(nanorun.__file__).parent / "data" / "pico" / "chat_template.jinja"
SPECIAL = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")


CALL_TOKENS = (257, 258)


@cache
def tokenizer() -> LLTokenizer:
    """llguidance's tokenizer of all bytes."""
    return byte_tokenizer(b"<|im_end|>", b"<tool_call>", b"</tool_call>")


@cache
def _template() -> ChatTemplate:
    return ChatTemplate(TEMPLATE.read_text(encoding="utf-8"), name="pico", special_tokens=SPECIAL)


def compile_grammar(lark: str) -> LLMatcher:
    """A matcher at the grammar's beginning.

    Raises:
        UsageError: If llguidance refuses it, as `GrammarCompiler` says.
    """
    matcher = LLMatcher(tokenizer(), LLMatcher.grammar_from_lark(lark), log_level=0)
    if matcher.is_error():
        raise UsageError("the grammar cannot be used", facts=[matcher.get_error()[:200]])
    return matcher


def prepare(prompt: Prompt, options: GenerateOptions) -> None:
    """What the engine's process does with a request before it evaluates anything.

    Raises:
        NanorunError: As it does there.
    """
    asked = prompt if isinstance(prompt, RawPrompt) else tuple(prompt)
    body = REQUESTS.encode(Generate("r1", asked, options))[HEADER_BYTES:]
    frame = REQUESTS.decode(body)
    assert isinstance(frame, Generate)
    prompt, options = frame.prompt, frame.options
    must_call = options.tool_choice == "required"
    if options.grammar is not None or must_call:
        compile_grammar(reply_grammar(
            options.grammar, options.tools, parallel=True, call_tokens=CALL_TOKENS
        ))  # fmt: skip
    elif options.tools:
        compile_grammar(call_grammar(options.tools, call_tokens=CALL_TOKENS))
    if not isinstance(prompt, RawPrompt):
        rendered = _template().render(
            prompt, tools=options.tools, enable_thinking=not options.think.is_off,
            truncate_history_thinking=not options.keep_thinking,
        )  # fmt: skip
        for segment in rendered.segments:
            segment.text.encode()


class CheckingClient(FakeClient):
    """Answers every request that the engine's process would take, and forgets it."""

    n_asked = 0

    def generate(self, prompt: Prompt, options: GenerateOptions) -> FakeGeneration:
        self.n_asked += 1
        steps: list[Step] = reply("hello", thinking="well then")
        try:
            prepare(prompt, options)
        except Exception as error:
            steps = [error]
        return FakeGeneration(steps)
