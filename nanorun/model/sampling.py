"""The sampling values of a request: their names and ranges, said once."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from nanorun.errors import UsageError

MAX_LOGPROBS = 20
"""Most alternatives that may be asked for with each token, as in OpenAI's endpoint."""
_MAX_COUNT = 2**31 - 1


def _between(low: float, high: float) -> Any:
    """A field that is None until asked for, and then within `low` and `high`, both included."""
    return field(default=None, metadata={"range": (low, high)})


@dataclass(frozen=True, slots=True)
class SamplingFields:
    """What can be asked of the choice of tokens. None leaves a value to the model's default."""

    temperature: float | None = _between(0, 5)
    """0 is greedy; the filters then rest."""
    top_p: float | None = _between(0, 1)
    top_k: int | None = _between(0, _MAX_COUNT)
    """0 keeps all tokens."""
    min_p: float | None = _between(0, 1)
    seed: int | None = None
    repetition_penalty: float | None = _between(0.01, 10)
    """Divides the logits of tokens that the reply has used lately; 1 changes nothing."""
    frequency_penalty: float | None = _between(-2, 2)
    """Lowers them by this much for every time they were used."""
    presence_penalty: float | None = _between(-2, 2)
    """Lowers them by this much once."""
    penalty_last_n: int | None = _between(-1, _MAX_COUNT)
    """Tokens that the penalties look back on; None for 64, -1 for the whole reply."""
    dry_multiplier: float | None = _between(0, 100)
    """Strength of DRY, which punishes repeating sequences; 0 and None switch it off."""
    dry_base: float | None = _between(1, 100)
    dry_allowed_length: int | None = _between(1, _MAX_COUNT)
    logprobs: int | None = _between(0, MAX_LOGPROBS)
    """Report each token's log-probability and those of that many alternatives."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens made likelier or, at -100, impossible; forced tokens of the reasoning dial are not."""


_NO_NUMBERS = ("logprobs", "logit_bias")
"""Values whose form differs from one interface to the next."""

NUMBERS: dict[str, tuple[float, float] | None] = {
    known.name: known.metadata.get("range")
    for known in fields(SamplingFields)
    if known.name not in _NO_NUMBERS
}
"""The values that are one number each and go by one name everywhere, with their ranges, both ends
included; None for any integer."""


def check_sampling(values: SamplingFields) -> None:
    """Refuse values out of their ranges.

    Raises:
        UsageError: Naming the first.
    """
    for known in fields(SamplingFields):
        value, limits = getattr(values, known.name), known.metadata.get("range")
        if value is not None and limits is not None:
            check_range(known.name, value, *limits)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse a value that is not between `low` and `high`, both included.

    Raises:
        UsageError: Naming it.
    """
    if not low <= value <= high:  # also where it is not a number
        raise UsageError(f"{name} {value} is not between {low} and {high}")
