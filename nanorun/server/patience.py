"""Connections that keep the endpoint waiting are let go.

A client that reads nothing of its stream holds its reply's events in memory; one that sends a byte
now and then holds a connection. Both are seen where bytes come and go, in uvicorn's protocol.
"""

from __future__ import annotations

import asyncio
import os
import struct
from socket import SO_LINGER, SO_SNDBUF, SOL_SOCKET
from typing import TYPE_CHECKING, Any, cast

from nanorun.server.record import record_of
from nanorun.server.settings import ServerSettings

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol as HttpProtocol
else:
    # httptools' where that is installed; both have what is overridden here.
    from uvicorn.protocols.http.auto import AutoHTTPProtocol as HttpProtocol

_LEAST_BYTES = 16 * 2**10
"""A client that took so much in the time it has still reads, if slowly."""
_SEND_BYTES = 128 * 2**10
"""What the kernel holds for a client. Linux would let it grow to megabytes, and say that there is
room again only when a third of that is read: a slow reader would look like one that reads nothing.
"""
# Two integers of C, shorts on Windows: on, and for no time.
_DROP_UNREAD = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)


def patient_protocol(settings: ServerSettings) -> type[asyncio.Protocol]:
    """The class of an endpoint's connections, for uvicorn."""

    class Configured(PatientProtocol):
        read_timeout_s = settings.read_timeout_s
        write_timeout_s = settings.write_timeout_s

    return Configured


class PatientProtocol(HttpProtocol):
    """One connection, and how long it may keep the endpoint waiting."""

    read_timeout_s: float
    write_timeout_s: float
    _head_timer: asyncio.TimerHandle | None = None
    """Runs while the head of a request is awaited."""
    _write_timer: asyncio.TimerHandle | None = None
    """Runs while the client has to read before more can be sent."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request, so long."""
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_SNDBUF, _SEND_BYTES)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; once they make the head of a request, the rest is the gate's to await."""
        super().data_received(data)
        self._await_head()

    def _await_head(self) -> None:
        has_head = self.cycle is not None and not self.cycle.response_complete
        if has_head and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        elif not has_head and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.read_timeout_s, self.transport.abort)

    def pause_writing(self) -> None:
        """The buffer is full: the client has so long to read."""
        super().pause_writing()
        self._await_reading()

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _await_reading(self) -> None:
        n_unread = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(
            self.write_timeout_s, self._look_whether_it_reads, n_unread
        )

    def _look_whether_it_reads(self, n_unread: int) -> None:
        if self.transport.get_write_buffer_size() <= n_unread - _LEAST_BYTES:
            self._await_reading()
            return
        if self.cycle is not None:
            scope = cast("dict[str, Any]", self.cycle.scope)
            record_of(scope).failure = "client_does_not_read"
        # To close it would mean to wait until it has read; this ends its reply as well.
        connection = self.transport.get_extra_info("socket")
        connection.setsockopt(SOL_SOCKET, SO_LINGER, _DROP_UNREAD)
        self.transport.abort()
