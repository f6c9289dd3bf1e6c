"""Sampling values of one request, settled: what was asked for, else the model's defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from nanorun.model.chat import GenerateOptions
from nanorun.model.sampling import SamplingFields, check_range, check_sampling

# Logits divided by less leave the range of a float, and the likeliest wins anyway.
_MIN_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class SamplingSettings(SamplingFields):
    """Sampling values that a sampler can use; each default changes nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2

    @property
    def has_penalties(self) -> bool:
        """Whether what was said before changes the logits."""
        plain = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return plain != (1.0, 0.0, 0.0) or self.dry_multiplier > 0


def settle_sampling(
    options: GenerateOptions,
    *,
    thinking: bool,
    n_vocab: int,
    defaults: SamplingSettings | None = None,
) -> SamplingSettings:
    """Fill what a request leaves open with the model's defaults.

    Without defaults in the file, those of Nano's model card: temperature 1.0 and top-p 1.0 with
    thinking, 0.6 and 0.95 with tools, greedy without thinking.

    Raises:
        UsageError: If a value is out of its range.
    """
    if defaults is None and not thinking:
        defaults = SamplingSettings(temperature=0.0)
    elif defaults is None and options.tools:
        defaults = SamplingSettings(temperature=0.6, top_p=0.95)
    asked = {f.name: getattr(options, f.name) for f in fields(SamplingFields)}
    asked = {name: value for name, value in asked.items() if value is not None}
    settings = replace(defaults or SamplingSettings(), **asked)
    check_sampling(settings)
    for token, _ in settings.logit_bias:
        check_range("token of logit_bias", token, 0, n_vocab - 1)
    if settings.temperature < _MIN_TEMPERATURE:
        return replace(settings, temperature=0.0)
    return settings
