from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanorun.runtime.prompt_state.archive import Archive
from nanorun.runtime.prompt_state.archived_state import ArchivedState, StatePayload
from nanorun.runtime.prompt_state.prefixes import prefix_hashes
from nanorun.runtime.prompt_state.store import (
    SUFFIX,
    BadStateFile,
    StateStore,
    read_header,
    read_state,
    write_state,
)
from tests.support.waiting import PATIENCE_S


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
    _, payload = read_state(state_file)
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
        read_state(damaged)


def make_store(folder: Path, fingerprint: str = "model-1", budget: int = 10**6) -> StateStore:
    return StateStore(folder, fingerprint, budget)


def test_store_finds_its_files_again(tmp_path: Path) -> None:
    make_store(tmp_path).save(ArchivedState(tokens(1, 2, 3)), PAYLOAD)
    (entry,) = make_store(tmp_path).index.entries
    assert entry.tokens.tolist() == [1, 2, 3]
    assert entry.place == "disk"
    payload = make_store(tmp_path).load(entry)
    assert payload is not None and payload.full == PAYLOAD.full


def test_store_refuses_the_states_of_another_model(tmp_path: Path) -> None:
    make_store(tmp_path).save(ArchivedState(tokens(1, 2, 3)), PAYLOAD)
    assert make_store(tmp_path, "model-2").index.entries == ()
    assert len(list(tmp_path.iterdir())) == 1


def test_store_removes_damaged_files(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    entry = store.save(ArchivedState(tokens(1, 2, 3)), PAYLOAD)
    assert entry is not None and entry.path is not None
    entry.path.write_bytes(entry.path.read_bytes()[:-1] + b"?")
    assert store.load(entry) is None
    assert store.index.entries == ()
    assert not entry.path.exists()


def test_store_replaces_a_conversation_by_its_continuation(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.save(ArchivedState(tokens(1, 2)), StatePayload(b"a"))
    store.save(ArchivedState(tokens(1, 2, 3)), StatePayload(b"b", {2: b"c"}))
    assert [e.tokens.tolist() for e in store.index.entries] == [[1, 2, 3]]
    assert len(list(tmp_path.iterdir())) == 1


def test_store_keeps_within_its_budget_dropping_the_oldest(tmp_path: Path) -> None:
    store = make_store(tmp_path, budget=3000)
    for i in range(6):
        entry = store.save(ArchivedState(tokens(i, i)), StatePayload(bytes(800)))
        assert entry is not None and entry.path is not None
        os.utime(entry.path, (time.time() - 100 + i,) * 2)
    assert [e.tokens[0] for e in store.index.entries] == [3, 4, 5]
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 3000


def prefix(*ids: int) -> ArchivedState:
    return ArchivedState(tokens(*ids), is_prefix=True)


def age(entry: ArchivedState | None, seconds: float) -> None:
    assert entry is not None and entry.path is not None
    os.utime(entry.path, (time.time() - seconds,) * 2)


def test_prefix_stays_although_twenty_later_conversations_fill_the_disk(tmp_path: Path) -> None:
    store = make_store(tmp_path, budget=5000)
    age(store.save(prefix(7, 7), StatePayload(bytes(800))), 1000)
    for i in range(20):
        age(store.save(ArchivedState(tokens(i, i)), StatePayload(bytes(800))), 100 - i)
    again = make_store(tmp_path, budget=5000)
    assert {(e.tokens[0], e.is_prefix) for e in again.index.entries} >= {(7, True), (19, False)}
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 5000


def test_prefixes_go_by_when_they_were_used_and_leave_room_for_conversations(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path, budget=6000)
    for i in range(3):
        age(store.save(prefix(i, i), StatePayload(bytes(800))), 100 - i)
    store.touch_prefix(tokens(0, 0))
    for i in range(3, 9):
        age(store.save(prefix(i, i) if i < 6 else ArchivedState(tokens(i, i)),
                       StatePayload(bytes(800))), 50 - i)  # fmt: skip
    held = {(int(e.tokens[0]), e.is_prefix) for e in store.index.entries}
    assert (0, True) in held and (1, True) not in held
    assert sum(1 for _, is_prefix in held if not is_prefix) == 3


def test_prefix_that_was_changed_each_time_does_not_push_out_conversations(tmp_path: Path) -> None:
    store = make_store(tmp_path, budget=5000)
    for i in range(2):
        age(store.save(ArchivedState(tokens(i, i)), StatePayload(bytes(800))), 50 - i)
    for i in range(2, 30):
        age(store.save(prefix(i, i), StatePayload(bytes(800))), 40 - i)
    assert sum(not e.is_prefix for e in store.index.entries) == 2


def test_prefix_stays_when_a_conversation_with_it_is_saved(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.save(prefix(1, 2), StatePayload(b"a"))
    store.save(ArchivedState(tokens(1, 2, 3)), StatePayload(b"b", {2: b"c"}))
    store.save(ArchivedState(tokens(1, 2)), StatePayload(b"d"))
    found = store.index.longest(tokens(1, 2, 9), prefix_hashes(tokens(1, 2, 9)), 2)
    assert found is not None
    (held,) = [e for e in store.index.entries if e.is_prefix]
    loaded = store.load(held)
    assert loaded is not None and loaded.full == b"a"
    store.save(ArchivedState(tokens(1, 2, 5), is_prefix=True), StatePayload(b"e", {2: b"f"}))
    assert [e.tokens.tolist() for e in store.index.entries if e.is_prefix] == [[1, 2, 5]]


def test_store_forgets_what_is_too_old(tmp_path: Path) -> None:
    entry = make_store(tmp_path).save(ArchivedState(tokens(1)), PAYLOAD)
    assert entry is not None and entry.path is not None
    os.utime(entry.path, (1, 1))
    assert StateStore(tmp_path, "model-1", 10**6, max_age_s=3600).index.entries == ()
    assert not entry.path.exists()


def test_store_survives_an_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = make_store(tmp_path / "file" / "below")
    assert store.save(ArchivedState(tokens(1)), PAYLOAD) is None


def test_saved_states_are_for_their_owner_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)  # the folder may be shared already
    entry = make_store(tmp_path).save(ArchivedState(tokens(1, 2)), PAYLOAD)
    assert entry is not None and entry.path is not None
    assert entry.path.stat().st_mode & 0o777 == 0o600
    made = make_store(tmp_path / "made")
    made.save(ArchivedState(tokens(1, 2)), PAYLOAD)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o700


def test_store_opens_over_what_cannot_be_read_or_removed(tmp_path: Path) -> None:
    make_store(tmp_path).save(ArchivedState(tokens(1, 2)), PAYLOAD)
    (tmp_path / ("folder" + SUFFIX)).mkdir()
    (tmp_path / "folder.part").mkdir()
    store = make_store(tmp_path, budget=1)  # and nothing of it may stay
    assert store.index.entries == ()


def test_file_that_cannot_be_read_now_is_kept(
    state_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more_files(*_args: object, **_options: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", no_more_files)
        assert make_store(state_file.parent).index.entries == ()
    (entry,) = make_store(state_file.parent).index.entries
    assert entry.tokens.tolist() == [5, 6, 7, 8]


def test_state_larger_than_the_budget_does_not_push_out_others(tmp_path: Path) -> None:
    store = make_store(tmp_path, budget=3000)
    store.save(ArchivedState(tokens(1)), StatePayload(bytes(800)))
    assert store.save(ArchivedState(tokens(2)), StatePayload(bytes(4000))) is None
    assert [e.tokens[0] for e in store.index.entries] == [1]


def test_new_state_stays_beside_files_from_the_future(tmp_path: Path) -> None:
    """A clock that ran ahead and was put right leaves files that look newer than anything."""
    store = make_store(tmp_path, budget=2000)
    for i in range(2):
        entry = store.save(ArchivedState(tokens(i)), StatePayload(bytes(800)))
        assert entry is not None and entry.path is not None
        os.utime(entry.path, (time.time() + 1e8,) * 2)
    store.save(ArchivedState(tokens(7)), StatePayload(bytes(800)))
    assert 7 in [e.tokens[0] for e in store.index.entries]


def test_part_of_an_earlier_process_of_the_same_id_is_removed(tmp_path: Path) -> None:
    """In a container every engine has the same process id."""
    old, young = tmp_path / f"a.{os.getpid()}.part", tmp_path / f"b.{os.getpid()}.part"
    for part in (old, young):
        part.write_bytes(b"torn")
    os.utime(old, (1e9, 1e9))
    make_store(tmp_path)
    assert not old.exists()
    assert young.exists()  # being written now


def test_state_rewritten_by_another_process_is_not_taken_for_the_listed_one(tmp_path: Path) -> None:
    mine, other = make_store(tmp_path), make_store(tmp_path)
    state = ArchivedState(tokens(1, 2, 3))
    entry = mine.save(state, StatePayload(b"full", {1: b"one", 2: b"two"}))
    assert entry is not None
    other.save(state, StatePayload(b"full", {1: b"one"}))
    assert mine.load(entry) is None
    assert mine.index.entries == ()
    assert len(list(tmp_path.iterdir())) == 1  # the other's


def test_state_removed_by_another_process_is_forgotten(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    entry = store.save(ArchivedState(tokens(1, 2, 3)), PAYLOAD)
    assert entry is not None and entry.path is not None
    entry.path.unlink()
    assert store.load(entry) is None
    assert store.index.entries == ()


def test_archive_writes_what_it_takes_in_and_drops_the_oldest_from_memory(tmp_path: Path) -> None:
    archive = Archive(1000, make_store(tmp_path))
    for i in range(3):
        archive.put(ArchivedState(tokens(i)), StatePayload(bytes(400)))
    archive.wait()
    assert archive.host_bytes == 800
    held = {(e.tokens[0], e.place) for e in archive.entries}
    assert held == {(0, "disk"), (1, "disk"), (2, "disk"), (1, "host"), (2, "host")}
    archive.close()


class SlowStore(StateStore):
    """Writes nothing until it may."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "model-1", 10**6)
        self.may_write = threading.Event()

    def save(self, state: ArchivedState, payload: StatePayload) -> ArchivedState | None:
        assert self.may_write.wait(PATIENCE_S)
        return super().save(state, payload)


def test_archive_keeps_its_budget_when_the_disk_is_slow(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    archive, most = Archive(1000, store), 0
    threading.Timer(0.3, store.may_write.set).start()
    for i in range(20):
        archive.put(ArchivedState(tokens(i)), StatePayload(bytes(400)))
        most = max(most, archive.host_bytes)
    archive.close()
    assert most <= 1000
    assert sorted(e.tokens[0] for e in store.index.entries) == list(range(20))


def test_state_can_be_had_while_it_is_being_written(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    archive = Archive(0, store)
    archive.put(ArchivedState(tokens(1, 2)), StatePayload(b"state"))
    (entry,) = archive.entries
    assert archive.read(entry) == StatePayload(b"state")
    store.may_write.set()
    archive.close()


def test_archive_drops_what_a_continuation_makes_useless() -> None:
    archive = Archive(10_000)
    archive.put(ArchivedState(tokens(1, 2)), StatePayload(bytes(400)))
    longer = ArchivedState(tokens(1, 2, 3), checkpoint_positions=frozenset({2}))
    archive.put(longer, StatePayload(bytes(500), {2: b"c"}))
    assert archive.entries == (longer,)
    archive.close()


def test_short_sequences_are_not_written(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    archive = Archive(10_000, store, min_stored_tokens=3)
    archive.put(ArchivedState(tokens(1, 2)), StatePayload(bytes(400)))
    archive.put(ArchivedState(tokens(4, 5, 6)), StatePayload(bytes(400)))
    archive.close()
    assert [e.n_tokens for e in store.index.entries] == [3]


SAVER = """
import sys, numpy as np
from pathlib import Path
from nanorun.runtime.prompt_state.archived_state import ArchivedState, StatePayload
from nanorun.runtime.prompt_state.store import StateStore
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
        for entry in make_store(tmp_path, budget=10**9).index.entries:
            payload = make_store(tmp_path, budget=10**9).load(entry)
            assert payload is not None
            assert payload.full == bytes([(entry.n_tokens - 1) % 251]) * 3_000_000
        assert not list(tmp_path.glob("*.part"))
