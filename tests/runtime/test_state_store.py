from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanorun.runtime.state_archive import Archive, ArchivedState, StatePayload
from nanorun.runtime.state_store import (
    SUFFIX,
    BadStateFile,
    StateStore,
    read_header,
    read_payload,
    write_state,
)


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


PAYLOAD = StatePayload(b"full state" * 50, {2: b"at two" * 9, 3: b"at three"})


@pytest.fixture
def state_file(tmp_path: Path) -> Path:
    path = tmp_path / ("x" + SUFFIX)
    write_state(path, "model-1", tokens(5, 6, 7, 8), PAYLOAD)
    return path


def test_file_gives_back_what_was_written(state_file: Path) -> None:
    header = read_header(state_file)
    assert header.fingerprint == "model-1"
    assert header.tokens.tolist() == [5, 6, 7, 8]
    assert header.checkpoint_positions == (2, 3)
    payload = read_payload(state_file)
    assert payload.full == PAYLOAD.full
    assert dict(payload.checkpoints) == dict(PAYLOAD.checkpoints)


def test_file_leaves_no_temporary_name(state_file: Path) -> None:
    assert [p.name for p in state_file.parent.iterdir()] == [state_file.name]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_file_is_never_loaded(
    state_file: Path, tmp_path: Path, data: st.DataObject
) -> None:
    raw = bytearray(state_file.read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        i = data.draw(st.integers(0, len(raw) - 1))
        raw[i] ^= data.draw(st.integers(1, 255))
    damaged = tmp_path / ("damaged" + SUFFIX)
    damaged.write_bytes(raw)
    with pytest.raises(BadStateFile):
        read_header(damaged)
        read_payload(damaged)


def make_store(folder: Path, fingerprint: str = "model-1", budget: int = 10**6) -> StateStore:
    return StateStore(folder, fingerprint, budget)


def test_store_finds_its_files_again(tmp_path: Path) -> None:
    make_store(tmp_path).save(ArchivedState(tokens(1, 2, 3)), PAYLOAD)
    (entry,) = make_store(tmp_path).entries
    assert entry.tokens.tolist() == [1, 2, 3]
    assert entry.place == "disk"
    payload = make_store(tmp_path).load(entry)
    assert payload is not None and payload.full == PAYLOAD.full


def test_store_refuses_the_states_of_another_model(tmp_path: Path) -> None:
    make_store(tmp_path).save(ArchivedState(tokens(1, 2, 3)), PAYLOAD)
    assert make_store(tmp_path, "model-2").entries == ()
    assert len(list(tmp_path.iterdir())) == 1


def test_store_removes_damaged_files(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    entry = store.save(ArchivedState(tokens(1, 2, 3)), PAYLOAD)
    assert entry is not None and entry.path is not None
    entry.path.write_bytes(entry.path.read_bytes()[:-1] + b"?")
    assert store.load(entry) is None
    assert store.entries == ()
    assert not entry.path.exists()


def test_store_replaces_a_conversation_by_its_continuation(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.save(ArchivedState(tokens(1, 2)), StatePayload(b"a"))
    store.save(ArchivedState(tokens(1, 2, 3)), StatePayload(b"b", {2: b"c"}))
    assert [e.tokens.tolist() for e in store.entries] == [[1, 2, 3]]
    assert len(list(tmp_path.iterdir())) == 1


def test_store_keeps_within_its_budget_dropping_the_oldest(tmp_path: Path) -> None:
    store = make_store(tmp_path, budget=3000)
    for i in range(6):
        entry = store.save(ArchivedState(tokens(i, i)), StatePayload(bytes(800)))
        assert entry is not None and entry.path is not None
        os.utime(entry.path, (time.time() - 100 + i,) * 2)
    assert [e.tokens[0] for e in store.entries] == [3, 4, 5]
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 3000


def test_store_forgets_what_is_too_old(tmp_path: Path) -> None:
    entry = make_store(tmp_path).save(ArchivedState(tokens(1)), PAYLOAD)
    assert entry is not None and entry.path is not None
    os.utime(entry.path, (1, 1))
    assert StateStore(tmp_path, "model-1", 10**6, max_age_s=3600).entries == ()
    assert not entry.path.exists()


def test_store_survives_an_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = make_store(tmp_path / "file" / "below")
    assert store.save(ArchivedState(tokens(1)), PAYLOAD) is None


def test_archive_moves_its_oldest_to_the_store(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    archive = Archive(1000, store)
    for i in range(3):
        archive.put(ArchivedState(tokens(i)), StatePayload(bytes(400)))
    archive._writer.submit(lambda: None).result()
    assert archive.host_bytes == 800
    assert [e.tokens[0] for e in store.entries] == [0]
    archive.close()
    assert sorted(e.tokens[0] for e in store.entries) == [0, 1, 2]


SAVER = """
import sys, numpy as np
from pathlib import Path
from nanorun.runtime.state_archive import ArchivedState, StatePayload
from nanorun.runtime.state_store import StateStore
store = StateStore(Path(sys.argv[1]), "model-1", 10**9)
print("ready", flush=True)
for i in range(10**6):
    tokens = np.arange(i + 1, dtype=np.int32)
    checkpoints = {i: b"x"} if i else {}
    store.save(ArchivedState(tokens), StatePayload(bytes([i % 251]) * 3_000_000, checkpoints))
"""


@pytest.mark.slow
def test_store_survives_being_killed_while_it_saves(tmp_path: Path) -> None:
    """Thirty kills at random moments: whatever is listed afterwards is whole."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(float(rng.uniform(0, 0.12)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for entry in make_store(tmp_path, budget=10**9).entries:
            payload = make_store(tmp_path, budget=10**9).load(entry)
            assert payload is not None
            assert payload.full == bytes([(entry.n_tokens - 1) % 251]) * 3_000_000
        assert not list(tmp_path.glob("*.part"))
