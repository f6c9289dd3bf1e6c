from __future__ import annotations

import pytest

from nanorun.errors import UsageError
from nanorun.model.chat import GenerateOptions
from nanorun.runtime.sampling import SamplingSettings, settle_sampling

TOOL = ({"type": "function", "function": {"name": "f"}},)


def settle(
    options: GenerateOptions, *, thinking: bool = True, **kwargs: object
) -> SamplingSettings:
    return settle_sampling(options, thinking=thinking, n_vocab=1000, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "thinking", "temperature", "top_p"),
    [
        (GenerateOptions(), True, 1.0, 1.0),
        (GenerateOptions(tools=TOOL), True, 0.6, 0.95),
        (GenerateOptions(), False, 0.0, 1.0),
        (GenerateOptions(temperature=0.3), False, 0.3, 1.0),
        (GenerateOptions(temperature=0.0, top_p=0.5), True, 0.0, 0.5),
    ],
)
def test_settle_fills_in_what_the_model_card_says(
    options: GenerateOptions, thinking: bool, temperature: float, top_p: float
) -> None:
    settings = settle(options, thinking=thinking)
    assert (settings.temperature, settings.top_p) == (temperature, top_p)


def test_settle_prefers_what_the_file_says() -> None:
    settings = settle(GenerateOptions(), defaults=SamplingSettings(0.0, 0.9))
    assert (settings.temperature, settings.top_p) == (0.0, 0.9)


@pytest.mark.parametrize(
    "options",
    [
        GenerateOptions(temperature=-0.1),
        GenerateOptions(temperature=float("nan")),
        GenerateOptions(top_p=1.1),
        GenerateOptions(top_k=-1),
        GenerateOptions(min_p=2.0),
        GenerateOptions(logit_bias=((1000, 1.0),)),
    ],
)
def test_settle_refuses_values_out_of_range(options: GenerateOptions) -> None:
    with pytest.raises(UsageError, match="is not between"):
        settle(options)
