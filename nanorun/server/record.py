"""What is known of one request while it is answered, for whoever looks after the endpoint.

The gate and the service write it; limits, the log, /slots and /metrics read it. No word of the
request or of its answer is in it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

_PLACE = "nanorun.record"


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One request."""

    method: str
    path: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    """Sent as `x-request-id`."""
    started: float = field(default_factory=time.monotonic)
    key: str | None = None
    """The name of its key."""
    n_body_bytes: int = 0


def record_of(scope: MutableMapping[str, Any]) -> RequestRecord:
    """The record of the request that an ASGI scope belongs to, begun when first asked for."""
    if _PLACE not in scope:
        scope[_PLACE] = RequestRecord(scope["method"], scope["path"])
    record: RequestRecord = scope[_PLACE]
    return record
