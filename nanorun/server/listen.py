"""Running an endpoint on a socket until it is told to stop."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from nanorun.errors import NanorunError
from nanorun.server.settings import ServerSettings

log = logging.getLogger(__name__)

_BACKLOG = 128


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address, before anything slow is begun for it.

    Raises:
        NanorunError: If the address is taken or not this machine's.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> NanorunError:
    return NanorunError(
        f"cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}",
        tries=["nanorun serve --port 0    (any free port)"],
    )


def url_of(listener: socket.socket, *, tls: bool = False) -> str:
    """The base URL that clients use."""
    scheme = "https" if tls else "http"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/v1"


class _Server(uvicorn.Server):
    """A server that says when it answers."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[uvicorn.Server], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready(self)


async def serve(
    app: FastAPI,
    listener: socket.socket,
    settings: ServerSettings,
    on_ready: Callable[[uvicorn.Server], None],
) -> None:
    """Answer on a bound socket until SIGTERM or Ctrl-C.

    Then no new connection is taken, and answers under way may go on for `drain_s`; a second Ctrl-C
    cuts them off.

    Args:
        app: The endpoint.
        listener: From `bind`; closed at the end.
        settings: How long to drain, and the certificate.
        on_ready: Called once connections are taken, with the server; setting its `should_exit`
            stops it as a signal does.
    """
    config = uvicorn.Config(
        app,
        # Failures of requests are logged once, where they are turned into answers.
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
    )
    try:
        await _Server(config, on_ready).serve([listener])
    finally:
        listener.close()
