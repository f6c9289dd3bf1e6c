"""How fast this machine's memory and disk read, measured once and kept.

The cache is a JSON object of measurements by what was measured; it may be deleted at any time.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanorun.model.units import MIB

if TYPE_CHECKING:
    from nanorun.plan.machine.hardware import Hardware

# Far more than caches hold, for each core; and little of what is free.
_BLOCK_BYTES = 96 * MIB
_MOST_SHARE = 8
# The best of a few: whatever else runs can only slow it down.
_N_ROUNDS, _ROUND_S = 4, 0.12
_DISK_BYTES, _CHUNK_BYTES = 192 * MIB, 8 * MIB


def with_known_speeds(hardware: Hardware) -> Hardware:
    """The machine with what was measured of it before."""
    memory, disk = (_known(key) for key in (_memory_key(hardware), _disk_key()))
    return _with_speeds(hardware, memory, disk)


def with_measured_speeds(hardware: Hardware) -> Hardware:
    """The machine with the speed of its memory and disk, measured now unless it was before."""
    memory = _known(_memory_key(hardware))
    if memory is None:
        memory = memory_bandwidth(hardware.host.n_cores, hardware.host.available_bytes)
        keep_measurement(_memory_key(hardware), {"bytes_per_s": memory})
    disk = _known(_disk_key())
    if disk is None:
        disk = disk_bandwidth(_folder())
        if disk is not None:
            keep_measurement(_disk_key(), {"bytes_per_s": disk})
    return _with_speeds(hardware, memory, disk)


def _with_speeds(hardware: Hardware, memory: float | None, disk: float | None) -> Hardware:
    host = replace(hardware.host, bandwidth=memory or hardware.host.bandwidth)
    return replace(hardware, host=host, disk_bandwidth=disk or hardware.disk_bandwidth)


def memory_bandwidth(n_threads: int, available_bytes: int) -> float:
    """Bytes of main memory that all cores together read in a second."""
    import numpy as np

    n_bytes = min(_BLOCK_BYTES, available_bytes // _MOST_SHARE // n_threads)
    blocks = [np.ones(max(MIB, n_bytes) // 4, np.int32) for _ in range(n_threads)]

    def read(block: Any) -> float:
        n_read, started = 0, time.perf_counter()
        while (seconds := time.perf_counter() - started) < _ROUND_S:
            # Vectorized, and without the interpreter's lock.
            block.max()
            n_read += block.nbytes
        return float(n_read / seconds)

    with ThreadPoolExecutor(n_threads) as pool:
        return max(sum(pool.map(read, blocks)) for _ in range(_N_ROUNDS))


def disk_bandwidth(folder: Path) -> float | None:
    """Bytes a second that a file of the folder is read with, past the system's cache.

    None where it cannot be told: no room, no right to write, or a cache that cannot be left out.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            # Not zeros: some file systems keep those nowhere.
            chunk = os.urandom(_CHUNK_BYTES)
            for _ in range(_DISK_BYTES // _CHUNK_BYTES):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.lseek(file.fileno(), 0, os.SEEK_SET)
            started = time.perf_counter()
            while os.read(file.fileno(), _CHUNK_BYTES):
                pass
            return _DISK_BYTES / (time.perf_counter() - started)
    except OSError:
        return None


def _memory_key(hardware: Hardware) -> str:
    return f"memory|{hardware.host.description}|{hardware.host.n_cores}"


def _disk_key() -> str:
    folder = _folder()
    while not folder.exists():
        folder = folder.parent
    return f"disk|{folder.stat().st_dev}"


def _folder() -> Path:
    from nanorun.library import models_folder

    return models_folder()


# -- the cache ----------------------------------------------------------------------------------


def known_measurement(key: str) -> Mapping[str, Any] | None:
    """What was kept under a key, if anything."""
    found = _entries().get(key)
    return found if isinstance(found, dict) else None


def keep_measurement(key: str, values: Mapping[str, Any]) -> None:
    """Keep a measurement; where it cannot be written, it is made again next time."""
    path = cache_path()
    entries = {**_entries(), key: dict(values)}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(entries, indent=1), encoding="utf-8")
        part.replace(path)


def cache_path() -> Path:
    """The file that measurements are kept in."""
    return _folder().parent / "speed.json"


def _entries() -> dict[str, Any]:
    with suppress(OSError, ValueError):
        entries = json.loads(cache_path().read_text(encoding="utf-8"))
        if isinstance(entries, dict):
            return entries
    return {}


def _known(key: str) -> float | None:
    value = (known_measurement(key) or {}).get("bytes_per_s")
    return float(value) if isinstance(value, int | float) and value > 0 else None
