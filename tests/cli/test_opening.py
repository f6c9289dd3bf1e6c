"""How `run`, `chat` and `serve` open the engine: as planned, or with a reason not to."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nanorun.cli.planning import Opening, log_memory, plan_opening
from nanorun.errors import MemoryPlanError, UsageError
from nanorun.model.engine_options import EngineOptions
from nanorun.model.memory_needs import MemoryNeeds
from nanorun.plan.machine.hardware import Hardware
from tests.cli.conftest import FakeEngine, Result
from tests.plan.profiles import profile

GIB = 2**30
ALONE = EngineOptions(n_parallel=1)
KEEPING = EngineOptions(n_parallel=1, state_dir="/states")
Run = Callable[..., Result]


def on(monkeypatch: pytest.MonkeyPatch, machine: Hardware) -> None:
    monkeypatch.setattr("nanorun.plan.machine.hardware.detect_hardware", lambda: machine)


def test_run_opens_the_model_as_planned(
    nanorun: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, profile("cpu-24g"))
    assert nanorun("run", "pico", "x", "--n-ctx", "100k").code == 0
    assert engine.options is not None
    assert (engine.options.n_ctx, engine.options.n_gpu_layers) == (102400, 0)
    assert engine.options.archive_bytes > 0
    assert engine.needs is not None
    assert engine.needs.of(engine.options) >= engine.needs.of(engine.smaller[-1][0]) > 0
    assert engine.needs.leave_bytes == profile("cpu-24g").host.cushion_bytes
    assert engine.needs.again.startswith("nanorun run pico --n-ctx ")
    options, change = engine.smaller[0]
    assert isinstance(options, EngineOptions)
    assert change.startswith("room for saved prompts")


def test_longest_context_is_what_fits(
    nanorun: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, profile("cpu-24g").restricted(ram=3 * GIB // 4))
    assert nanorun("run", "pico", "x", "--n-ctx", "max").code == 0
    assert engine.options is not None
    assert 8192 < engine.options.n_ctx < 1_048_576


def test_model_that_does_not_fit_is_not_loaded(
    nanorun: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, profile("cpu-24g").restricted(ram=3 * GIB // 4))
    result = nanorun("run", "pico", "x", "--n-ctx", "1M")
    assert result.code == 4
    assert result.err.startswith("nanorun: error: pico at n_ctx 1,048,576 needs ")
    assert "try: nanorun run pico --n-ctx " in result.err
    assert engine.client.n_starts == 0


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["run", "pico", "x", "--n-ctx", "0"], 2, "not a number of tokens: '0'"),
        (["run", "pico", "x", "--n-ctx", "2M"], 2, "n_ctx 2,097,152 is outside what pico was"),
        (
            ["serve", "pico", "--port", "0", "--n-ctx", "99999M"],
            4,
            "try: nanorun serve pico --n-ctx ",
        ),
        (["serve", "pico", "--port", "0", "--parallel", "65"], 2, "--parallel"),
    ],
)
def test_context_that_cannot_be_meant_is_refused_before_loading(
    nanorun: Run, engine: FakeEngine, args: list[str], code: int, text: str
) -> None:
    result = nanorun(*args)
    assert result.code == code
    assert text in result.err
    assert engine.client.n_starts == 0


def test_context_of_an_endpoint_may_hold_several_texts(pico_gguf: Path) -> None:
    opening = plan_opening("pico", pico_gguf, "16k", command="serve", fixed=ALONE, keeps_texts=True)
    assert opening.options.n_ctx == 16384
    with pytest.raises(UsageError, match="outside what pico was trained for: 1 to 4,096"):
        plan_opening("pico", pico_gguf, "16k", command="chat", fixed=ALONE)


def test_states_are_kept_by_every_plan(pico_gguf: Path) -> None:
    opening = plan_opening("pico", pico_gguf, None, command="chat", fixed=KEEPING)
    assert opening.options.n_ctx == 4096  # what pico was trained for, less than the default
    assert {o.state_dir for o in (opening.options, *(o for o, _ in opening.smaller))} == {"/states"}


def test_file_is_named_as_the_person_named_it(
    pico_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, profile("cpu-24g").restricted(ram=2**28))
    with pytest.raises(MemoryPlanError, match=r"^pico at n_ctx 4,096 needs"):
        plan_opening("pico", pico_gguf, None, command="chat", fixed=ALONE)
    with pytest.raises(UsageError, match=r"^n_ctx 8,192 is outside what pico was trained for"):
        plan_opening("pico", pico_gguf, "8k", command="chat", fixed=ALONE)


def test_memory_is_logged_beside_the_plan(caplog: pytest.LogCaptureFixture) -> None:
    first, smaller = EngineOptions(), EngineOptions(n_ctx=2048)
    needs = MemoryNeeds({first: 2 * GIB, smaller: GIB})
    opening = Opening(first, ((smaller, "less"),), needs)
    log_memory(opening, first, os.getpid())
    assert caplog.messages == []
    with caplog.at_level(logging.DEBUG, "nanorun"):
        log_memory(opening, first, os.getpid())
        log_memory(opening, smaller, os.getpid())
        log_memory(opening, first, None)
        log_memory(opening, first, 2**22 + 1)  # no such process
    assert [m.partition(", ")[0] for m in caplog.messages] == [
        "memory: 2.0 GiB planned", "memory: 1.0 GiB planned",
    ]  # fmt: skip
    assert all(m.endswith(" resident after loading") for m in caplog.messages)


def test_every_way_to_open_a_model_has_its_memory(pico_gguf: Path) -> None:
    opening = plan_opening("pico", pico_gguf, None, command="chat", fixed=KEEPING)
    assert opening.smaller
    for options in (opening.options, *(options for options, _ in opening.smaller)):
        assert opening.needs.of(options) > pico_gguf.stat().st_size


def test_verbose_tells_of_the_plan(
    nanorun: Run, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.NOTSET, "nanorun"):
        assert nanorun("run", "pico", "x", "--n-ctx", "8k", "-v").code == 0
    assert "plan: n_ctx 8,192: as asked" in caplog.messages


@pytest.mark.parametrize("command", [["run", "pico", "x"], ["serve", "pico", "--port", "0"]])
def test_memory_is_left_to_other_programs_as_asked(
    nanorun: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    on(monkeypatch, profile("cpu-24g").restricted(ram=2 * GIB))
    result = nanorun(*command, "--leave", "2G")
    assert result.code == 4
    assert "2.0 GiB are kept free" in result.err
    assert engine.client.n_starts == 0
    assert nanorun(*command, "--leave", "much").code == 2


def test_chat_takes_what_is_left_to_others() -> None:
    assert "--leave" in (Path(__file__).parents[1] / "golden/help/chat.txt").read_text()
