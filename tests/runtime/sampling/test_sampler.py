from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nanorun.errors import UsageError
from nanorun.model.chat import GenerateOptions
from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.llama.penalties import build_penalties
from nanorun.runtime.sampling.sampler import Choice, Sampler
from nanorun.runtime.sampling.settings import SamplingSettings, settle_sampling

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


def pick(sampler: Sampler, values: np.ndarray, allowed: np.ndarray | None = None) -> Choice:
    return sampler.sample(values.astype(np.float32), allowed)


def test_greedy_takes_the_likeliest_that_is_allowed() -> None:
    values = np.arange(100.0)
    sampler = Sampler(SamplingSettings(0.0))
    assert pick(sampler, values).token == 99
    assert pick(sampler, values, np.array([3, 50, 7])).token == 50


@pytest.mark.parametrize("settings", [
    SamplingSettings(1.0, seed=1), SamplingSettings(0.7, top_k=5, seed=1),
    SamplingSettings(1.0, top_p=0.9, seed=1), SamplingSettings(1.0, min_p=0.1, seed=1),
])  # fmt: skip
def test_sampling_stays_within_what_is_allowed(settings: SamplingSettings) -> None:
    sampler = Sampler(settings)
    values = np.random.default_rng(0).normal(0, 3, 1000)
    allowed = np.array([5, 17, 400, 999])
    assert {pick(sampler, values, allowed).token for _ in range(200)} <= set(allowed.tolist())


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-320])
def test_temperature_next_to_zero_is_as_good_as_greedy(temperature: float) -> None:
    values = np.random.default_rng(0).normal(0, 20, 1000)
    sampler = Sampler(settle(GenerateOptions(temperature=temperature)))
    assert {pick(sampler, values).token for _ in range(20)} == {int(values.argmax())}


def test_seed_decides_the_draws() -> None:
    values = np.random.default_rng(0).normal(0, 1, 1000)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingSettings(1.0, seed=seed))
        return [pick(sampler, values).token for _ in range(20)]

    assert draws(7) == draws(7) != draws(8)
    assert draws(None) != draws(None)


def test_logprobs_are_those_before_bias_and_temperature() -> None:
    values = np.log([0.5, 0.3, 0.2])
    settings = SamplingSettings(0.0, logit_bias=((2, 100.0),), logprobs=2)
    choice = pick(Sampler(settings), values)
    assert choice.token == 2
    assert choice.logprob is not None
    assert np.exp(choice.logprob) == pytest.approx(0.2, abs=1e-6)
    assert [token for token, _ in choice.alternatives] == [0, 1]


class NeverAgain:
    """Penalties without llama.cpp: what was said may not be said again."""

    def __init__(self) -> None:
        self.said: list[int] = []
        self.is_closed = False

    def apply(self, logits: np.ndarray) -> np.ndarray:
        lowered = logits.copy()
        lowered[self.said] = -np.inf
        return lowered

    def accept(self, token: int) -> None:
        self.said.append(token)

    def close(self) -> None:
        self.is_closed = True


def test_penalties_are_told_what_was_said_and_closed_with_the_sampler() -> None:
    penalties = NeverAgain()
    sampler = Sampler(SamplingSettings(0.0, presence_penalty=1.0), penalties)
    sampler.accept(4)
    assert [pick(sampler, np.arange(5.0)).token for _ in range(3)] == [3, 2, 1]
    assert penalties.said == [4, 3, 2, 1]
    sampler.close()
    assert penalties.is_closed


def test_settings_with_penalties_do_not_go_without() -> None:
    with pytest.raises(ValueError, match="penalties"):
        Sampler(SamplingSettings(0.0, presence_penalty=1.0))


@pytest.fixture(scope="module")
def model(pico_gguf: Path) -> Iterator[LoadedModel]:
    model = LoadedModel(pico_gguf, EngineOptions(n_threads=1))
    yield model
    model.close()


def test_penalties_lower_what_was_said() -> None:
    settings = SamplingSettings(0.0, presence_penalty=2.0, frequency_penalty=0.5)
    sampler = Sampler(settings, build_penalties(settings, 100))
    values = np.zeros(100)
    values[5], values[6] = 3.2, 1.0
    assert [pick(sampler, values).token for _ in range(3)] == [5, 6, 5]
    # 5 was said twice: 3.2 - 2 - 2 x 0.5 = 0.2; 6 once: 1 - 2 - 0.5
    assert pick(sampler, values).token == 5
    assert pick(sampler, values).token not in (5, 6)
    sampler.close()


def test_penalties_look_back_only_so_far() -> None:
    settings = SamplingSettings(0.0, presence_penalty=9.0, penalty_last_n=2)
    sampler = Sampler(settings, build_penalties(settings, 100))
    values = np.zeros(100)
    values[5] = 1.0
    said = [pick(sampler, values).token for _ in range(6)]
    assert said[0] == said[3] == 5
    sampler.close()


def test_dry_breaks_a_repeated_sequence(model: LoadedModel) -> None:
    a, b, c, d, e = (model.tokenize(letter, special=False)[0] for letter in "abcde")
    values = np.zeros(model.n_vocab)
    values[d], values[e] = 2.0, 1.0
    for multiplier, expected in ((0.0, d), (4.0, e)):
        settings = SamplingSettings(0.0, dry_multiplier=multiplier)
        sampler = Sampler(settings, build_penalties(settings, model.n_vocab, model.vocab))
        for token in (a, b, c, d, a, b, c):
            sampler.accept(token)
        assert pick(sampler, values).token == expected
        sampler.close()
