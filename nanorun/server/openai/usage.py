"""What replies cost, in OpenAI's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanorun.model.chat import Usage


def summed_usage(usages: Sequence[Usage], *, n_each: int) -> Usage:
    """What several answers cost together, each prompt counted once.

    Args:
        usages: One an answer.
        n_each: Answers to one prompt, which stand beside each other.
    """
    prompts = usages[::n_each]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in prompts),
        cached_tokens=sum(usage.cached_tokens for usage in prompts),
        cached_from=prompts[0].cached_from,
        thinking_tokens=sum(usage.thinking_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        drafted_tokens=sum(usage.drafted_tokens for usage in usages),
        accepted_tokens=sum(usage.accepted_tokens for usage in usages),
    )


def usage_object(usage: Usage) -> dict[str, Any]:
    """What a request cost."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cached_from": usage.cached_from,
        },
        "completion_tokens_details": {"reasoning_tokens": usage.thinking_tokens},
    }
