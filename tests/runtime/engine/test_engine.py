"""Who runs, who waits, who gives way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nanorun.errors import EngineError
from nanorun.model.chat import Finished
from nanorun.runtime.drafting.drafter import DraftRequest
from nanorun.runtime.engine.waiting import MOST_OVERTAKING
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
        assert len(rig.said(request_id)) == 120
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
    assert finished.usage.completion_tokens == len(rig.said(slow)) > 0
    rig.run()


def test_nothing_is_left_when_all_is_done(pico_f32_gguf: Path) -> None:
    rig = Rig(pico_f32_gguf)
    for salt in range(6):
        rig.submit(prompt(50, salt), n_tokens=4)
    rig.run()
    tree = rig.engine.tree
    assert not any(branch.busy for branch in tree.branches)
    tree.make_room(SMALL.n_ctx)
    assert (tree.branches, tree.n_cells_used) == ([], 0)
    rig.close()


def test_what_waits_to_be_saved_does_not_pile_up(pico_f32_gguf: Path, tmp_path: Path) -> None:
    rig = Rig(pico_f32_gguf, replace(SMALL, state_dir=str(tmp_path)))
    for salt in range(40):  # never idle, so nothing is saved
        rig.ask(prompt(150, salt), n_tokens=1)
    assert len(rig.engine._unsaved) <= SMALL.n_seq_max
    rig.close()


def test_foreground_request_does_not_wait_for_a_background_reader(pico_f32_gguf: Path) -> None:
    """Others' prompts go before the background's, so it may take long to read what they share."""
    rig = Rig(pico_f32_gguf, replace(SMALL, n_ctx=2048, n_parallel=4))
    shared = prompt(200)
    rig.submit(prompt(200, salt=1), n_tokens=1)
    rig.submit([*shared, *prompt(200, salt=2)], n_tokens=1, background=True)
    rig.step()
    first = rig.submit([*shared, *prompt(10, salt=3)], n_tokens=1)
    second = rig.submit(prompt(600, salt=4), n_tokens=1)
    rig.run()
    assert list(rig.finished).index(first) < list(rig.finished).index(second)
    rig.close()


def test_breaking_off_keeps_what_was_read_to_the_last_checkpoint(pico_f32_gguf: Path) -> None:
    rig = Rig(pico_f32_gguf)
    long = prompt(300)
    broken = rig.submit(long, boundaries=[100])
    for _ in range(4):
        rig.step()
    rig.strike(lambda: rig.engine.cancel(broken))
    rig.step()
    finished = rig.finished[broken]
    assert isinstance(finished, Finished) and finished.reason == "cancelled"
    again = rig.submit(long, n_tokens=3)
    rig.run()
    finished = rig.finished[again]
    assert isinstance(finished, Finished)
    assert finished.usage.cached_tokens == 100
    rig.check(again)
    rig.close()


def test_closing_in_mid_batch_saves_what_was_read_to_the_last_checkpoint(
    pico_f32_gguf: Path, tmp_path: Path
) -> None:
    rig = Rig(pico_f32_gguf, replace(SMALL, state_dir=str(tmp_path)))
    long = prompt(400)
    rig.submit(long, boundaries=[200])
    for _ in range(5):
        rig.step()
    rig.strike(rig.engine.cancel_all)
    rig.step()
    rig.reopen()
    again = rig.submit(long, n_tokens=3)
    rig.run()
    finished = rig.finished[again]
    assert isinstance(finished, Finished)
    assert (finished.usage.cached_tokens, finished.usage.cached_from) == (200, "disk")
    rig.check(again)
    rig.close()


def test_cancelling_all_in_a_batch_leaves_idle_sequences_alone(pico_f32_gguf: Path) -> None:
    """An evaluation of several sequences that is broken off corrupts others' states."""
    rig = Rig(pico_f32_gguf)
    first = rig.submit(prompt(60, salt=1), n_tokens=40)
    idle = rig.submit(prompt(60, salt=2), n_tokens=8)
    third = rig.submit(prompt(60, salt=3), n_tokens=40)
    while idle not in rig.finished:
        rig.step()

    def cancel_both() -> None:
        rig.engine.cancel(first)
        rig.engine.cancel(third)

    rig.strike(cancel_both)
    rig.step()
    rig.run()
    again = rig.submit([*prompt(60, salt=2), *rig.said(idle), 50], n_tokens=3)
    rig.run()
    finished = rig.finished[again]
    assert isinstance(finished, Finished)
    assert finished.usage.cached_tokens == 67
    rig.check(again)
    rig.close()


def test_failed_batch_leaves_nothing_that_a_later_prompt_could_start_from(
    pico_f32_gguf: Path,
) -> None:
    rig = Rig(pico_f32_gguf)
    rig.ask(prompt(60, salt=2), n_tokens=1)
    failing = [rig.submit(prompt(60, salt), n_tokens=40) for salt in (3, 4)]
    rig.step()

    def fail() -> None:
        raise EngineError("llama_decode failed with -3")

    rig.strike(fail)
    rig.step()
    assert all(isinstance(rig.finished[request_id], EngineError) for request_id in failing)
    assert not rig.engine.busy
    assert rig.engine.tree.branches == []
    _, finished = rig.ask([*prompt(60, salt=2), 50], n_tokens=1)
    assert finished.usage.cached_tokens == 0
    rig.close()


# -- long and short together ------------------------------------------------------------------


def batches_until(rig: Rig, has_happened: Callable[[], bool]) -> int:
    n_before = len(rig.batches)
    while not has_happened():
        rig.step()
    return len(rig.batches) - n_before


def test_short_request_does_not_wait_until_a_long_prompt_is_read(pico_f32_gguf: Path) -> None:
    rig = Rig(pico_f32_gguf, replace(SMALL, n_ctx=2048))
    stream = rig.submit(prompt(20, salt=1), n_tokens=60)
    while not rig.said(stream):
        rig.step()
    long = rig.submit(prompt(1500, salt=2), n_tokens=2)
    for _ in range(3):
        rig.step()
    short = rig.submit(prompt(30, salt=3), n_tokens=2)
    n_said = len(rig.said(stream))
    assert batches_until(rig, lambda: bool(rig.said(short))) <= 4
    assert len(rig.said(stream)) == n_said + 1  # it went on in each batch
    assert not rig.said(long)
    rig.run()
    for request_id in (stream, short):
        rig.check(request_id)
    rig.close()


def test_short_requests_cost_a_long_prompt_no_batches_but_their_own(pico_f32_gguf: Path) -> None:
    rig = Rig(pico_f32_gguf, replace(SMALL, n_ctx=2048))
    long = rig.submit(prompt(1500), n_tokens=1)
    n_short = 8
    for i in range(n_short):
        rig.submit(prompt(30, salt=i + 1), n_tokens=1)
        rig.step()
    rig.run()
    assert len(rig.said(long)) == 1
    assert len(rig.batches) == -(-(1500 + 30 * n_short) // SMALL.n_ubatch)
    rig.close()


def test_short_request_is_not_kept_waiting_by_one_that_there_is_no_room_for(
    pico_f32_gguf: Path,
) -> None:
    rig = Rig(pico_f32_gguf, replace(SMALL, n_ctx=1024))
    first = rig.submit(prompt(500, salt=1), n_tokens=200)
    second = rig.submit(prompt(600, salt=2), n_tokens=2)
    rig.step()
    short = rig.submit(prompt(30, salt=3), n_tokens=2)
    assert batches_until(rig, lambda: bool(rig.said(short))) <= 4
    assert not rig.said(second)
    rig.run()
    assert len(rig.said(first)) == 200
    rig.check(short)
    rig.close()


def test_long_request_is_overtaken_only_so_often(pico_f32_gguf: Path) -> None:
    """While short ones come without end, the one that there is no room for gets its turn."""
    rig = Rig(pico_f32_gguf, replace(SMALL, n_ctx=512))
    rig.submit(prompt(100, salt=1), n_tokens=30)
    rig.step()
    long = rig.submit(prompt(400, salt=2), n_tokens=2)
    short: list[str] = []
    while long not in rig.finished:
        while len(short) - sum(name in rig.finished for name in short) < 2:
            short.append(rig.submit(prompt(30, salt=3 + len(short)), n_tokens=20))
        rig.step()
    done_before = [name for name in short if rig.said(name)]
    assert 2 <= len(done_before) <= MOST_OVERTAKING + SMALL.n_parallel
    rig.engine.cancel_all()
    rig.run()
    rig.close()


# -- what it costs ----------------------------------------------------------------------------


def cost_of_replies(rig: Rig, *request_ids: str) -> int:
    """Tokens evaluated to say what was said: each but the last, whose successor nobody wants."""
    return sum(len(rig.said(request_id)) - 1 for request_id in request_ids)


def test_prefix_of_two_requests_at_once_is_read_once(pico_f32_gguf: Path) -> None:
    rig = Rig(pico_f32_gguf)
    shared = prompt(128)
    first = rig.submit([*shared, *prompt(20, salt=1)], n_tokens=5)
    second = rig.submit([*shared, *prompt(30, salt=2)], n_tokens=5)
    rig.run()
    assert rig.n_evaluated == 128 + 20 + 30 + cost_of_replies(rig, first, second)
    assert rig.batches[:2] == [[64], [64]]  # the prefix alone
    # Then the second reads its own while the first reads its own, and they speak together.
    assert len(rig.batches) <= 2 + 2 + 5
    rig.check(first)
    rig.check(second)
    rig.close()


def test_next_turn_costs_only_what_is_new(pico_f32_gguf: Path) -> None:
    rig = Rig(pico_f32_gguf)
    said, _ = rig.ask(prompt(150), n_tokens=8)
    n_before, n_batches = rig.n_evaluated, len(rig.batches)
    assert n_before == 150 + 7
    again, finished = rig.ask([*prompt(150), *said, *prompt(10, salt=1)], n_tokens=4)
    assert finished.usage.cached_tokens == 150 + 7
    assert rig.n_evaluated - n_before == 1 + 10 + len(again) - 1
    assert len(rig.batches) - n_batches == len(again)
    rig.close()


def test_prompt_asked_again_starts_at_its_last_boundary(pico_f32_gguf: Path) -> None:
    rig = Rig(pico_f32_gguf)
    rig.ask(prompt(150), n_tokens=1, boundaries=[40, 120])
    n_before = rig.n_evaluated
    rig.ask([*prompt(120), *prompt(30, salt=1)], n_tokens=1)
    assert rig.n_evaluated - n_before == 30
    rig.close()


@pytest.mark.parametrize("n_steps_between", [0, 6])
def test_reply_is_begun_where_there_is_room_to_say_something(
    n_steps_between: int, pico_f32_gguf: Path
) -> None:
    """One that fits only just would be suspended at once, and its prompt read a second time."""
    rig = Rig(pico_f32_gguf, replace(SMALL, n_ctx=256, archive_bytes=0))
    first = rig.submit(prompt(120), n_tokens=60)
    for _ in range(n_steps_between):
        rig.step()
    second = rig.submit(prompt(110, salt=1), n_tokens=40)
    rig.run()
    assert rig.n_evaluated == 120 + 110 + cost_of_replies(rig, first, second)
    rig.close()


class WrongDrafter:
    """Guesses what the model will hardly say, wherever it may guess."""

    def draft(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        return [[40] if request.n_most else [] for request in requests]


def test_reply_whose_last_guess_was_wrong_is_reused(pico_f32_gguf: Path) -> None:
    rig = Rig(pico_f32_gguf, replace(SMALL, speculation="lookup", n_draft=2))
    rig.engine.drafter = WrongDrafter()
    broken_off = rig.submit(prompt(100), n_tokens=50)
    while len(rig.said(broken_off)) < 8:
        rig.step()
    rig.engine.cancel(broken_off)
    rig.run()
    finished = rig.finished[broken_off]
    assert isinstance(finished, Finished)
    assert (finished.usage.drafted_tokens, finished.usage.accepted_tokens) == (7, 0)
    again = rig.submit([*prompt(100), *rig.said(broken_off), *prompt(10, salt=1)], n_tokens=4)
    rig.run()
    finished = rig.finished[again]
    assert isinstance(finished, Finished)
    assert finished.usage.cached_tokens == 100 + 7
    rig.check(again)
    rig.close()


def test_many_waiting_requests_are_answered_in_the_order_in_which_they_came(
    pico_f32_gguf: Path,
) -> None:
    rig = Rig(pico_f32_gguf)
    names = [rig.submit(prompt(10, salt=i), n_tokens=2) for i in range(80)]
    first_said: dict[str, int] = {}
    for n_steps in range(1000):
        if len(first_said) == len(names):
            break
        rig.step()
        for name in names:
            if rig.said(name):
                first_said.setdefault(name, n_steps)
    order = [first_said[name] for name in names]
    assert order == sorted(order)
    rig.run()
    rig.close()
