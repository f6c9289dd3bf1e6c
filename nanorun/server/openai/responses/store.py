"""Responses that are kept, to go on from: one SQLite file with an age and a size limit."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanorun.server.settings import ServerSettings

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, previous_id TEXT, created REAL NOT NULL, used REAL NOT NULL,
    n_bytes INTEGER NOT NULL, response TEXT NOT NULL, input TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS items (
    id TEXT PRIMARY KEY,
    response_id TEXT NOT NULL REFERENCES responses ON DELETE CASCADE
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS items_of ON items (response_id);
"""
_CHAIN = """
WITH RECURSIVE chain (id, depth) AS (
    VALUES (?, 0)
    UNION ALL
    SELECT responses.previous_id, depth + 1 FROM responses JOIN chain USING (id)
    WHERE responses.previous_id IS NOT NULL AND depth < 100000
)
"""
_BUSY_S = 5.0

Item = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stored:
    """A response that is kept."""

    response: dict[str, Any]
    items: list[Item]
    """What it was asked, without what came before."""


class ResponseStore:
    """What /v1/responses keeps. Its methods may wait for the disk and may be called by any thread.

    Args:
        path: The file, readable by its owner only; None keeps everything in memory.
        max_age_s: Seconds since its making after which a response is forgotten.
        max_bytes: Most bytes of text; those not used for longest are forgotten first.
    """

    def __init__(self, path: Path | None, *, max_age_s: float, max_bytes: int) -> None:
        self._max_age_s = max_age_s
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._db = _open(path)

    @classmethod
    def of(cls, settings: ServerSettings) -> ResponseStore:
        """The store of an endpoint."""
        return cls(
            settings.responses_file,
            max_age_s=settings.responses_max_age_s,
            max_bytes=settings.responses_max_bytes,
        )

    def save(self, response: dict[str, Any], items: Sequence[Item]) -> bool:
        """Keep a response and what was asked.

        Returns:
            Whether it is kept; the log says why not.
        """
        body, asked = json.dumps(response), json.dumps(list(items))
        now, n_bytes = time.time(), len(body) + len(asked)
        row = (response["id"], response["previous_response_id"], now, now, n_bytes, body, asked)
        ids = {item["id"] for item in (*items, *response["output"]) if item.get("id")}
        try:
            with self._lock, self._db:
                self._db.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)", row)
                self._db.executemany(
                    "INSERT OR REPLACE INTO items VALUES (?, ?)",
                    [(item_id, response["id"]) for item_id in ids],
                )
                self._forget_some(now)
                found = self._db.execute("SELECT 1 FROM responses WHERE id = ?", row[:1])
                return found.fetchone() is not None
        except sqlite3.Error as error:
            log.warning("response %s is not kept: %s", response["id"], error)
            return False

    def get(self, response_id: str) -> Stored | None:
        """A response by its id; None if there is none, or no more."""
        query = "SELECT response, input FROM responses WHERE id = ? AND created >= ?"
        rows = self._rows(query, response_id)
        return Stored(json.loads(rows[0][0]), json.loads(rows[0][1])) if rows else None

    def delete(self, response_id: str) -> bool:
        """Forget a response; false if there was none."""
        with self._lock, self._db:
            done = self._db.execute("DELETE FROM responses WHERE id = ?", (response_id,))
            return done.rowcount > 0

    def conversation(self, response_id: str) -> list[Item] | None:
        """All that was asked and answered up to a response, in its order; None if a part is gone.

        What leads up to it counts as used.
        """
        rows = self._rows(
            f"{_CHAIN} SELECT chain.id, response, input FROM chain LEFT JOIN responses"
            " ON responses.id = chain.id AND created >= ? ORDER BY depth DESC",
            response_id,
        )
        if any(response is None for _, response, _ in rows):
            return None
        with suppress(sqlite3.Error), self._lock, self._db:
            used = f"UPDATE responses SET used = ? WHERE id IN ({_CHAIN} SELECT id FROM chain)"
            self._db.execute(used, (time.time(), response_id))
        items: list[Item] = []
        for _, response, asked in rows:
            items += json.loads(asked) + json.loads(response)["output"]
        return items

    def item(self, item_id: str) -> Item | None:
        """An item that was asked or answered, by its id."""
        query = "SELECT response, input FROM items JOIN responses ON responses.id = response_id"
        rows = self._rows(f"{query} WHERE items.id = ? AND created >= ?", item_id)
        for response, asked in rows:
            for item in (*json.loads(asked), *json.loads(response)["output"]):
                if item.get("id") == item_id:
                    found: Item = item
                    return found
        return None

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._db.close()

    def _rows(self, query: str, key: str) -> list[tuple[Any, ...]]:
        """The rows about an id, of what is not too old: that goes when something is saved."""
        with self._lock:
            return self._db.execute(query, (key, time.time() - self._max_age_s)).fetchall()

    def _forget_some(self, now: float) -> None:
        """Forget what is too old, and then what was not used for longest until the rest fits."""
        self._db.execute("DELETE FROM responses WHERE created < ?", (now - self._max_age_s,))
        # Running totals from the last used backwards; what lies beyond the limit goes.
        self._db.execute(
            "DELETE FROM responses WHERE id IN (SELECT id FROM (SELECT id, SUM(n_bytes) OVER"
            " (ORDER BY used DESC, id) AS total FROM responses) WHERE total > ?)",
            (self._max_bytes,),
        )


def _open(path: Path | None) -> sqlite3.Connection:
    """The file, or memory where it cannot be used: answers matter more than keeping them."""
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            return _connect(str(path))
        except (OSError, sqlite3.Error) as error:
            log.warning("%s cannot be used (%s): responses are kept in memory only", path, error)
    return _connect(":memory:")


def _connect(name: str) -> sqlite3.Connection:
    db = sqlite3.connect(name, timeout=_BUSY_S, check_same_thread=False)
    try:
        db.execute("PRAGMA auto_vacuum = FULL")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA foreign_keys = ON")
        db.executescript(_SCHEMA)
    except sqlite3.Error:
        db.close()
        raise
    return db
