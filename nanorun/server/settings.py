"""What an endpoint allows and how long it waits."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from nanorun.model.think import MEDIUM, Think
from nanorun.server.keys import ApiKey, numbered

MIB = 2**20


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Limits and rules of one endpoint."""

    host: str = "127.0.0.1"
    """The address it is bound to; decides whether Host and Origin are checked."""
    api_keys: tuple[str, ...] = ()
    """Keys without names; any key lets a request in, and without keys none is asked for."""
    named_keys: tuple[ApiKey, ...] = ()
    """Keys whose names are shown in logs and /slots."""
    max_per_key: int | None = None
    """Requests of one key that may be under way at a time, waiting ones included."""
    allow_origins: tuple[str, ...] = ()
    """Origins whose pages may ask and read answers; `*` for all."""
    allow_hosts: tuple[str, ...] = ()
    """Further names that requests may call the endpoint by; `*` for all."""
    tls_cert: Path | None = None
    """Certificate (PEM) to answer over TLS with; None for plain HTTP."""
    tls_key: Path | None = None
    """The certificate's private key."""
    n_parallel: int = 4
    """Requests the engine answers at the same time."""
    max_queued: int = 512
    """Requests that may wait beyond those; the next one is told to come back later."""
    max_queued_bytes: int = 256 * MIB
    """Size of the bodies of all that wait; it stands for how much there is to read, and bounds the
    memory that a queue of long prompts takes."""
    max_wait_s: float | None = 600.0
    """How long a request may wait until the engine begins it; the official clients of OpenAI and
    Anthropic give up then, too. None for no limit."""
    max_body_bytes: int = 32 * MIB
    """A million tokens of text take about 5 MB, and up to six times that with JSON escapes."""
    keepalive_s: float = 10.0
    """Silence after which a stream carries a comment; proxies give up after 30 to 60 seconds."""
    drain_s: float = 30.0
    """How long answers may go on after SIGTERM."""
    think: Think = MEDIUM
    """Reasoning depth of requests that name none."""

    log_requests: bool = False
    """Whether each request is logged, without contents."""
    log_contents: bool = False
    """Whether the beginnings of bodies are logged, too."""

    aliases: tuple[str, ...] = ()
    """Further names of the model."""
    any_model: bool = False
    """Whether requests may name any model; the one there is answers."""
    ollama: bool = True
    """Whether Ollama's routes are served."""
    responses_file: Path | None = None
    """Where /v1/responses keeps what it answered; None for memory only."""
    responses_max_age_s: float = 30 * 24 * 3600.0
    """How long; OpenAI's is 30 days, too."""
    responses_max_bytes: int = 256 * MIB
    """How much."""
    thinking_fields: tuple[str, ...] = ("reasoning",)
    """Names under which chat completions give the thinking."""

    @property
    def all_keys(self) -> tuple[ApiKey, ...]:
        """Every key, those without names named by their place."""
        return numbered((*(ApiKey("", key) for key in self.api_keys), *self.named_keys))

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the endpoint."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a host name or address (brackets allowed) means this machine and no other."""
    name = host.strip("[]").lower().rstrip(".")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
