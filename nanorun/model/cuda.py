"""How CUDA numbers GPUs, which is not how their driver does."""

from __future__ import annotations

import os


def visible_gpus(n_devices: int) -> list[int]:
    """The driver's indices of the GPUs that CUDA_VISIBLE_DEVICES leaves, in CUDA's order.

    Other ways to name them (by UUID) keep all.
    """
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    if setting is None:
        return list(range(n_devices))
    parts = [part.strip() for part in setting.split(",")]
    if not all(part.lstrip("-").isdigit() for part in parts if part):
        return list(range(n_devices))
    indices: list[int] = []
    for part in parts:
        # CUDA stops at the first index that is none.
        if not part or not 0 <= int(part) < n_devices:
            break
        indices.append(int(part))
    return indices
