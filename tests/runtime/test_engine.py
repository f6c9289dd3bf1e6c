"""Who runs, who waits, who gives way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nanorun.model.chat import Finished
from tests.runtime.harness import SMALL, Rig


def prompt(n_tokens: int, salt: int = 0) -> list[int]:
    return [32 + (i * 7 + salt * 131) % 800 for i in range(n_tokens)]


@pytest.fixture
def one_at_a_time(pico_f32_gguf: Path) -> Iterator[Rig]:
    rig = Rig(pico_f32_gguf, replace(SMALL, n_parallel=1))
    yield rig
    rig.close()


def steps_until(rig: Rig, request_id: str, n_most: int = 200) -> int:
    for n in range(n_most):
        if request_id in rig.finished:
            return n
        rig.step()
    raise AssertionError(f"{request_id} did not finish in {n_most} steps")


def test_interactive_request_does_not_wait_for_background_work(one_at_a_time: Rig) -> None:
    rig = one_at_a_time
    slow = rig.submit(prompt(100), n_tokens=60, background=True)
    for _ in range(10):
        rig.step()
    quick = rig.submit(prompt(30, salt=1), n_tokens=3)
    assert steps_until(rig, quick) <= 5
    assert slow not in rig.finished
    rig.run()
    finished = rig.finished[slow]
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.usage.completion_tokens) == ("length", 60)
    rig.check(slow)


def test_background_request_waits_for_an_interactive_one(one_at_a_time: Rig) -> None:
    rig = one_at_a_time
    first = rig.submit(prompt(30), n_tokens=5)
    background = rig.submit(prompt(30, salt=1), n_tokens=3, background=True)
    later = rig.submit(prompt(30, salt=2), n_tokens=3)
    rig.run()
    assert list(rig.finished) == [first, later, background]


def test_streams_that_outgrow_the_context_take_turns(pico_f32_gguf: Path) -> None:
    rig = Rig(pico_f32_gguf, replace(SMALL, n_ctx=256, archive_bytes=16 * 2**20))
    ids = [rig.submit(prompt(60, salt), n_tokens=120) for salt in range(3)]
    rig.run()
    for request_id in ids:
        finished = rig.finished[request_id]
        assert isinstance(finished, Finished)
        assert finished.usage.completion_tokens == 120
        assert len(rig.tokens[request_id]) == 120
        rig.check(request_id)
    rig.close()


def test_a_reply_alone_ends_where_the_context_does(pico_f32_gguf: Path) -> None:
    rig = Rig(pico_f32_gguf, replace(SMALL, n_ctx=256))
    tokens, finished = rig.ask(prompt(200), n_tokens=500)
    assert finished.reason == "length"
    assert len(tokens) == 56
    rig.close()


def test_cancelling_a_suspended_request_ends_it(one_at_a_time: Rig) -> None:
    rig = one_at_a_time
    slow = rig.submit(prompt(50), n_tokens=60, background=True)
    for _ in range(5):
        rig.step()
    rig.submit(prompt(30, salt=1), n_tokens=30)
    rig.step()
    rig.engine.cancel(slow)
    rig.step()
    finished = rig.finished[slow]
    assert isinstance(finished, Finished)
    assert finished.reason == "cancelled"
    assert finished.usage.completion_tokens == len(rig.tokens[slow]) > 0
    rig.run()


def test_nothing_is_left_when_all_is_done(pico_f32_gguf: Path) -> None:
    rig = Rig(pico_f32_gguf)
    for salt in range(6):
        rig.submit(prompt(50, salt), n_tokens=4)
    rig.run()
    tree = rig.engine.tree
    assert not any(branch.busy for branch in tree.branches)
    tree.evict_idle()
    assert (tree.branches, tree.n_cells_used) == ([], 0)
    rig.close()


def test_what_waits_to_be_saved_does_not_pile_up(pico_f32_gguf: Path, tmp_path: Path) -> None:
    rig = Rig(pico_f32_gguf, replace(SMALL, state_dir=str(tmp_path)))
    for salt in range(40):  # never idle, so nothing is saved
        rig.ask(prompt(150, salt), n_tokens=1)
    assert len(rig.engine._unsaved) <= SMALL.n_seq_max
    rig.close()
