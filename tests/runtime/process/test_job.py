"""Jobs in a child process: what they give, and what their end looks like from outside."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from nanorun.errors import EngineDied, ModelError, UsageError
from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.measure.divergence import measure
from nanorun.runtime.measure.imatrix import collect_imatrix
from nanorun.runtime.process.job import run_job
from tests.support.waiting import PATIENCE_S

# -- jobs; the child imports them from this module -----------------------------------------------


def count_up(arguments: dict[str, Any], progress: Callable[..., None]) -> dict[str, Any]:
    for i in range(arguments["n"]):
        progress(i, "of", arguments["n"])
    sys.stdout.write("not a frame")  # joins stderr
    return {"pid": os.getpid(), "text": arguments["text"]}


def refuse(arguments: dict[str, Any], _progress: Callable[..., None]) -> None:
    raise UsageError("not like this", facts=["a fact"], tries=["a command"])


def have_a_bug(_arguments: dict[str, Any], _progress: Callable[..., None]) -> None:
    raise ZeroDivisionError("a bug")


def be_killed(_arguments: dict[str, Any], progress: Callable[..., None]) -> None:
    progress(1)
    os.kill(os.getpid(), signal.SIGKILL)


def abort(_arguments: dict[str, Any], _progress: Callable[..., None]) -> None:
    sys.stderr.write("GGML_ASSERT(something) failed\n")
    sys.stderr.flush()
    ctypes.CDLL(None).abort()


def step_until_stopped(arguments: dict[str, Any], progress: Callable[..., None]) -> None:
    n = 0
    try:
        while True:
            n += 1
            progress(n, os.getpid())
            time.sleep(0.01)
    finally:
        Path(arguments["out"]).write_text(str(n))


def hang(_arguments: dict[str, Any], progress: Callable[..., None]) -> None:
    progress(os.getpid())
    time.sleep(10**6)


# -- tests ---------------------------------------------------------------------------------------


def test_result_and_progress_come_back_from_another_process() -> None:
    seen: list[tuple[Any, ...]] = []
    found = run_job(count_up, {"n": 3, "text": "ä\n"}, lambda *values: seen.append(values))
    assert found["text"] == "ä\n"
    assert found["pid"] != os.getpid()
    assert seen == [(0, "of", 3), (1, "of", 3), (2, "of", 3)]


def test_expected_error_is_raised_here() -> None:
    with pytest.raises(UsageError, match="not like this") as caught:
        run_job(refuse, {})
    assert (caught.value.facts, caught.value.tries) == (("a fact",), ("a command",))


def test_bug_ends_with_the_end_of_its_traceback() -> None:
    with pytest.raises(EngineDied, match="exit code 70") as caught:
        run_job(have_a_bug, {})
    assert "ZeroDivisionError: a bug" in caught.value.facts[-1]


def test_killed_child_is_reported() -> None:
    with pytest.raises(EngineDied, match=r"was ended by SIGKILL$"):
        run_job(be_killed, {})


def test_aborted_child_is_reported_with_what_it_said() -> None:
    with pytest.raises(EngineDied, match="was ended by SIGABRT") as caught:
        run_job(abort, {})
    assert "GGML_ASSERT(something) failed" in caught.value.facts


def test_interrupted_job_may_finish_its_step(tmp_path: Path) -> None:
    out = tmp_path / "n"

    def stop(n: int, _pid: int) -> None:
        if n == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(step_until_stopped, {"out": str(out)}, stop, stop_s=PATIENCE_S)
    assert int(out.read_text()) >= 3


def test_interrupted_job_that_does_not_stop_is_killed() -> None:
    pids: list[int] = []

    def stop(pid: int) -> None:
        pids.append(pid)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(hang, {}, stop, stop_s=0.2)
    assert not psutil.pid_exists(pids[0])


def test_job_that_takes_too_long_is_ended() -> None:
    pids: list[int] = []
    with pytest.raises(EngineDied, match="the engine gave no answer in 3 s"):
        run_job(hang, {}, pids.append, timeout_s=3)
    assert not psutil.pid_exists(pids[0])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it takes a minute")
def test_child_ends_with_its_parent() -> None:
    code = (
        "from nanorun.runtime.process.job import run_job\n"
        "from tests.runtime.process.test_job import hang\n"
        "run_job(hang, {}, lambda pid: print(pid, flush=True))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    child.wait(PATIENCE_S)


def test_engine_that_cannot_load_says_so_to_both_callers(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(64))
    options = EngineOptions(n_threads=1)
    with pytest.raises(ModelError, match=r"bad\.gguf"):
        collect_imatrix(bad, "text", "t", tmp_path / "i.gguf", options=options)
    with pytest.raises(ModelError, match=r"bad\.gguf"):
        measure(bad, [bad], "text", 64, options)
