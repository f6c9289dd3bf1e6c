"""`nanorun chat`: the terminal application."""

from __future__ import annotations

import sys

from nanorun.cli import options as opt
from nanorun.cli.diagnostics import is_terminal
from nanorun.cli.models import context_size, display_name, find_model, state_folder
from nanorun.errors import UsageError


def command(
    model: opt.ModelArgument = opt.DEFAULT_MODEL,
    think: opt.ThinkOption = "medium",
    n_ctx: opt.NCtxOption = None,
    state: opt.StateOption = True,
) -> int:
    """Chat with a model in the terminal.

    Thinking is folded away, and how deep it goes can be changed while it thinks. Keys are shown at
    the bottom.
    """
    depth = opt.think_depth(think)
    if not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
        raise UsageError(
            "chat needs a terminal; input or output is a pipe or a file",
            tries=[f"nanorun run {model} 'What is 17 + 25?'"],
        )
    from nanorun.model.chat import GenerateOptions
    from nanorun.runtime.client import EngineClient
    from nanorun.runtime.options import EngineOptions
    from nanorun.tui.app import NanorunApp

    path = find_model(model)
    options = EngineOptions(
        n_ctx=context_size(n_ctx, path), n_parallel=1, state_dir=state_folder(keep=state)
    )
    client = EngineClient(path, options)
    app = NanorunApp(client, model_name=display_name(model), options=GenerateOptions(think=depth))
    app.run()
    return app.return_code or 0
