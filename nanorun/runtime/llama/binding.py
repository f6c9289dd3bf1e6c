"""Loading llama_cpp and keeping its log out of people's way.

llama.cpp logs through one global callback. It is routed to `logging` and the last lines are kept,
because they are the only explanation it gives when a load fails.
"""

from __future__ import annotations

import ctypes
import logging
from collections import deque
from functools import cache
from types import ModuleType

from nanorun.errors import LibraryError

log = logging.getLogger("nanorun.engine")

_N_LINES_KEPT = 200
# enum ggml_log_level of ggml.h; 5 continues the previous fragment.
_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}


class EngineLog:
    """The engine's recent lines; the callback object must outlive every engine call."""

    def __init__(self) -> None:
        self.lines: deque[tuple[int, str]] = deque(maxlen=_N_LINES_KEPT)
        self._level = logging.DEBUG
        self._partial = ""

    def receive(self, level: int, text: bytes) -> None:
        """Take one fragment; lines may come in pieces (level 5 continues the previous one)."""
        if level != 5:
            self._level = _LEVELS.get(level, logging.DEBUG)
        *whole, self._partial = (self._partial + text.decode("utf-8", "replace")).split("\n")
        for line in whole:
            if line.strip(" ."):
                self.lines.append((self._level, line))
                log.log(self._level, "%s", line)

    def problems(self, n_last: int = 6) -> list[str]:
        """The last warnings and errors, newest last."""
        bad = [line for level, line in self.lines if level >= logging.WARNING]
        return bad[-n_last:]

    def clear(self) -> None:
        """Forget what was said so far, before an operation whose failure is to be explained."""
        self.lines.clear()


engine_log = EngineLog()


@cache
def load_llama() -> ModuleType:
    """Import llama_cpp once, route its log, initialise the backends.

    Raises:
        LibraryError: If llama-cpp-python is missing or its native library cannot be loaded.
    """
    try:
        import llama_cpp.llama_cpp as llama
    except (ImportError, OSError, RuntimeError) as error:
        raise LibraryError(
            "llama-cpp-python cannot be loaded",
            facts=[str(error)],
            tries=["pip install --force-reinstall --no-cache-dir 'llama-cpp-python>=0.3.36,<0.4'"],
        ) from error

    def receive(level: int, text: bytes, _user_data: object) -> None:
        engine_log.receive(level, text)

    callback = llama.llama_log_callback(receive)
    load_llama.callback = callback  # type: ignore[attr-defined]  # ctypes keeps no reference
    llama.llama_log_set(callback, ctypes.c_void_p(0))
    llama.llama_backend_init()
    module: ModuleType = llama
    return module
