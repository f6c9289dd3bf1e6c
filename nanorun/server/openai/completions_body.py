"""What /v1/completions takes, and what it means to the engine."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StrictBool

from nanorun.model.chat import GenerateOptions, RawPrompt
from nanorun.model.sampling import MAX_LOGPROBS
from nanorun.model.think import Think
from nanorun.server.asked import Asked
from nanorun.server.errors import ApiError, invalid
from nanorun.server.openai.chat_body import AnswerBody

_MAX_PROMPTS = 256


class CompletionRequest(AnswerBody):
    """The body of a plain completion: a prompt that no template makes."""

    prompt: Any
    """A text, token ids, or a list of either."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | StrictBool | None = None
    echo: StrictBool | None = None

    def to_asked(self, *, default_think: Think) -> Asked:
        """What it asks of the engine.

        Args:
            default_think: How long to think where the prompt has opened the thinking.

        Raises:
            ApiError: Naming the field that cannot be meant.
        """
        prompts = read_prompts(self.prompt)
        if self.echo and (self.logprobs is not None or any(p.text is None for p in prompts)):
            what = (
                "log-probabilities of the prompt are" if self.logprobs else "echo of token ids is"
            )
            raise ApiError(
                400, f"echo: {what} not served yet; `nanorun eval` scores texts",
                code="unsupported_parameter", param="echo",
            )  # fmt: skip
        options = GenerateOptions(
            **self.answer_options(),
            think=default_think,
            max_tokens=self.max_tokens,
            # True is how chat asks for them; it would pass for 1.
            logprobs=int(self.logprobs) if self.logprobs not in (None, False) else self._zero(),
        )
        return Asked(prompts[0], options, self.n or 1, more_prompts=prompts[1:])

    def _zero(self) -> int | None:
        return 0 if self.logprobs == 0 and self.logprobs is not False else None


def read_prompts(value: Any) -> tuple[RawPrompt, ...]:
    """The prompts that a body names.

    Raises:
        ApiError: If it is neither text nor tokens, nor a list of them.
    """
    if isinstance(value, str) or _is_tokens(value):
        return (_prompt(value, "prompt"),)
    if isinstance(value, list) and 0 < len(value) <= _MAX_PROMPTS:
        return tuple(_prompt(item, f"prompt[{i}]") for i, item in enumerate(value))
    why = f"it must be a text, token ids, or a list of 1 to {_MAX_PROMPTS} of them"
    raise invalid("prompt", why)


def _prompt(value: Any, where: str) -> RawPrompt:
    if isinstance(value, str) and value:
        return RawPrompt(text=value)
    if _is_tokens(value):
        return RawPrompt(tokens=tuple(value))
    why = "it is empty" if value in ("", []) else "it is neither a text nor token ids"
    raise invalid(where, why)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
