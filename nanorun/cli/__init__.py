"""The `nanorun` command.

`main` is the one place that turns an outcome into an exit code and an error into text on stderr.
stdout carries data only. Nothing here is imported before it is needed, so that `--help` is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from nanorun.errors import ExitCode, NanorunError


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave the process with the contract's exit code.

    Args:
        args: What follows `nanorun`; None for this process's own arguments.
    """
    sys.exit(_run(sys.argv[1:] if args is None else args))


def _run(args: Sequence[str]) -> int:
    from nanorun.cli import diagnostics

    diagnostics.prepare_streams()
    try:
        from nanorun.cli.app import invoke

        code = invoke(args)
        diagnostics.flush_data()
    except NanorunError as error:
        diagnostics.show_error(error)
        code = int(error.exit_code)
    except BrokenPipeError:
        # The reader has seen enough (`nanorun run ... | head`): no message.
        code = int(ExitCode.FAILURE)
    except KeyboardInterrupt:
        code = int(ExitCode.INTERRUPTED)
    diagnostics.drop_unwritable_data()
    return code
