"""The engine's child process: replies, control, and what happens when it dies."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from nanorun.errors import (
    ContextFull,
    EngineDied,
    EngineError,
    EngineOutOfMemory,
    MemoryPlanError,
    MemoryShortage,
    ModelError,
    UsageError,
)
from nanorun.model.chat import (
    Event,
    Finished,
    GenerateOptions,
    Grammar,
    Message,
    Notice,
    PrefillProgress,
    RawPrompt,
    TextDelta,
    ThinkingDelta,
    TokenLogprobs,
)
from nanorun.model.engine_options import EngineOptions
from nanorun.model.ggml_type import GgmlType
from nanorun.model.main_memory import MainMemory
from nanorun.model.memory_needs import MemoryNeeds
from nanorun.model.think import MAX, OFF, Think
from nanorun.runtime.client import EngineClient
from nanorun.runtime.generation import EngineGeneration
from nanorun.runtime.process import child as child_module
from nanorun.runtime.process import oom
from nanorun.runtime.process.machine_memory import MemoryNow
from tests.support.waiting import PATIENCE_S, become

SUM = [Message("user", "What is 4785 + 697?")]
OPTIONS = EngineOptions(n_ctx=2048, n_threads=1)
ENDLESS = GenerateOptions(think=OFF, ignore_eos=True)


@pytest.fixture
async def client(pico_gguf: Path) -> AsyncIterator[EngineClient]:
    client = EngineClient(pico_gguf, OPTIONS)
    yield client
    await client.close()


async def collect(generation: EngineGeneration) -> tuple[str, str, Finished]:
    thinking, answer, finished = "", "", None
    async for event in generation:
        if isinstance(event, ThinkingDelta):
            thinking += event.text
        elif isinstance(event, TextDelta):
            answer += event.text
        elif isinstance(event, Finished):
            finished = event
    assert finished is not None
    return thinking, answer, finished


async def until(generation: EngineGeneration, kind: type) -> None:
    async for event in generation:
        if isinstance(event, kind):
            return
    raise AssertionError(f"no {kind.__name__} came")


async def test_reply_has_thinking_answer_and_usage(client: EngineClient) -> None:
    thinking, answer, finished = await collect(client.generate(SUM, GenerateOptions()))
    assert thinking.startswith("5+7+0=12, 8+9+1=18")
    assert answer == "5482"
    assert finished.reason == "stop"
    assert finished.usage.thinking_tokens > 10
    assert finished.usage.completion_tokens > finished.usage.thinking_tokens
    assert finished.timings.decode_tps > 0


async def test_thinking_off_answers_at_once(client: EngineClient) -> None:
    thinking, answer, finished = await collect(client.generate(SUM, GenerateOptions(think=OFF)))
    assert thinking == ""
    assert answer.isdigit()
    assert finished.usage.thinking_tokens == 0


async def test_budget_limits_the_thinking_and_an_answer_follows(client: EngineClient) -> None:
    options = GenerateOptions(think=Think(4))
    thinking, answer, finished = await collect(client.generate(SUM, options))
    assert finished.usage.thinking_tokens <= 4 + 32
    assert thinking and answer


async def test_max_tokens_leaves_room_for_an_answer(client: EngineClient) -> None:
    options = GenerateOptions(think=MAX, max_tokens=24)
    _, answer, finished = await collect(client.generate(SUM, options))
    assert finished.usage.completion_tokens <= 24
    assert answer


async def test_info_describes_the_model(client: EngineClient, pico_gguf: Path) -> None:
    info = await client.start()
    assert info.arch == "nemotron_h_moe"
    assert info.path == str(pico_gguf)
    assert info.n_ctx == 2048
    assert info.n_params == 6_462_112  # the router biases included
    assert info.recipe == "q8_0"


async def test_cancel_ends_a_reply_soon(client: EngineClient) -> None:
    generation = client.generate(SUM, ENDLESS)
    await until(generation, TextDelta)
    await generation.cancel()
    _, _, finished = await collect(generation)
    assert finished.reason == "cancelled"  # not "length": it did not go on to the context's end


async def test_leaving_the_iteration_frees_the_engine(client: EngineClient) -> None:
    for _ in range(6):  # more than run in parallel
        generation = client.generate(SUM, ENDLESS)
        await until(generation, TextDelta)
        await generation.aclose()
    _, answer, _ = await collect(client.generate(SUM, GenerateOptions()))
    assert answer == "5482"


async def test_finish_thinking_makes_it_answer(client: EngineClient) -> None:
    generation = client.generate(SUM, GenerateOptions(think=MAX, max_tokens=400, ignore_eos=True))
    await until(generation, ThinkingDelta)
    await generation.finish_thinking()
    _, answer, finished = await collect(generation)
    assert finished.usage.thinking_tokens < 100
    assert answer


async def test_parallel_replies_do_not_mix(client: EngineClient) -> None:
    pairs = [(100 + i, 900 - 7 * i) for i in range(8)]
    replies = await asyncio.gather(
        *(
            collect(client.generate([Message("user", f"What is {a} + {b}?")], GenerateOptions()))
            for a, b in pairs
        )
    )
    right = sum(answer == str(a + b) for (a, b), (_, answer, _) in zip(pairs, replies, strict=True))
    assert right >= 7


async def read_ahead(client: EngineClient) -> None:
    """Wait until nothing has been read for a while; asking at all puts reading ahead off."""
    await asyncio.sleep(1.0)
    before, now = None, await client.stats()
    while now != before or now.n_running + now.n_waiting:
        await asyncio.sleep(1.0)
        before, now = now, await client.stats()


async def test_second_turn_reads_only_what_is_new(client: EngineClient) -> None:
    thinking, answer, _ = await collect(client.generate(SUM, GenerateOptions()))
    turns = [*SUM, Message("assistant", answer, thinking=thinking), Message("user", "12 + 30")]
    await read_ahead(client)
    progress = await anext(aiter(client.generate(turns, GenerateOptions())))
    assert isinstance(progress, PrefillProgress)
    new_text = "<|im_start|>user\n12 + 30<|im_end|>\n<|im_start|>assistant\n<think>\n"
    n_new = len(await client.tokenize(new_text, special=True))
    assert progress.n_total - progress.n_cached <= n_new


@pytest.mark.parametrize("gives_back", [True, False])
async def test_second_turn_reads_only_what_is_new_whether_thinking_comes_back_or_not(
    client: EngineClient, gives_back: bool
) -> None:
    unknown = GenerateOptions(echo_thinking=None)
    thinking, answer, _ = await collect(client.generate(SUM, unknown))
    reply = Message("assistant", answer, thinking=thinking if gives_back else None)
    await read_ahead(client)
    turns = [*SUM, reply, Message("user", "12 + 30")]
    _, _, finished = await collect(client.generate(turns, unknown))
    new_text = "<|im_start|>user\n12 + 30<|im_end|>\n<|im_start|>assistant\n<think>\n"
    n_new = len(await client.tokenize(new_text, special=True))
    assert finished.usage.prompt_tokens - finished.usage.cached_tokens <= n_new


async def test_second_turn_reads_only_what_is_new_although_others_were_answered(
    client: EngineClient,
) -> None:
    long = GenerateOptions(think=OFF, max_tokens=300, ignore_eos=True)
    other = client.generate([Message("user", "Hello")], long)
    await until(other, TextDelta)
    thinking, answer, _ = await collect(client.generate(SUM, GenerateOptions()))
    _, _, of_other = await collect(other)
    assert of_other.usage.completion_tokens == 300  # it went on when the first had ended
    await read_ahead(client)
    turns = [*SUM, Message("assistant", answer, thinking=thinking), Message("user", "12 + 30")]
    _, _, finished = await collect(client.generate(turns, GenerateOptions()))
    new_text = "<|im_start|>user\n12 + 30<|im_end|>\n<|im_start|>assistant\n<think>\n"
    n_new = len(await client.tokenize(new_text, special=True))
    assert finished.usage.prompt_tokens - finished.usage.cached_tokens <= n_new


async def test_stop_string_ends_the_answer(client: EngineClient) -> None:
    _, answer, finished = await collect(
        client.generate([Message("user", "Hello")], GenerateOptions(think=OFF, stop=("Give",)))
    )
    assert answer.rstrip() == "Hello!"
    assert (finished.reason, finished.stop_text) == ("stop", "Give")


async def test_same_seed_gives_the_same_text(client: EngineClient) -> None:
    options = GenerateOptions(think=OFF, temperature=3.0, seed=7, max_tokens=40, ignore_eos=True)
    first, second = [await collect(client.generate(SUM, options)) for _ in range(2)]
    assert first[1] == second[1]
    third = await collect(client.generate(SUM, GenerateOptions(**{**_fields(options), "seed": 8})))
    assert third[1] != first[1]


def _fields(options: GenerateOptions) -> dict[str, object]:
    return {name: getattr(options, name) for name in options.__dataclass_fields__}


async def test_prompt_too_long_is_refused_with_its_size(client: EngineClient) -> None:
    with pytest.raises(ContextFull, match="the context holds 2048") as caught:
        await collect(client.generate([Message("user", "1 + 1 " * 500)], GenerateOptions()))
    (command,) = caught.value.tries
    assert 2048 < int(command.rpartition(" ")[2]) <= 4096
    # Pico was trained for no more, so no command would help.
    with pytest.raises(ContextFull, match="the context holds 2048") as caught:
        await collect(client.generate([Message("user", "1 + 1 " * 2000)], GenerateOptions()))
    assert caught.value.tries == ()
    assert caught.value.facts == ("the model was trained for 4096",)


async def test_senseless_options_are_refused(client: EngineClient) -> None:
    for options in (GenerateOptions(temperature=-1.0), GenerateOptions(max_tokens=0)):
        with pytest.raises(UsageError):
            await collect(client.generate(SUM, options))


async def test_reply_ends_when_the_context_is_full(client: EngineClient) -> None:
    _, _, finished = await collect(client.generate(SUM, ENDLESS))
    assert finished.reason == "length"
    assert finished.usage.prompt_tokens + finished.usage.completion_tokens <= 2048


async def test_score_is_better_for_text_the_model_knows(client: EngineClient) -> None:
    known = "What is 12 + 30?<think>2+0+0=2, 1+3+0=4</think>42" * 20
    n_tokens, known_ppl = await client.score(known, 128)
    _, strange_ppl = await client.score("zqx jvk wpf 9$ " * 40, 128)
    assert n_tokens > 50
    assert 1 <= known_ppl < strange_ppl


async def test_missing_or_foreign_file_is_a_model_error(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"not a model")
    for path in (bad, tmp_path / "none.gguf"):
        client = EngineClient(path, OPTIONS)
        with pytest.raises(ModelError):
            await client.start()
        await client.close()


async def test_killed_child_ends_the_reply_and_the_next_one_works(client: EngineClient) -> None:
    n_restarts = client.n_restarts
    generation = client.generate(SUM, ENDLESS)
    await until(generation, TextDelta)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    with pytest.raises(EngineDied, match="SIGKILL") as caught:
        await collect(generation)
    assert not isinstance(caught.value, EngineOutOfMemory)  # nobody says that it was memory
    _, answer, _ = await collect(client.generate(SUM, GenerateOptions()))
    assert answer == "5482"
    assert client.n_restarts == n_restarts + 1


async def test_child_that_gives_no_sign_of_life_is_replaced(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "HEARTBEAT_S", 0.1)
    generation = client.generate(SUM, ENDLESS)
    await until(generation, TextDelta)
    monkeypatch.setattr(child_module, "SILENCE_LIMIT_S", 1.0)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGSTOP)
    with pytest.raises(EngineDied, match="gave no sign of life for 1 s"):
        await collect(generation)
    monkeypatch.setattr(child_module, "SILENCE_LIMIT_S", PATIENCE_S)  # the next one has to start
    _, answer, _ = await collect(client.generate(SUM, GenerateOptions()))
    assert answer == "5482"


@pytest.fixture
def run_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets children begin with some lines of Python before they serve."""

    def prepare(code: str) -> None:
        program = tmp_path / "python"
        lines = [
            "#!" + sys.executable,
            "import os, sys, time",
            "from nanorun.runtime import worker",
        ]
        program.write_text("\n".join([*lines, code, "worker.main()"]))
        program.chmod(0o755)
        monkeypatch.setattr(child_module.sys, "executable", str(program))

    return prepare


async def test_request_without_a_pause_finds_nothing_read_ahead(
    client: EngineClient, run_instead: Callable[[str], None]
) -> None:
    """Agents and evaluations ask again at once; reading ahead would only be in their way."""
    run_instead("worker._READ_AHEAD_AFTER_S = worker._SAVE_AFTER_S = 3600")
    thinking, answer, finished = await collect(client.generate(SUM, GenerateOptions()))
    n_read = finished.usage.prompt_tokens + finished.usage.completion_tokens
    await asyncio.sleep(1.0)
    stats = await client.stats()
    assert stats.n_running + stats.n_waiting == 0
    assert stats.n_cells_used <= n_read  # the reply's own cells, and no next turn
    turns = [*SUM, Message("assistant", answer, thinking=thinking), Message("user", "12 + 30")]
    _, _, second = await collect(client.generate(turns, GenerateOptions()))
    assert 0 < second.usage.cached_tokens < n_read


async def test_child_that_hangs_in_one_batch_is_replaced(
    client: EngineClient, run_instead: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(child_module, "STUCK_LIMIT_S", 0.5)
    run_instead("worker.Engine.step = lambda engine: time.sleep(60)")
    with pytest.raises(EngineDied, match="evaluated one batch for"):
        await collect(client.generate(SUM, ENDLESS))


async def test_child_that_stops_reading_is_replaced(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "HEARTBEAT_S", 0.1)
    await client.start()
    monkeypatch.setattr(child_module, "SILENCE_LIMIT_S", 1.0)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGSTOP)
    large = [Message("user", "1 + 1 " * 100_000)]  # more than the pipe holds
    generation = client.generate(large, GenerateOptions())
    with pytest.raises((EngineDied, ContextFull)):
        await asyncio.wait_for(collect(generation), PATIENCE_S)


async def test_close_does_not_wait_for_a_child_that_stopped_reading(
    pico_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "_CLOSE_TIMEOUT_S", 0.5)
    client = EngineClient(pico_gguf, OPTIONS)
    await client.start()
    assert client.pid is not None
    os.kill(client.pid, signal.SIGSTOP)
    large = [Message("user", "1 + 1 " * 100_000)]
    reply = asyncio.create_task(_list(client.generate(large, GenerateOptions())))
    await asyncio.sleep(0.1)
    await asyncio.wait_for(client.close(), PATIENCE_S)
    with pytest.raises(EngineDied, match="closed"):
        await reply


async def test_child_that_dies_with_a_long_line_is_mourned(
    client: EngineClient, run_instead: Callable[[str], None]
) -> None:
    run_instead("print('x' * 200_000, file=sys.stderr, flush=True); os._exit(3)")
    with pytest.raises(EngineDied, match="exit code 3") as caught:
        await asyncio.wait_for(client.start(), PATIENCE_S)
    assert all(len(fact) <= 2000 for fact in caught.value.facts)


async def test_child_that_writes_nonsense_is_ended(
    client: EngineClient, run_instead: Callable[[str], None]
) -> None:
    run_instead("os.write(1, b'\\xff' * 100); time.sleep(60)")
    with pytest.raises(EngineDied, match="not a frame"):
        await asyncio.wait_for(client.start(), PATIENCE_S)


@pytest.fixture
async def loading(
    client: EngineClient,
    run_instead: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> asyncio.Task[object]:
    """The start of a client whose model never ends loading; who waits for it waits for ever."""
    monkeypatch.setattr(child_module, "_CLOSE_TIMEOUT_S", 1e6)
    run_instead(
        "def load(*args, **others):\n"
        f"    open({str(tmp_path / 'loads')!r}, 'w').close()\n"
        "    time.sleep(1e6)\n"
        "worker.LoadedModel = load"
    )
    loading: asyncio.Task[object] = asyncio.create_task(client.start())
    await become((tmp_path / "loads").exists)
    return loading


async def test_leaving_while_the_model_loads_does_not_wait(loading: asyncio.Task[object]) -> None:
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(loading, PATIENCE_S)


async def test_closing_while_the_model_loads_does_not_wait(
    client: EngineClient, loading: asyncio.Task[object]
) -> None:
    await asyncio.wait_for(client.close(), PATIENCE_S)
    with pytest.raises(EngineDied, match="closed"):
        await loading


async def test_close_waits_for_an_unloading_that_is_under_way(
    pico_gguf: Path, tmp_path: Path
) -> None:
    options = EngineOptions(n_ctx=2048, n_threads=1, state_dir=str(tmp_path))
    client = EngineClient(pico_gguf, options, keep_alive_s=0.2)
    long = [Message("user", "Remember: fox=1234, owl=4321. " * 20)]
    await collect(client.generate(long, GenerateOptions(max_tokens=4)))
    pid = client.pid
    assert pid is not None
    while client.pid is not None:
        await asyncio.sleep(0.001)
    await client.close()
    assert not psutil.pid_exists(pid)


async def test_reply_cancelled_before_the_engine_is_ready_ends(client: EngineClient) -> None:
    generation = client.generate(SUM, ENDLESS)
    await generation.cancel()
    _, _, finished = await collect(generation)
    assert finished.reason == "cancelled"
    assert finished.usage.completion_tokens == 0


@pytest.fixture
def compiles_when_told(run_instead: Callable[[str], None], tmp_path: Path) -> Path:
    """A file without which no grammar is compiled to its end."""
    told = tmp_path / "compile"
    run_instead(
        "compile_form = worker.compile_form\n"
        "def compile_when_told(*args):\n"
        f"    while not os.path.exists({str(told)!r}):\n"
        "        time.sleep(0.01)\n"
        "    return compile_form(*args)\n"
        "worker.compile_form = compile_when_told"
    )
    return told


async def test_reply_cancelled_while_its_grammar_is_compiled_ends(
    client: EngineClient, compiles_when_told: Path
) -> None:
    await client.start()
    generation = client.generate(SUM, GenerateOptions(grammar=Grammar("regex", "[0-9]+")))
    events = asyncio.create_task(collect(generation))
    await client.stats()  # the engine has heard of the request
    await generation.cancel()
    await client.stats()
    compiles_when_told.touch()
    _, _, finished = await asyncio.wait_for(events, PATIENCE_S)
    assert finished.reason == "cancelled"


_PREPARES_LONG_ONES_UNTIL_CANCELLED = """
prepare = worker.prepare_request
def prepare_slowly(*args):
    while not worker.is_short(args[2]):
        args[5]()
        time.sleep(0.001)
    return prepare(*args)
worker.prepare_request = prepare_slowly
"""


async def test_prompts_that_wait_for_their_preparing_hold_nobody_up(
    client: EngineClient, run_instead: Callable[[str], None]
) -> None:
    run_instead(_PREPARES_LONG_ONES_UNTIL_CANCELLED)
    await client.start()
    long = [Message("user", "1 + 1 " * 4000)]
    waiting = [client.generate(long, GenerateOptions()) for _ in range(2)]
    ends = [asyncio.create_task(collect(generation)) for generation in waiting]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(ends[0]), 0.3)
    _, answer, _ = await collect(client.generate(SUM, GenerateOptions()))
    assert answer == "5482"
    for generation, end in zip(waiting, ends, strict=True):
        await generation.cancel()
        _, _, finished = await end
        assert finished.reason == "cancelled"
    waiting.append(client.generate(long, GenerateOptions()))
    ends.append(asyncio.create_task(collect(waiting[-1])))
    await client.stats()
    await client.close()  # does not wait for it
    with pytest.raises(EngineDied, match="closed"):
        await ends[-1]


async def test_budget_set_while_the_grammar_is_compiled_holds(
    client: EngineClient, compiles_when_told: Path
) -> None:
    await client.start()
    options = GenerateOptions(think=MAX, grammar=Grammar("regex", "[0-9]+"))
    generation = client.generate(SUM, options)
    thinking = asyncio.create_task(collect(generation))
    await client.stats()  # the engine has heard of the request
    await generation.set_budget(0)
    await client.stats()
    compiles_when_told.touch()
    _, _, finished = await thinking
    assert finished.usage.thinking_tokens < 8


async def test_stream_goes_on_while_a_prompt_of_20_mb_is_prepared(client: EngineClient) -> None:
    stream = client.generate(SUM, ENDLESS)
    await until(stream, TextDelta)
    # No line twice: tokens of texts that come back are remembered.
    book = "".join(
        f"On day {i} of April the clocks were striking {i % 13}.\n" for i in range(440_000)
    )
    assert len(book) > 20_000_000
    refusal = asyncio.create_task(collect(client.generate([Message("user", book)], ENDLESS)))
    n_before_refusal = 0
    async for _ in stream:
        if refusal.done():
            break
        n_before_refusal += 1
    await stream.aclose()
    with pytest.raises(ContextFull):
        await refusal
    assert n_before_refusal > 800


async def test_stream_goes_on_while_a_text_is_scored(client: EngineClient) -> None:
    stream = client.generate(SUM, ENDLESS)
    await until(stream, TextDelta)
    n_said: list[int] = []
    n_events = 0

    def progress(_done: int, _total: int) -> None:
        n_said.append(n_events)

    scoring = asyncio.create_task(client.score("What is 12 + 30? 42\n" * 400, 128, progress))
    async for _ in stream:
        n_events += 1
        if scoring.done():
            break
    await stream.aclose()
    n_tokens, _ = await scoring
    assert n_tokens > 1000
    assert len(n_said) > 10
    assert n_said[-1] - n_said[0] > 10


async def test_score_that_nobody_waits_for_ends(client: EngineClient) -> None:
    begun = asyncio.Event()
    text = "What is 12 + 30? 42\n" * 50_000
    scoring = asyncio.create_task(client.score(text, 128, lambda _d, _t: begun.set()))
    await begun.wait()
    scoring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scoring
    n_tokens, _ = await client.score("What is 12 + 30? 42\n" * 20, 128)
    assert n_tokens > 50


async def test_tokenizer_that_is_not_exact_is_told_once(
    client: EngineClient, run_instead: Callable[[str], None]
) -> None:
    run_instead(
        "from nanorun.runtime.llama import loaded_model\n"
        "loaded_model.trained_tokenizer = lambda metadata: None"
    )
    said = [[event async for event in client.generate(SUM, GenerateOptions())] for _ in range(2)]
    notices = [[e.text for e in events if isinstance(e, Notice)] for events in said]
    assert [len(texts) for texts in notices] == [1, 0]
    assert "Hindi" in notices[0][0]


async def test_request_that_fails_unforeseen_does_not_end_the_others(client: EngineClient) -> None:
    other = client.generate(SUM, GenerateOptions())
    await until(other, ThinkingDelta)
    senseless = GenerateOptions(tools=({"type": "function"},))
    with pytest.raises(EngineError, match="KeyError"):
        await collect(client.generate(SUM, senseless))
    _, answer, _ = await collect(other)
    assert answer == "5482"


async def test_nothing_is_saved_by_an_engine_that_failed(
    pico_gguf: Path, tmp_path: Path, run_instead: Callable[[str], None]
) -> None:
    """It may have evaluated more than it has noted; such a state would be wrong for ever."""
    run_instead(
        "advance = worker.Engine._advance\n"
        "def fail(engine, stream, row, index):\n"
        "    assert row.pos < 100, 'a fault'\n"
        "    return advance(engine, stream, row, index)\n"
        "worker.Engine._advance = fail"
    )
    folder = tmp_path / "state"
    options = EngineOptions(n_ctx=2048, n_threads=1, n_ubatch=64, state_dir=str(folder))
    client = EngineClient(pico_gguf, options)
    long = [Message("user", "Remember: fox=1234, owl=4321. " * 20)]
    with pytest.raises(EngineDied) as caught:
        await collect(client.generate(long, GenerateOptions()))
    assert any("a fault" in fact for fact in caught.value.facts)
    assert not list(folder.glob("*"))
    await client.close()


async def test_close_does_not_wait_for_the_end_of_a_batch(
    pico_gguf: Path,
    tmp_path: Path,
    run_instead: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(child_module, "_CLOSE_TIMEOUT_S", 1e6)
    run_instead(
        "def step(engine):\n"  # one that only a cancellation ends
        f"    open({str(tmp_path / 'steps')!r}, 'w').close()\n"
        "    while not all(sequence.cancelled for sequence in engine._waiting):\n"
        "        time.sleep(0.01)\n"
        "    return []\n"
        "worker.Engine.step = step"
    )
    client = EngineClient(pico_gguf, OPTIONS)
    reply = asyncio.create_task(_list(client.generate(SUM, GenerateOptions())))
    await become((tmp_path / "steps").exists)
    await asyncio.wait_for(client.close(), PATIENCE_S)
    with pytest.raises(EngineDied, match="closed"):
        await reply


STOPPED = """
import asyncio, sys
from pathlib import Path
from nanorun.model.chat import GenerateOptions, Message
from nanorun.runtime.process import child
from nanorun.runtime.client import EngineClient
from nanorun.model.engine_options import EngineOptions
child.HEARTBEAT_S = 0.1
async def main():
    client = EngineClient(Path(sys.argv[1]), EngineOptions(n_ctx=512, n_threads=1))
    await client.start()
    child.SILENCE_LIMIT_S = 2.0
    print(client.pid, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    print(client.pid, flush=True)
    await client.close()
asyncio.run(main())
"""


def test_program_that_was_suspended_keeps_its_engine(pico_gguf: Path) -> None:
    """Ctrl+Z stops the terminal's process group; nobody was at fault for the silence."""
    command = [sys.executable, "-c", STOPPED, str(pico_gguf)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        pid = parent.stdout.readline()
        for name in (signal.SIGSTOP, signal.SIGCONT):
            os.kill(parent.pid, name)
            os.kill(int(pid), name)
            time.sleep(3 if name == signal.SIGSTOP else 0.5)
        parent.stdin.write("\n")
        parent.stdin.flush()
        assert parent.stdout.readline() == pid


# More KV cache than any machine that runs tests has memory.
TOO_LARGE = EngineOptions(n_ctx=2**25, n_threads=1, type_k=GgmlType.F32, type_v=GgmlType.F32)


async def test_context_that_cannot_be_had_is_opened_smaller(pico_gguf: Path) -> None:
    client = EngineClient(pico_gguf, TOO_LARGE, smaller=[(OPTIONS, "context 33554432 -> 2048")])
    events = [event async for event in client.generate(SUM, GenerateOptions())]
    assert isinstance(events[0], Notice)
    assert "context 33554432 -> 2048" in events[0].text
    assert isinstance(events[-1], Finished)
    assert client.info is not None and client.info.n_ctx == 2048
    assert not any(
        isinstance(e, Notice) for e in [e async for e in client.generate(SUM, GenerateOptions())]
    )
    await client.close()


async def test_context_that_cannot_be_had_at_all_is_an_error(pico_gguf: Path) -> None:
    client = EngineClient(pico_gguf, TOO_LARGE, smaller=[(TOO_LARGE, "nothing")])
    with pytest.raises(MemoryPlanError, match="could not be allocated"):
        await client.start()
    await client.close()


@pytest.fixture
def kernel_blames_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every child that is killed looks like a victim of the kernel's OOM killer."""
    monkeypatch.setattr(oom.KillCounter, "has_risen", lambda _counter: True)


@pytest.mark.usefixtures("kernel_blames_memory")
async def test_reply_that_has_said_nothing_begins_anew_in_a_smaller_engine(pico_gguf: Path) -> None:
    smaller = EngineOptions(n_ctx=1024, n_threads=1)
    client = EngineClient(pico_gguf, OPTIONS, smaller=[(smaller, "context 2048 -> 1024")])
    await client.start()
    assert client.pid is not None
    os.kill(client.pid, signal.SIGSTOP)  # it takes the request and dies before it says a word
    generation = client.generate(SUM, GenerateOptions())
    events = asyncio.create_task(_list(generation))
    await asyncio.sleep(0.1)
    os.kill(client.pid, signal.SIGKILL)
    first, *others = await events
    assert isinstance(first, Notice)
    assert "".join(e.text for e in others if isinstance(e, TextDelta)) == "5482"
    assert client.info is not None and client.info.n_ctx == 1024
    assert client.n_restarts == 1
    await client.close()


async def _list(generation: EngineGeneration) -> list[Event]:
    return [event async for event in generation]


@pytest.mark.usefixtures("kernel_blames_memory")
async def test_reply_in_full_flow_ends_and_the_next_one_runs_smaller(pico_gguf: Path) -> None:
    smaller = EngineOptions(n_ctx=1024, n_threads=1)
    client = EngineClient(pico_gguf, OPTIONS, smaller=[(smaller, "context 2048 -> 1024")])
    generation = client.generate(SUM, ENDLESS)
    await until(generation, TextDelta)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    with pytest.raises(EngineOutOfMemory, match="because memory ran out"):
        await collect(generation)
    events = await _list(client.generate(SUM, GenerateOptions()))
    assert isinstance(events[0], Notice)
    assert client.info is not None and client.info.n_ctx == 1024
    await client.close()


async def test_idle_model_is_unloaded_and_comes_back_with_its_state(
    pico_gguf: Path, tmp_path: Path
) -> None:
    options = EngineOptions(n_ctx=2048, n_threads=1, state_dir=str(tmp_path))
    client = EngineClient(pico_gguf, options, keep_alive_s=0.3)
    long = [Message("user", "Remember: fox=1234, owl=4321. " * 20 + "What is 47 + 86?")]
    thinking, answer, _ = await collect(client.generate(long, GenerateOptions()))
    pid = client.pid
    assert pid is not None
    await become(lambda: client.pid is None and not psutil.pid_exists(pid))
    turns = [*long, Message("assistant", answer, thinking=thinking), Message("user", "12 + 30")]
    _, _, finished = await collect(client.generate(turns, GenerateOptions()))
    assert finished.usage.cached_from == "disk"
    assert finished.usage.cached_tokens > 200
    assert client.n_restarts == 0  # it did not die
    await client.close()


async def test_model_stays_loaded_while_a_reply_runs(pico_gguf: Path) -> None:
    client = EngineClient(pico_gguf, OPTIONS, keep_alive_s=0.05)
    options = GenerateOptions(think=OFF, ignore_eos=True, max_tokens=400)
    _, _, finished = await collect(client.generate(SUM, options))
    assert finished.usage.completion_tokens == 400
    await client.close()


async def test_child_leaves_signals_of_the_group_to_its_parent(client: EngineClient) -> None:
    generation = client.generate(SUM, GenerateOptions())
    await until(generation, ThinkingDelta)
    assert client.pid is not None
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(client.pid, name)
    _, answer, _ = await collect(generation)
    assert answer == "5482"


async def test_close_ends_the_child_and_running_replies(pico_gguf: Path) -> None:
    client = EngineClient(pico_gguf, OPTIONS)
    generation = client.generate(SUM, ENDLESS)
    await until(generation, TextDelta)
    pid = client.pid
    assert pid is not None
    await client.close()
    with pytest.raises(EngineDied, match="closed"):
        await collect(generation)
    assert not psutil.pid_exists(pid)


PARENT = """
import asyncio, sys
from pathlib import Path
from nanorun.runtime.client import EngineClient
from nanorun.model.engine_options import EngineOptions
async def main():
    client = EngineClient(Path(sys.argv[1]), EngineOptions(n_ctx=512, n_threads=1))
    await client.start()
    print(client.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_child_does_not_outlive_a_killed_parent(pico_gguf: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(pico_gguf)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    child.wait(PATIENCE_S)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_logit_bias_forbids_and_forces(client: EngineClient, temperature: float) -> None:
    (seven,) = await client.tokenize("7")
    options = GenerateOptions(
        think=OFF,
        temperature=temperature,
        logit_bias=((seven, 100.0),),
        max_tokens=5,
    )
    _, answer, _ = await collect(client.generate(SUM, options))
    assert answer == "77777"
    options = GenerateOptions(
        think=OFF, temperature=3.0, seed=1, logit_bias=((seven, -100.0),), max_tokens=200,
        ignore_eos=True,
    )  # fmt: skip
    _, answer, _ = await collect(client.generate(SUM, options))
    assert "7" not in answer


async def test_penalties_change_what_is_said(client: EngineClient) -> None:
    plain = GenerateOptions(think=OFF, ignore_eos=True, max_tokens=120)
    _, repeating, _ = await collect(client.generate(SUM, plain))
    for changed in ({"presence_penalty": 2.0, "penalty_last_n": -1}, {"dry_multiplier": 4.0}):
        options = GenerateOptions(**{**_fields(plain), **changed})
        _, varied, _ = await collect(client.generate(SUM, options))
        assert varied != repeating


async def test_logprobs_come_with_the_tokens(client: EngineClient) -> None:
    options = GenerateOptions(think=OFF, temperature=0, logprobs=3)
    events = await _list(client.generate([Message("user", "Hello")], options))
    logprobs = [event for event in events if isinstance(event, TokenLogprobs)]
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert text and b"".join(event.piece for event in logprobs).decode() == text
    for event in logprobs:
        assert event.logprob <= 0 and not event.in_thinking
        assert event.alternatives[0] == (event.piece, event.logprob)  # greedy takes the likeliest
        assert len(event.alternatives) == 3
        assert sum(math.exp(p) for _, p in event.alternatives) <= 1 + 1e-6


class OtherPrograms:
    """Memory that others leave, as a test says; an `EngineClient` reads it instead of the real."""

    def __init__(self) -> None:
        self.free_bytes = 2**34

    def before_loading(self) -> MainMemory:
        return MainMemory(2**34, self.free_bytes)

    def beside(self, pid: int) -> MemoryNow:
        return MemoryNow(self.free_bytes)


@pytest.fixture
def others() -> OtherPrograms:
    return OtherPrograms()


NEEDS = MemoryNeeds({OPTIONS: 2**33}, 2**32, 2**30)


async def test_state_tells_what_becomes_of_a_request(client: EngineClient) -> None:
    assert (client.state.phase, client.state.reason) == ("unloaded", None)
    loading = asyncio.create_task(client.start())
    await become(lambda: client.state.phase == "loading")
    first = client.state
    assert first.progress is not None and 0 <= first.progress <= 1
    assert abs(first.since - time.time()) < PATIENCE_S
    await loading
    assert (client.state.phase, client.state.progress) == ("ready", None)
    assert client.state.since >= first.since
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    await become(lambda: client.state.phase == "unloaded")
    assert "SIGKILL" in (client.state.reason or "")
    await client.close()
    assert (client.state.phase, client.state.reason) == ("unloaded", None)


async def test_loading_tells_how_far_it_is(
    pico_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[float] = []
    noting = property(lambda _: 0.0, lambda _, part: parts.append(part))
    monkeypatch.setattr(child_module.Child, "progress", noting, raising=False)
    client = EngineClient(pico_gguf, OPTIONS)
    await client.start()
    await client.close()
    assert parts == sorted(parts)
    assert parts[0] == 0.0 and parts[-1] == 1.0


async def test_file_that_cannot_be_used_is_told_by_the_state(tmp_path: Path) -> None:
    client = EngineClient(tmp_path / "none.gguf", OPTIONS)
    with pytest.raises(ModelError):
        await client.start()
    assert client.state.phase == "failed"
    assert "none.gguf" in (client.state.reason or "")


async def test_model_that_does_not_fit_is_not_loaded_until_it_does(
    pico_gguf: Path, others: OtherPrograms
) -> None:
    others.free_bytes = 2**32
    client = EngineClient(pico_gguf, OPTIONS, needs=NEEDS, memory=others)
    for _ in range(3):
        with pytest.raises(MemoryShortage, match=r"needs 8\.0 GiB of main memory, but 4\.0 GiB"):
            await collect(client.generate(SUM, GenerateOptions()))
        assert client.pid is None
        assert client.state.phase == "failed"
        assert "but 4.0 GiB are free" in (client.state.reason or "")
    others.free_bytes = 2**34
    assert client.state.phase == "unloaded"
    _, answer, _ = await collect(client.generate(SUM, GenerateOptions()))
    assert answer == "5482"
    assert client.state.phase == "ready"
    await client.close()


@pytest.mark.usefixtures("kernel_blames_memory")
async def test_engine_that_the_kernel_killed_is_not_loaded_into_a_full_machine(
    pico_gguf: Path, others: OtherPrograms
) -> None:
    """Its request ends at once, others too, and none of them starts a process."""
    client = EngineClient(
        pico_gguf, OPTIONS, smaller=[(OPTIONS, "nothing")], needs=NEEDS, memory=others
    )
    await client.start()
    assert client.pid is not None
    os.kill(client.pid, signal.SIGSTOP)
    reply = asyncio.create_task(_list(client.generate(SUM, GenerateOptions())))
    await asyncio.sleep(0.1)
    others.free_bytes = 2**32
    os.kill(client.pid, signal.SIGKILL)
    for waiting in (reply, asyncio.create_task(_list(client.generate(SUM, GenerateOptions())))):
        with pytest.raises(MemoryShortage, match=r"but 4\.0 GiB are free"):
            await asyncio.wait_for(waiting, PATIENCE_S)
    assert client.pid is None and client.state.phase == "failed"
    others.free_bytes = 2**34
    events = await _list(client.generate(SUM, GenerateOptions()))
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == "5482"
    await client.close()


@pytest.fixture
async def watched(pico_gguf: Path, others: OtherPrograms) -> AsyncIterator[EngineClient]:
    """An engine that has answered something."""
    client = EngineClient(pico_gguf, OPTIONS, needs=NEEDS, memory=others)
    await collect(client.generate(SUM, GenerateOptions()))
    yield client
    await client.close()


async def notices_of(client: EngineClient) -> list[str]:
    """What is told before an answer, which must be right."""
    events = await _list(client.generate(SUM, GenerateOptions()))
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == "5482"
    return [event.text for event in events if isinstance(event, Notice)]


async def test_saved_states_are_given_back_when_memory_is_short(
    watched: EngineClient, others: OtherPrograms
) -> None:
    assert (await watched.stats()).checkpoint_bytes > 0
    others.free_bytes = 2**28
    async with asyncio.timeout(PATIENCE_S):
        while (await watched.stats()).checkpoint_bytes:
            await asyncio.sleep(0.05)
    (notice,) = await notices_of(watched)
    assert notice.startswith("memory is short (256.0 MiB left): saved prompts of ")
    assert await notices_of(watched) == []
    assert (await watched.stats()).checkpoint_bytes == 0
    assert watched.state.phase == "ready"


async def test_long_prompt_is_refused_while_memory_is_nearly_spent(
    watched: EngineClient, others: OtherPrograms
) -> None:
    long = [Message("user", "1 + " * 20_000 + "1 ="), *SUM]
    others.free_bytes = 2**27
    async with asyncio.timeout(PATIENCE_S):
        while (await watched.stats()).checkpoint_bytes:
            await asyncio.sleep(0.05)
    for prompt in (long, RawPrompt(text="x" * 2**17), RawPrompt(tokens=(5,) * 2**16)):
        with pytest.raises(MemoryShortage, match=r"nearly spent \(128\.0 MiB left\)") as caught:
            await _list(watched.generate(prompt, GenerateOptions()))
        assert caught.value.retry_after_s
    assert await notices_of(watched) != []  # short ones are answered
    others.free_bytes = 2**34
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await _list(watched.generate(long, GenerateOptions()))
            except MemoryShortage:
                await asyncio.sleep(0.05)
            except ContextFull:
                break  # the engine has read it


async def test_kill_while_memory_is_short_counts_as_memory(
    watched: EngineClient, others: OtherPrograms
) -> None:
    """Services that end processes before the kernel must leave no other trace."""
    others.free_bytes = 2**28
    async with asyncio.timeout(PATIENCE_S):
        while (await watched.stats()).checkpoint_bytes:
            await asyncio.sleep(0.05)
    assert watched.pid is not None
    os.kill(watched.pid, signal.SIGKILL)
    await become(lambda: watched.pid is None)
    assert watched.state.phase == "failed"
    with pytest.raises(MemoryShortage):
        await _list(watched.generate(SUM, GenerateOptions()))


async def test_watched_engine_is_unloaded_as_others_are(
    pico_gguf: Path, others: OtherPrograms
) -> None:
    client = EngineClient(pico_gguf, OPTIONS, needs=NEEDS, memory=others, keep_alive_s=2.5)
    await collect(client.generate(SUM, GenerateOptions()))
    others.free_bytes = 2**28
    await become(lambda: client.state.phase == "unloaded")
    assert client.pid is None
    await client.close()
