"""Lossless padding: sizes raised to whole blocks of 256, so that K and IQ types fit every row.

An expert or MLP may get hidden units whose weights are zero: relu² of 0 is 0. The embedding may get
coordinates that are zero throughout, but an RMS norm divides by the number of coordinates: all that
is written to the residual stream grows by `sqrt(to / from)`, and the norms that read it shrink by
as much, which leaves every norm's epsilon exact. A LayerNorm also subtracts a mean, which the new
zeros would move, so a model with an MTP head keeps its `n_embd`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import combinations

from nanorun.errors import UsageError
from nanorun.model.arch import HybridArch
from nanorun.model.ggml_type import QK_K

PADDABLE = ("n_embd", "n_ff_exp", "n_ff_shexp", "n_ff")
"""Sizes that can be padded without changing what a model computes."""
PAD_MODES = ("auto", "never", "always")

Padding = dict[str, tuple[int, int]]
"""Size to what it was and what it became."""


def refusals(arch: HybridArch) -> dict[str, str]:
    """Sizes of `arch` that must stay, and why."""
    return {"n_embd": "the MTP head ends in a LayerNorm"} if arch.n_layer_nextn else {}


def paddings(arch: HybridArch, mode: str) -> list[Padding]:
    """The paddings that `mode` allows, fewest sizes first.

    Raises:
        UsageError: If there is no such mode.
    """
    if mode not in PAD_MODES:
        raise UsageError(f"--pad {mode!r} is none of {' '.join(PAD_MODES)}")
    if mode == "never":
        return [{}]
    refused = refusals(arch)
    names = [n for n in PADDABLE if n not in refused and _padded(arch, n) != _sizes(arch, n)]
    if mode == "always":
        return [padding_of(arch, names)]
    counts = range(len(names) + 1)
    return [padding_of(arch, subset) for n in counts for subset in combinations(names, n)]


def padding_of(arch: HybridArch, names: Collection[str]) -> Padding:
    """What padding the sizes `names` makes of them; a width that varies has an entry a layer.

    Raises:
        UsageError: If a size must stay.
    """
    padding: Padding = {}
    for name in names:
        if name in refusals(arch):
            raise UsageError(f"{name} cannot be padded: {refusals(arch)[name]}")
        before, after = _sizes(arch, name), _padded(arch, name)
        for i, (n_from, n_to) in enumerate(zip(before, after, strict=True)):
            if n_from != n_to:
                padding[name if i == 0 else f"{name}.{i - 1}"] = (n_from, n_to)
    return padding


def pad_arch(arch: HybridArch, padding: Padding) -> HybridArch:
    """The shape after padding."""
    names = {name.partition(".")[0] for name in padding}
    changes: dict[str, int | tuple[int, ...]] = {}
    for name in names:
        common, *per_layer = _padded(arch, name)
        changes[name] = common
        if per_layer:
            changes[f"{name}_per_layer"] = tuple(per_layer)
    # mypy cannot see that only sizes are replaced.
    return replace(arch, **changes) if changes else arch  # type: ignore[arg-type]


def padding_entries(padding: Padding) -> list[str]:
    """`name:from:to` of each padded size, as the metadata holds them."""
    return [f"{name}:{n_from}:{n_to}" for name, (n_from, n_to) in padding.items()]


def _sizes(arch: HybridArch, name: str) -> tuple[int, ...]:
    """A size, followed by its value in each layer where it varies."""
    per_layer = arch.n_ff_exp_per_layer if name == "n_ff_exp" else ()
    return (getattr(arch, name), *per_layer)


def _padded(arch: HybridArch, name: str) -> tuple[int, ...]:
    return tuple(-(-size // QK_K) * QK_K for size in _sizes(arch, name))
