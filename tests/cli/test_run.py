from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nanorun.errors import ContextFull, EngineDied, MemoryPlanError, ModelError
from nanorun.model.chat import (
    Grammar,
    Message,
    Notice,
    PrefillProgress,
    TextDelta,
    ThinkingDelta,
    ToolCall,
)
from nanorun.model.think import Think
from tests.cli.conftest import FakeEngine, Result
from tests.support.fakes import FakeClient, reply

Run = Callable[..., Result]


def test_run_writes_the_answer_to_stdout_and_the_thinking_to_stderr(
    nanorun: Run, engine: FakeEngine
) -> None:
    engine.client = FakeClient.playing(reply("it is 4", thinking="two and two"))
    result = nanorun("run", "pico", "2+2?")
    assert result == Result(0, "it is 4\n", "two and two\n\n")
    assert engine.client.last.messages == (Message("user", "2+2?"),)


def test_run_ends_an_answer_with_one_newline(nanorun: Run, engine: FakeEngine) -> None:
    engine.client = FakeClient.playing(reply("done\n"))
    assert nanorun("run", "pico", "x").out == "done\n"


def test_run_passes_its_flags_on(nanorun: Run, engine: FakeEngine) -> None:
    flags = "--think 100 --max-tokens 9 --temp 0.5 --top-p 0.9 --seed 3 --n-ctx 4k --system short"
    assert nanorun("run", "pico", "x", *flags.split()).code == 0
    options = engine.client.last.options
    assert (options.think, options.max_tokens, options.temperature) == (Think(100), 9, 0.5)
    assert (options.top_p, options.seed) == (0.9, 3)
    assert engine.client.last.messages == (Message("system", "short"), Message("user", "x"))
    assert engine.options is not None
    assert (engine.options.n_ctx, engine.options.n_parallel) == (4096, 1)


def test_run_closes_the_engine(nanorun: Run, engine: FakeEngine) -> None:
    nanorun("run", "pico", "x")
    assert (engine.client.n_starts, engine.client.n_closes) == (1, 1)


def test_run_reads_the_prompt_from_a_pipe(nanorun: Run, engine: FakeEngine) -> None:
    assert nanorun("run", "pico", stdin="what is 2+2?\n").code == 0
    assert engine.client.last.messages == (Message("user", "what is 2+2?"),)


def test_run_puts_the_prompt_above_what_the_pipe_brings(nanorun: Run, engine: FakeEngine) -> None:
    assert nanorun("run", "pico", "sum these up:", stdin="1\n2\n").code == 0
    assert engine.client.last.messages == (Message("user", "sum these up:\n\n1\n2"),)


@pytest.mark.parametrize(
    ("args", "stdin", "says"),
    [
        ((), b"", "there is no prompt"),
        ((), b" \n", "there is no prompt"),
        ((), b"caf\xe9", "standard input is not UTF-8 text"),
        (("\udcff",), b"", "the prompt is not UTF-8 text"),
        (("x", "--think", "deep"), b"", "'deep' is not known"),
        (("x", "--n-ctx", "many"), b"", "not a number of tokens: 'many'"),
        (("x", "--max-tokens", "0"), b"", "invalid value for '--max-tokens'"),
        (("x", "--top-p", "2"), b"", "invalid value for '--top-p'"),
    ],
)
def test_run_that_cannot_be_meant_is_a_usage_error(
    nanorun: Run, engine: FakeEngine, args: tuple[str, ...], stdin: bytes, says: str
) -> None:
    result = nanorun("run", "pico", *args, stdin=stdin)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("nanorun: error: ")
    assert says in result.err
    assert engine.client.n_starts == 0


def test_run_as_json_is_one_object(nanorun: Run, engine: FakeEngine) -> None:
    call = ToolCall("c1", "add", {"a": 1})
    script = reply("ünd so", thinking="hm", tool_calls=[call], cached_tokens=2)
    engine.client = FakeClient.playing(script)
    result = nanorun("run", "pico", "x", "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out) == {
        "thinking": "hm",
        "answer": "ünd so",
        "tool_calls": [{"name": "add", "arguments": {"a": 1}}],
        "finish_reason": "tool_calls",
        "usage": {
            "prompt_tokens": 7,
            "cached_tokens": 2,
            "thinking_tokens": 1,
            "completion_tokens": 4,
            "drafted_tokens": 0,
            "accepted_tokens": 0,
        },
        "timings": {
            "load_s": 0.1,
            "prefill_s": 0.1,
            "decode_s": 0.2,
            "prefill_tps": 70.0,
            "decode_tps": 50.0,
        },
    }


def test_run_tells_of_notices_and_tool_calls_beside_the_answer(
    nanorun: Run, engine: FakeEngine
) -> None:
    call = ToolCall("c1", "add", {"a": 1})
    script = [Notice("restarted"), TextDelta("so"), *reply(tool_calls=[call])]
    engine.client = FakeClient.playing(script)
    result = nanorun("run", "pico", "x")
    assert result.out == "so\n"
    assert result.err == ("nanorun: restarted\nnanorun: the model asked for a tool: add {'a': 1}\n")


def test_run_shows_no_progress_where_nobody_watches(nanorun: Run, engine: FakeEngine) -> None:
    engine.client = FakeClient.playing([PrefillProgress(512, 4096, 0), *reply("x")])
    assert nanorun("run", "pico", "x").err == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelError("pico.gguf is cut short", facts=["5 of 9 bytes"]), 3),
        (MemoryPlanError("24 GiB do not fit", tries=["nanorun run pico --n-ctx 4k"]), 4),
        (EngineDied("the engine's process was ended by SIGKILL"), 1),
    ],
)
def test_run_that_cannot_load_leaves_with_the_code_of_its_cause(
    nanorun: Run, engine: FakeEngine, error: Exception, code: int
) -> None:
    engine.client = FakeClient(start_error=error)
    result = nanorun("run", "pico", "x")
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith(f"nanorun: error: {error}\n")
    assert engine.client.n_closes == 1


def test_run_that_fails_midway_keeps_what_was_said(nanorun: Run, engine: FakeEngine) -> None:
    engine.client = FakeClient.playing([TextDelta("so far"), EngineDied("it died")])
    result = nanorun("run", "pico", "x")
    assert result == Result(1, "so far\n", "nanorun: error: it died\n")


def test_run_that_fails_while_thinking_ends_the_line(nanorun: Run, engine: FakeEngine) -> None:
    engine.client = FakeClient.playing([ThinkingDelta("hm"), EngineDied("it died")])
    assert nanorun("run", "pico", "x").err == "hm\nnanorun: error: it died\n"


def test_run_with_too_long_a_prompt_says_so(nanorun: Run, engine: FakeEngine) -> None:
    engine.client = FakeClient.playing([ContextFull("9000 tokens do not fit n_ctx 8192")])
    result = nanorun("run", "pico", "x")
    assert result.code == 1
    assert "9000 tokens" in result.err


@pytest.mark.parametrize("as_file", [True, False])
def test_run_holds_the_answer_to_a_schema(
    nanorun: Run, engine: FakeEngine, tmp_path: Path, as_file: bool
) -> None:
    schema = '{"type": "integer"}'
    (tmp_path / "s.json").write_text(schema)
    nanorun("run", "pico", "hi", "--schema", str(tmp_path / "s.json") if as_file else schema)
    assert engine.client.requests[-1].options.grammar == Grammar("json_schema", schema)


@pytest.mark.parametrize(
    ("schema", "message"), [("no.json", "no.json cannot be read"), ("{a", "not JSON")]
)
def test_run_refuses_a_schema_that_is_none(
    nanorun: Run, engine: FakeEngine, schema: str, message: str
) -> None:
    result = nanorun("run", "pico", "hi", "--schema", schema)
    assert result.code == 2
    assert message in result.err
