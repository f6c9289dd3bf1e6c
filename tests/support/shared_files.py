"""Files that are dear to make, made once for all worker processes of a test session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the file `name`, which the first worker that asks for it makes.

    Args:
        factory: Where this worker's temporary folders are.
        name: The file's name, which says what is in it: two files never share one.
        make: Writes the file at the path it is given.
    """
    path = _folder_of_the_session(factory) / name
    with FileLock(path.with_name(f"{name}.lock")):
        if not path.exists():
            unfinished = path.with_name(f"unfinished-{name}")
            make(unfinished)
            unfinished.replace(path)
    return path


def _folder_of_the_session(factory: pytest.TempPathFactory) -> Path:
    # pytest-xdist gives each worker a folder inside the session's; alone, ours is the session's.
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder
