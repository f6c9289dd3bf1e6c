"""`nanorun serve`: an endpoint over one model."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from nanorun.cli import endpoint_options as endpoint
from nanorun.cli import options as opt
from nanorun.cli.diagnostics import StatusLine, note, show_logs
from nanorun.cli.models import display_name, find_model, state_folder
from nanorun.cli.planning import Opening, log_memory, parse_draft, plan_opening
from nanorun.errors import UsageError
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import Think
from nanorun.model.units import parse_duration, parse_size

if TYPE_CHECKING:
    import socket

    from nanorun.runtime.client import EngineClient
    from nanorun.server.keys import ApiKey
    from nanorun.server.settings import ServerSettings


def command(
    model: opt.ModelArgument = opt.DEFAULT_MODEL,
    host: endpoint.HostOption = "127.0.0.1",
    port: endpoint.PortOption = 8080,
    api_keys: endpoint.ApiKeyOption = None,
    api_key_file: endpoint.ApiKeyFileOption = None,
    max_per_key: endpoint.MaxPerKeyOption = None,
    allow_origins: endpoint.AllowOriginOption = None,
    allow_hosts: endpoint.AllowHostOption = None,
    tls_cert: endpoint.TlsCertOption = None,
    tls_key: endpoint.TlsKeyOption = None,
    max_queued: endpoint.MaxQueuedOption = 512,
    max_queued_size: endpoint.MaxQueuedSizeOption = "256MiB",
    max_wait: endpoint.MaxWaitOption = "10m",
    read_timeout: endpoint.ReadTimeoutOption = "60s",
    write_timeout: endpoint.WriteTimeoutOption = "60s",
    aliases: endpoint.AliasOption = None,
    any_model: endpoint.AnyModelOption = False,
    ollama: endpoint.OllamaOption = True,
    reasoning_field: endpoint.ReasoningFieldOption = endpoint.ReasoningField.REASONING,
    log_requests: endpoint.LogRequestsOption = True,
    log_contents: endpoint.LogContentsOption = False,
    think: opt.ThinkOption = "medium",
    n_ctx: opt.NCtxOption = None,
    n_parallel: endpoint.ParallelOption = 4,
    leave: opt.LeaveOption = None,
    draft: opt.DraftOption = "off",
    keep_alive: endpoint.KeepAliveOption = "forever",
    state: opt.StateOption = True,
    verbose: opt.VerboseOption = False,
) -> None:
    """Answer over HTTP, in the words of OpenAI, Anthropic and Ollama.

    Serves /v1/chat/completions, /v1/responses, /v1/completions, /v1/models, /v1/messages, Ollama's
    /api/chat and /api/generate, and /health; GET / lists all. SIGTERM or Ctrl-C lets answers under
    way finish; a second Ctrl-C does not.
    """
    from nanorun.library.local import responses_file
    from nanorun.runtime.client import EngineClient
    from nanorun.server.listen import bind
    from nanorun.server.settings import ServerSettings
    from nanorun.server.tls import check_pair

    show_logs(verbose=verbose, requests=log_requests or log_contents)
    settings = ServerSettings(
        host=host,
        api_keys=tuple(api_keys or ()),
        named_keys=_named_keys(api_key_file),
        max_per_key=max_per_key,
        allow_origins=tuple(allow_origins or ()),
        allow_hosts=tuple(allow_hosts or ()),
        tls_cert=tls_cert,
        tls_key=tls_key,
        n_parallel=n_parallel,
        max_queued=max_queued,
        max_queued_bytes=parse_size(max_queued_size),
        max_wait_s=_limit_s(max_wait),
        read_timeout_s=_timeout_s(read_timeout, "--read-timeout"),
        write_timeout_s=_timeout_s(write_timeout, "--write-timeout"),
        log_requests=log_requests,
        log_contents=log_contents,
        aliases=tuple(aliases or ()),
        any_model=any_model,
        ollama=ollama,
        responses_file=responses_file() if state else None,
        thinking_fields=reasoning_field.names,
        think=Think.parse(think),
    )
    check_keys(settings)
    check_pair(tls_cert, tls_key)
    if log_contents:
        note("what people ask and are answered is written to this log (--log-contents)")
    path = find_model(model)
    fixed = EngineOptions(
        n_parallel=n_parallel, speculation=parse_draft(draft), state_dir=state_folder(keep=state)
    )
    opening = plan_opening(
        model, path, n_ctx, command="serve", fixed=fixed, leave=leave, keeps_texts=True
    )
    client = EngineClient(
        path,
        opening.options,
        smaller=opening.smaller,
        needs=opening.needs,
        keep_alive_s=_limit_s(keep_alive),
    )
    # Bound before the model is loaded: a port that is taken should not cost that wait.
    listener = bind(host, port)
    asyncio.run(_serve(client, opening, display_name(model), listener, settings))


def _limit_s(text: str) -> float | None:
    """Seconds of `--keep-alive` or `--max-wait`; None for no limit."""
    return None if text.strip().lower() == "forever" else parse_duration(text)


def _timeout_s(text: str, flag: str) -> float:
    """Seconds of a flag, more than none."""
    seconds = parse_duration(text)
    if not seconds:
        raise UsageError(f"{flag} {text}: nobody is that fast")
    return seconds


def _named_keys(file: Path | None) -> tuple[ApiKey, ...]:
    """The keys of `--api-key-file` and of NANORUN_API_KEYS."""
    from nanorun.server.keys import read_key_file, read_keys

    of_file = () if file is None else read_key_file(file)
    lines = os.environ.get("NANORUN_API_KEYS", "")
    return (*of_file, *(read_keys(lines, "NANORUN_API_KEYS") if lines else ()))


def check_keys(settings: ServerSettings) -> None:
    """Let nobody's machine be open to its network by accident.

    Raises:
        UsageError: If others can reach the endpoint and it asks for no key, or keys cannot be
            told apart.
    """
    from nanorun.server.keys import check_distinct

    keys = settings.all_keys
    check_distinct(keys)
    if settings.max_per_key is not None and not keys:
        raise UsageError(
            "--max-per-key limits requests of a key, and there is no key",
            tries=["nanorun serve --api-key-file FILE --max-per-key 2"],
        )
    if settings.is_local or keys:
        return
    raise UsageError(
        f"listening on {settings.host} lets others in, and there is no API key",
        facts=["keys may come from --api-key, --api-key-file, NANORUN_API_KEY or NANORUN_API_KEYS"],
        tries=[f"NANORUN_API_KEY=$(openssl rand -hex 16) nanorun serve --host {settings.host}"],
    )


async def _serve(
    client: EngineClient,
    opening: Opening,
    name: str,
    listener: socket.socket,
    settings: ServerSettings,
) -> None:
    from nanorun.server.app import create_app
    from nanorun.server.listen import serve, url_of

    status = StatusLine()
    try:
        status.show(f"loading {name} ...")
        info = await client.start()
        status.clear()
        log_memory(opening, client.options, client.pid)
        greeting = (
            f"serving {name} on {url_of(listener, tls=settings.tls_cert is not None)} "
            f"(n_ctx {info.n_ctx}, {settings.n_parallel} in parallel, {info.device})"
        )
        # The server repeats the signal that stopped it once it is done; ending well is no failure.
        signal.signal(signal.SIGTERM, lambda _signum, _frame: None)
        app = create_app(
            client,
            model_name=name,
            settings=settings,
            planned_bytes=lambda: opening.needs.planned_bytes.get(client.options),
        )
        await serve(app, listener, settings, lambda _server: note(greeting))
    finally:
        status.clear()
        listener.close()
        await client.close()
