"""How long to think, in the words of every API: levels, budgets, switches, objects of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanorun.model.think import HIGH, LOW, MAX, MEDIUM, OFF, Think
from nanorun.server.errors import invalid

EFFORTS = {
    "none": OFF,
    "minimal": Think(128),
    "low": LOW,
    "medium": MEDIUM,
    "high": HIGH,
    "xhigh": Think(32768),
    "max": MAX,
}
"""OpenAI's `reasoning_effort` as reasoning depth; two of its steps are none of the dial's."""

_BUDGETS = ("budget_tokens", "max_tokens", "budget")
_SWITCHES = {"enabled": None, "adaptive": None, "auto": None, "disabled": OFF}


def read_depth(value: Any, param: str) -> Think | None:
    """The depth that a value means; None where it leaves the choice to the server.

    Args:
        value: A level or effort, a budget in tokens (-1 for no limit), whether to think, or an
            object: Anthropic's `thinking`, OpenRouter's and OpenAI's `reasoning`.
        param: The field, for the error.

    Raises:
        ApiError: If it is none of these.
    """
    match value:
        case None | True:
            return None
        case False:
            return OFF
        case int():
            return _from_budget(value, param)
        case str() if (word := value.strip().lower()) in EFFORTS:
            return EFFORTS[word]
        case str() if value.strip().lower() in ("off", "false"):
            return OFF
        case str() if value.strip().lower() in ("on", "true", "auto", "default"):
            return None
        case Mapping():
            return _from_object(value, param)
    known = ", ".join(EFFORTS)
    raise invalid(param, f"{value!r} is no reasoning depth: {known}, or tokens")


def _from_budget(n_tokens: int, param: str) -> Think:
    if n_tokens < -1:
        raise invalid(param, f"{n_tokens} is no number of tokens; -1 is no limit")
    return MAX if n_tokens < 0 else Think(n_tokens)


def _from_object(value: Mapping[str, Any], param: str) -> Think | None:
    if value.get("enabled") is False:
        return OFF
    kind = value.get("type")
    if kind is not None and not (isinstance(kind, str) and kind in _SWITCHES):
        known = ", ".join(_SWITCHES)
        raise invalid(f"{param}.type", f"{kind!r} is none of {known}")
    if kind == "disabled":
        return OFF
    for name in _BUDGETS:
        if value.get(name) is not None:
            return read_depth(value[name], f"{param}.{name}")
    return read_depth(value.get("effort"), f"{param}.effort")
