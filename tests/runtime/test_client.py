"""The engine's child process: replies, control, and what happens when it dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from nanorun.errors import ContextFull, EngineDied, ModelError, UsageError
from nanorun.model.chat import (
    Finished,
    GenerateOptions,
    Message,
    PrefillProgress,
    TextDelta,
    ThinkingDelta,
)
from nanorun.runtime.client import EngineClient, EngineGeneration
from nanorun.runtime.options import EngineOptions

SUM = [Message("user", "What is 4785 + 697?")]
OPTIONS = EngineOptions(n_ctx=2048, n_threads=1)
ENDLESS = GenerateOptions(think="off", ignore_eos=True)


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
    thinking, answer, finished = await collect(client.generate(SUM, GenerateOptions(think="off")))
    assert thinking == ""
    assert answer.isdigit()
    assert finished.usage.thinking_tokens == 0


async def test_budget_limits_the_thinking_and_an_answer_follows(client: EngineClient) -> None:
    options = GenerateOptions(think=4)
    thinking, answer, finished = await collect(client.generate(SUM, options))
    assert finished.usage.thinking_tokens <= 4 + 32
    assert thinking and answer


async def test_max_tokens_leaves_room_for_an_answer(client: EngineClient) -> None:
    options = GenerateOptions(think="max", max_tokens=24)
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
    started = time.monotonic()
    _, _, finished = await collect(generation)
    assert finished.reason == "cancelled"
    assert time.monotonic() - started < 2


async def test_leaving_the_iteration_frees_the_engine(client: EngineClient) -> None:
    for _ in range(6):  # more than run in parallel
        generation = client.generate(SUM, ENDLESS)
        await until(generation, TextDelta)
        await generation.aclose()
    _, answer, _ = await collect(client.generate(SUM, GenerateOptions()))
    assert answer == "5482"


async def test_finish_thinking_makes_it_answer(client: EngineClient) -> None:
    generation = client.generate(SUM, GenerateOptions(think="max", max_tokens=400, ignore_eos=True))
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


async def test_second_turn_reads_only_what_is_new(client: EngineClient) -> None:
    thinking, answer, _ = await collect(client.generate(SUM, GenerateOptions()))
    turns = [*SUM, Message("assistant", answer, thinking=thinking), Message("user", "12 + 30")]
    await client.tokenize("a moment for reading ahead")
    await asyncio.sleep(0.2)
    progress = await anext(aiter(client.generate(turns, GenerateOptions())))
    assert isinstance(progress, PrefillProgress)
    new_text = "<|im_start|>user\n12 + 30<|im_end|>\n<|im_start|>assistant\n<think>\n"
    n_new = len(await client.tokenize(new_text, special=True))
    assert progress.n_total - progress.n_cached <= n_new


async def test_stop_string_ends_the_answer(client: EngineClient) -> None:
    _, answer, finished = await collect(
        client.generate([Message("user", "Hello")], GenerateOptions(think="off", stop=("Give",)))
    )
    assert answer.rstrip() == "Hello!"
    assert (finished.reason, finished.stop_text) == ("stop", "Give")


async def test_same_seed_gives_the_same_text(client: EngineClient) -> None:
    options = GenerateOptions(think="off", temperature=3.0, seed=7, max_tokens=40, ignore_eos=True)
    first, second = [await collect(client.generate(SUM, options)) for _ in range(2)]
    assert first[1] == second[1]
    third = await collect(client.generate(SUM, GenerateOptions(**{**_fields(options), "seed": 8})))
    assert third[1] != first[1]


def _fields(options: GenerateOptions) -> dict[str, object]:
    return {name: getattr(options, name) for name in options.__dataclass_fields__}


async def test_prompt_too_long_is_refused_with_its_size(client: EngineClient) -> None:
    with pytest.raises(ContextFull, match="the context holds 2048"):
        await collect(client.generate([Message("user", "1 + 1 " * 2000)], GenerateOptions()))


async def test_senseless_options_are_refused(client: EngineClient) -> None:
    for options in (
        GenerateOptions(think="hard"),
        GenerateOptions(temperature=-1.0),
        GenerateOptions(max_tokens=0),
    ):
        with pytest.raises(UsageError):
            await collect(client.generate(SUM, options))


async def test_reply_ends_when_the_context_is_full(client: EngineClient) -> None:
    _, _, finished = await collect(client.generate(SUM, ENDLESS))
    assert finished.reason == "length"
    assert finished.usage.prompt_tokens + finished.usage.completion_tokens <= 2048


async def test_score_is_better_for_text_the_model_knows(client: EngineClient) -> None:
    known = "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n" * 20
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
    generation = client.generate(SUM, ENDLESS)
    await until(generation, TextDelta)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    with pytest.raises(EngineDied, match="SIGKILL"):
        await collect(generation)
    _, answer, _ = await collect(client.generate(SUM, GenerateOptions()))
    assert answer == "5482"


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
from nanorun.runtime.options import EngineOptions
async def main():
    client = EngineClient(Path(sys.argv[1]), EngineOptions(n_ctx=512, n_threads=1))
    await client.start()
    print(client.pid, flush=True)
    await asyncio.sleep(60)
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
    child.wait(timeout=5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_logit_bias_forbids_and_forces(client: EngineClient, temperature: float) -> None:
    (seven,) = await client.tokenize("7")
    options = GenerateOptions(
        think="off", temperature=temperature, logit_bias=((seven, 100.0),), max_tokens=5
    )
    _, answer, _ = await collect(client.generate(SUM, options))
    assert answer == "77777"
    options = GenerateOptions(
        think="off", temperature=3.0, seed=1, logit_bias=((seven, -100.0),), max_tokens=200,
        ignore_eos=True,
    )  # fmt: skip
    _, answer, _ = await collect(client.generate(SUM, options))
    assert "7" not in answer
