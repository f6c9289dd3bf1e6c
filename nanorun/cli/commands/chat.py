"""`nanorun chat`: the terminal application."""

from __future__ import annotations

import sys

from nanorun.cli import endpoints
from nanorun.cli import options as opt
from nanorun.cli.diagnostics import is_terminal
from nanorun.cli.models import display_name, find_model, state_folder
from nanorun.cli.planning import memory_facts, parse_draft, plan_opening
from nanorun.errors import UsageError
from nanorun.model.engine_options import EngineOptions
from nanorun.model.think import Think


def command(
    model: endpoints.ModelOrPicoArgument = None,
    think: opt.ThinkOption = "medium",
    n_ctx: opt.NCtxOption = None,
    leave: opt.LeaveOption = None,
    endpoint: endpoints.EndpointOption = None,
    draft: opt.DraftOption = "off",
    state: opt.StateOption = True,
) -> int:
    """Chat with a model in the terminal.

    Thinking is folded away, and how deep it goes can be changed while it thinks. Keys are shown at
    the bottom.
    """
    depth = Think.parse(think)
    if not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
        raise UsageError(
            "chat needs a terminal; input or output is a pipe or a file",
            tries=[f"nanorun run {model or opt.DEFAULT_MODEL} 'What is 17 + 25?'"],
        )
    from nanorun.model.chat import GenerateOptions
    from nanorun.runtime.client import EngineClient
    from nanorun.tui.app import NanorunApp

    settings = GenerateOptions(think=depth)
    if endpoint is not None:
        remote = endpoints.open_endpoint(endpoint, model, n_ctx=n_ctx)
        app = NanorunApp(remote, options=settings, endpoint=remote.address.shown)
        app.run()
        return app.return_code or 0
    model = model or opt.DEFAULT_MODEL
    path = find_model(model)
    fixed = EngineOptions(
        n_parallel=1, speculation=parse_draft(draft), state_dir=state_folder(keep=state)
    )
    opening = plan_opening(model, path, n_ctx, command="chat", fixed=fixed, leave=leave)
    client = EngineClient(path, opening.options, smaller=opening.smaller, needs=opening.needs)
    app = NanorunApp(
        client,
        model_name=display_name(model),
        options=settings,
        memory=lambda: memory_facts(opening, client.options, client.pid),
    )
    app.run()
    return app.return_code or 0
