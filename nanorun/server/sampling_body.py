"""The sampling values of a request's body: names and ranges are those of `model/sampling.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

from pydantic import BaseModel, Field, create_model

from nanorun.model.sampling import NUMBERS, SamplingFields


def _number(name: str) -> Any:
    """What pydantic is told of a value that is a number or null."""
    type_hint = get_type_hints(SamplingFields)[name]
    (number,) = (kind for kind in get_args(type_hint) if kind is not type(None))
    low, high = NUMBERS[name] or (None, None)
    allow_inf_nan = False if number is float else None  # pydantic knows it of floats only
    return Annotated[number, Field(ge=low, le=high, allow_inf_nan=allow_inf_nan)] | None


if TYPE_CHECKING:
    SamplingBody = BaseModel
else:
    SamplingBody = create_model(
        "SamplingBody",
        **{name: (_number(name), None) for name in NUMBERS},
    )
    """The part of a body that asks for the choice of tokens, as far as it is numbers."""


def asked_numbers(body: BaseModel) -> dict[str, Any]:
    """The sampling values of a body, by the names of `SamplingFields`; None where not asked."""
    return {name: getattr(body, name) for name in NUMBERS}
