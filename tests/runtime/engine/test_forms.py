"""What of a request's form is held, what runs free with a notice, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from nanorun.errors import ModelError, UsageError
from nanorun.model.chat import (
    Event,
    Finished,
    GenerateOptions,
    Grammar,
    Message,
    Notice,
    ToolCallDelta,
)
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import OFF
from nanorun.runtime.client import EngineClient
from nanorun.runtime.engine import forms
from nanorun.runtime.engine.forms import compile_form
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.reply.constraint import Constraint
from nanorun.runtime.reply.grammar import GrammarCompiler, Matcher

# llguidance asks llama.cpp for the attributes of tokens by an older name.
pytestmark = pytest.mark.filterwarnings("ignore:llama_token_get_attr:DeprecationWarning")

SUM = Grammar("regex", "[0-9]+")


def tool(name: str, parameters: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


PARAMETERS = {
    "type": "object",
    "properties": {
        "expression": {"type": "string"},
        "digits": {"type": "integer", "minimum": 0, "maximum": 9},
        "mode": {"enum": ["exact", "rounded"]},
        "exact": {"type": "boolean"},
        "units": {"type": "array", "items": {"enum": ["m", "s"]}, "maxItems": 3},
    },
    "required": ["expression", "mode"],
    "additionalProperties": False,
}
CALCULATOR = tool("calculator", PARAMETERS)
IMPOSSIBLE = {"type": "object", "properties": {"x": {"enum": []}}, "required": ["x"]}
ODD_PARAMETERS = [
    IMPOSSIBLE,
    {"properties": [1]},
    {"required": [{}]},
    {"properties": {"a": {"anyOf": 7}}},
    {"properties": {"a": {"$ref": "#/nowhere"}}},
    {"properties": {"a": {"type": "string", "pattern": "("}}, "additionalProperties": 7},
    {"properties": {"a": {"type": "number", "minimum": "x"}}},
    {"type": "array"},
    [1],
    "text",
    7,
]


@pytest.fixture(scope="module")
def model(pico_gguf: Path) -> LoadedModel:
    return LoadedModel(pico_gguf, EngineOptions(n_ctx=512, n_threads=1))


def starts(model: LoadedModel, options: GenerateOptions) -> list[str]:
    """Pieces of text with which a call may go on after `<tool_call>\\n<function=`."""
    form = compile_form(model, options).form
    assert form is not None
    held = Constraint(form)
    for token in [model.call_tokens[0], *model.tokenize("\n<function=", special=False)]:
        held.take(token)
    allowed = held.allowed()
    assert allowed is not None
    return [model.piece(int(token)).decode() for token in allowed]


def test_calls_are_held_wherever_tools_are_offered(model: LoadedModel) -> None:
    options = GenerateOptions(tools=(CALCULATOR, tool("ping", {})))
    assert all("calculator".startswith(s) or "ping>".startswith(s) for s in starts(model, options))
    assert compile_form(model, GenerateOptions()).form is None


@pytest.mark.parametrize("parameters", ODD_PARAMETERS)
@pytest.mark.parametrize("more", [{}, {"parallel_tool_calls": False}, {"grammar": SUM}])
def test_tool_that_cannot_be_held_refuses_no_request(
    model: LoadedModel, parameters: Any, more: Any
) -> None:
    options = GenerateOptions(tools=(CALCULATOR, tool("odd", parameters)), **more)
    form = compile_form(model, options)
    assert form.form is not None
    assert all(notice.startswith("calls of odd are not held") for notice in form.notices)


def test_notice_names_the_tool_and_the_reason(model: LoadedModel) -> None:
    options = GenerateOptions(tools=(CALCULATOR, tool("odd", IMPOSSIBLE)))
    (notice,) = compile_form(model, options).notices
    assert notice == (
        "calls of odd are not held to its parameters: tool odd.x: no value fits the schema"
    )
    assert any("odd".startswith(start) for start in starts(model, options))


def test_request_that_insists_is_refused(model: LoadedModel) -> None:
    for options in (
        GenerateOptions(tools=(CALCULATOR, tool("odd", IMPOSSIBLE, strict=True))),
        GenerateOptions(tools=(CALCULATOR, tool("odd", IMPOSSIBLE)), tool_choice="required"),
        GenerateOptions(tools=(CALCULATOR,), grammar=Grammar("regex", "(")),
    ):
        with pytest.raises(UsageError):
            compile_form(model, options)


def test_tools_too_large_to_hold_together_are_called_freely(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = GrammarCompiler.compile

    def compile_small(self: GrammarCompiler, lark: str, **more: bool) -> Any:
        if lark.count("function=") > 2:
            raise UsageError("too long")
        return whole(self, lark, **more)

    monkeypatch.setattr(GrammarCompiler, "compile", compile_small)
    tools = tuple(tool(f"t{i}", {}) for i in range(3))
    form = compile_form(model, GenerateOptions(tools=tools))
    assert form.form is None
    assert [notice.partition(" are ")[0] for notice in form.notices] == [
        "calls of t0",
        "calls of t1",
        "calls of t2",
    ]


def test_models_that_write_other_calls_are_left_free(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "_CALL_MARK", "<|python_tag|>")
    assert compile_form(model, GenerateOptions(tools=(CALCULATOR,))).form is None
    monkeypatch.setitem(model.__dict__, "call_tokens", None)
    del model.__dict__["call_tokens"]
    monkeypatch.setattr(LoadedModel, "_single_token", lambda *args: [])
    assert compile_form(model, GenerateOptions(tools=(CALCULATOR,))).form is None
    required = GenerateOptions(tools=(tool("new", {}),), tool_choice="required")
    with pytest.raises(ModelError, match="no tokens for tool calls"):
        compile_form(model, required)


def test_same_tools_are_compiled_once(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    whole = GrammarCompiler.compile

    def count(self: GrammarCompiler, lark: str, **more: bool) -> Any:
        compiled.append(lark)
        return whole(self, lark, **more)

    monkeypatch.setattr(GrammarCompiler, "compile", count)
    options = GenerateOptions(tools=(tool("once", PARAMETERS),))
    first, second = (compile_form(model, options).form for _ in range(2))
    assert len(compiled) == 1
    assert first is not second
    compile_form(model, GenerateOptions(tools=options.tools, parallel_tool_calls=False))
    assert len(compiled) == 2


def test_forms_kept_are_bounded_the_oldest_goes_first(model: LoadedModel) -> None:
    compiler = GrammarCompiler(model.vocab, 0)
    made: list[int] = []

    def ask(key: int) -> int:
        return compiler.cached(str(key), lambda: made.append(key) or key)

    for key in [*range(16), 0, 16, 0, 1]:
        assert ask(key) == key
    assert made == [*range(16), 16, 1]


def test_reply_goes_on_freely_where_a_grammar_breaks(model: LoadedModel) -> None:
    class Broken:
        """A matcher of llguidance's that met more than it can hold."""

        def compute_logit_bias(self) -> None: ...
        def is_error(self) -> bool:
            return True

        def get_error(self) -> str:
            return "too complex"

        def is_stopped(self) -> bool:
            return True

    import llguidance.numpy

    fill = llguidance.numpy.fill_next_token_bitmask
    llguidance.numpy.fill_next_token_bitmask = lambda *args: None
    try:
        with pytest.raises(UsageError, match="broke down"):
            Matcher(Broken(), 5).allowed()
        free = Matcher(Broken(), 5, may_break=True)
        assert free.allowed().tolist() == [0, 1, 2, 3, 4]
        assert not free.is_over
    finally:
        llguidance.numpy.fill_next_token_bitmask = fill


# -- on the real engine ----------------------------------------------------------------------------


@pytest.fixture
async def client(pico_gguf: Path) -> AsyncIterator[EngineClient]:
    client = EngineClient(pico_gguf, EngineOptions(n_ctx=8192, n_parallel=8, n_threads=1))
    yield client
    await client.close()


async def collect(client: EngineClient, options: GenerateOptions) -> list[Event]:
    messages = [Message("user", "What is 12 * 34?")]
    return [event async for event in client.generate(messages, options)]


async def test_every_call_of_a_hot_model_fits_its_tool(client: EngineClient) -> None:
    replies = await asyncio.gather(
        *(
            collect(
                client,
                GenerateOptions(
                    think=OFF, temperature=1.5, top_p=1.0, seed=seed, max_tokens=300,
                    tools=(CALCULATOR,), parallel_tool_calls=seed % 2 == 0,
                ),
            )
            for seed in range(60)
        )
    )  # fmt: skip
    n_whole = 0
    for events in replies:
        calls = [event for event in events if isinstance(event, ToolCallDelta)]
        assert isinstance(events[-1], Finished)
        if calls and events[-1].reason == "length":
            calls.pop()  # it may be cut off
        for event in calls:
            assert (event.call.name, event.problem) == ("calculator", None)
            jsonschema.validate(event.call.arguments, PARAMETERS)
            n_whole += 1
    assert n_whole > 30


async def test_notice_comes_before_the_reply(client: EngineClient) -> None:
    options = GenerateOptions(think=OFF, max_tokens=4, tools=(tool("odd", IMPOSSIBLE),))
    first, *_, last = await collect(client, options)
    assert isinstance(first, Notice) and first.text.startswith("calls of odd are not held")
    assert isinstance(last, Finished)
