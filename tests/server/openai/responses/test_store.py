from __future__ import annotations

import logging
import sqlite3
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nanorun.server.openai.responses.store import ResponseStore

DAY = 86400.0


def store(
    path: Path | None = None, max_bytes: int = 10**6, max_age_s: float = DAY
) -> ResponseStore:
    return ResponseStore(path, max_age_s=max_age_s, max_bytes=max_bytes)


def response(name: str, previous: str | None = None, text: str = "") -> dict[str, Any]:
    output = [{"type": "message", "id": f"msg_{name}", "text": text}]
    return {"id": name, "previous_response_id": previous, "output": output}


def asked(name: str) -> list[dict[str, Any]]:
    return [{"type": "message", "id": f"in_{name}", "role": "user", "content": name}]


def test_conversation_is_all_that_led_to_a_response(tmp_path: Path) -> None:
    kept = store(tmp_path / "r.sqlite3")
    for name, previous in (("a", None), ("b", "a"), ("c", "b"), ("other", "a")):
        assert kept.save(response(name, previous), asked(name))
    kept.close()
    again = store(tmp_path / "r.sqlite3")  # after a restart of the server
    ids = [item["id"] for item in again.conversation("c") or ()]
    assert ids == ["in_a", "msg_a", "in_b", "msg_b", "in_c", "msg_c"]
    assert again.item("msg_b") == response("b")["output"][0]
    assert again.item("in_other") == asked("other")[0]
    assert again.item("nobody") is None
    assert again.conversation("nobody") is None


def test_response_that_is_forgotten_takes_its_items_along_and_breaks_what_goes_on_from_it() -> None:
    kept = store()
    kept.save(response("a"), asked("a"))
    kept.save(response("b", "a"), asked("b"))
    assert kept.delete("a")
    assert not kept.delete("a")
    assert kept.get("a") is None
    assert kept.item("msg_a") is None
    assert kept.conversation("b") is None
    assert kept.get("b") is not None


def test_what_was_not_used_for_longest_is_forgotten_first() -> None:
    kept = store(max_bytes=1000)
    for name in "abc":
        kept.save(response(name, text="x" * 150), asked(name))
        time.sleep(0.002)
    assert kept.conversation("a") is not None  # used again
    kept.save(response("d", text="x" * 150), asked("d"))
    assert [name for name in "abcd" if kept.get(name)] == ["a", "c", "d"]


def test_response_larger_than_the_limit_is_not_kept() -> None:
    kept = store(max_bytes=1000)
    assert kept.save(response("a"), asked("a"))
    assert not kept.save(response("b", text="x" * 2000), asked("b"))


def test_old_responses_are_forgotten() -> None:
    kept = store(max_age_s=0.05)
    kept.save(response("a"), asked("a"))
    assert kept.get("a") is not None
    time.sleep(0.06)
    assert kept.get("a") is None


@pytest.mark.skipif(sys.platform == "win32", reason="files have no such modes there")
def test_file_is_for_its_owner_only(tmp_path: Path) -> None:
    store(tmp_path / "folder" / "r.sqlite3").save(response("a"), asked("a"))
    for path in (tmp_path / "folder").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_file_that_is_no_database_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "r.sqlite3"
    path.write_text("something else " * 100)
    with caplog.at_level(logging.WARNING):
        kept = store(path)
    assert "kept in memory only" in caplog.text
    assert kept.save(response("a"), asked("a"))
    assert kept.get("a") is not None
    assert path.read_text() == "something else " * 100


def test_disk_that_takes_no_more_costs_the_keeping_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = store(tmp_path / "r.sqlite3")
    with sqlite3.connect(tmp_path / "r.sqlite3") as other:
        (n_pages,) = other.execute("PRAGMA page_count").fetchone()
    kept._db.execute(f"PRAGMA max_page_count = {n_pages}")
    assert not kept.save(response("a", text="x" * 100_000), asked("a"))
    assert "is not kept: database or disk is full" in caplog.text
    assert kept.get("a") is None
