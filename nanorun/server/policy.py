"""What becomes of the fields of OpenAI's requests that nanorun has no place of its own for.

Liberal in, strict out: a field that asks for what happens anyway is taken, a synonym means what its
owner means, and one that would change the answer and cannot be served is refused by name, with
what to use instead. docs/endpoints.md shows this table (`policy_table`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nanorun.server.errors import ApiError

Body = dict[str, Any]

LABELS: dict[str, str] = {
    "cache_prompt": "prompts are always cached",
    "client_metadata": "",
    "id_slot": "places are chosen by what they hold",
    "keep_alive": "`serve --keep-alive` decides",
    "metadata": "",
    "prediction": "the reply itself is looked up for guesses",
    "priority": "use `service_tier: flex` to give way",
    "prompt_cache_key": "prompts are found by what they say",
    "prompt_cache_options": "",
    "prompt_cache_retention": "",
    "provider": "",
    "request_id": "",
    "return_progress": "streams say in comments how far the prompt is read",
    "route": "",
    "safety_identifier": "",
    "session_id": "",
    "store": "only /v1/responses keeps answers",
    "timings_per_token": "timings come with the last chunk",
    "transforms": "",
    "usage": "",
    "user": "",
    "verbosity": "the model has no such switch",
}
"""Fields that say nothing about the answer, with a word on it where one helps."""

NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "allowed_token_ids": (([],), "logit_bias"),
    "audio": ((), "text is all there is"),
    "bad_words": (([],), "logit_bias"),
    "best_of": ((1,), "n"),
    "dynatemp_range": ((0,), "temperature"),
    "echo": ((False,), "/v1/completions"),
    "extra_body": (({},), "its fields in the body itself"),
    "functions": (([],), "tools"),
    "function_call": (("none", "auto"), "tool_choice"),
    "include_stop_str_in_output": ((False,), "stop, and add it yourself"),
    "length_penalty": ((1,), "nothing: there is no beam search"),
    "logits_processors": (([],), "logit_bias"),
    "min_tokens": ((0,), "logit_bias on the end of the turn"),
    "mirostat": ((0,), "min_p"),
    "modalities": ((["text"],), "text is all there is"),
    "n_keep": ((0, -1), "a shorter prompt"),
    "options": (({},), "its fields in the body itself, or /api/chat"),
    "parse_tool_calls": ((True,), "a request without tools"),
    "post_sampling_probs": ((False,), "logprobs"),
    "reasoning_format": (("auto", "deepseek", "deepseek-legacy"), "include_reasoning"),
    "samplers": (([],), "temperature, top_p, top_k, min_p"),
    "skip_special_tokens": ((True,), "/detokenize"),
    "spaces_between_special_tokens": ((True,), "/detokenize"),
    "stop_token_ids": (([],), "stop"),
    "tfs_z": ((1,), "min_p"),
    "thinking_forced_open": ((True, False), "reasoning_effort"),
    "top_a": ((0,), "min_p"),
    "top_n_sigma": ((-1, 0), "min_p"),
    "truncate_prompt_tokens": ((-1,), "a shorter prompt"),
    "typical_p": ((1,), "min_p"),
    "use_beam_search": ((False,), "n"),
    "web_search_options": (({},), "a tool that searches"),
    "xtc_probability": ((0,), "min_p"),
    "xtc_threshold": ((0.1, 0), "min_p"),
}
"""Fields that are not served, the values that ask for what happens anyway, and what to use."""


@dataclass(frozen=True, slots=True)
class Synonym:
    """A field that others have for something there is."""

    of: str
    """The field that it stands for, for a person."""
    put: Callable[[Body, Any], None]
    """Writes it into the body under the known name."""


def _as(name: str) -> Synonym:
    """The same thing under another name."""

    def put(body: Body, value: Any) -> None:
        if body.setdefault(name, value) != value:
            raise _refused(name, f"{name} and its synonym differ; give one of them")

    return Synonym(f"`{name}`", put)


def _limit(body: Body, value: Any) -> None:
    """Others say -1 (and llama.cpp -2) for no limit."""
    if value not in (-1, -2):
        _as("max_tokens").put(body, value)


def _depth(body: Body, value: Any) -> None:
    body.setdefault("reasoning", value)


def _template_switch(body: Body, value: Any) -> None:
    body["chat_template_kwargs"] = {
        "enable_thinking": value, **(body.get("chat_template_kwargs") or {})
    }  # fmt: skip


def _structured(kind: str) -> Synonym:
    def put(body: Body, value: Any) -> None:
        body["structured_outputs"] = {kind: value, **(body.get("structured_outputs") or {})}

    return Synonym(f"`structured_outputs.{kind}`", put)


def _top_level_schema(body: Body, value: Any) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "schema", "schema": value}}
    if body.setdefault("response_format", schema) != schema:
        raise _refused("json_schema", "json_schema and response_format differ; give one of them")


def _old_functions(body: Body, value: Any) -> None:
    tools = [{"type": "function", "function": item} for item in value or []]
    if tools:
        body["tools"] = [*(body.get("tools") or []), *tools]


def _old_choice(body: Body, value: Any) -> None:
    is_named = isinstance(value, Mapping)
    body.setdefault("tool_choice", {"type": "function", "function": value} if is_named else value)


def _n_probs(body: Body, value: Any) -> None:
    if value:
        body.setdefault("logprobs", True)
        body.setdefault("top_logprobs", value)


SYNONYMS: dict[str, Synonym] = {
    "enable_thinking": Synonym("`chat_template_kwargs.enable_thinking`", _template_switch),
    "function_call": Synonym("`tool_choice`", _old_choice),
    "functions": Synonym("`tools`", _old_functions),
    "guided_choice": _structured("choice"),
    "guided_grammar": _structured("grammar"),
    "guided_json": _structured("json"),
    "guided_regex": _structured("regex"),
    "json_schema": Synonym("`response_format`", _top_level_schema),
    "max_new_tokens": Synonym("`max_tokens`", _limit),
    "n_predict": Synonym("`max_tokens`; -1 for no limit", _limit),
    "n_probs": Synonym("`logprobs` and `top_logprobs`", _n_probs),
    "num_predict": Synonym("`max_tokens`; -1 for no limit", _limit),
    "random_seed": _as("seed"),
    "repeat_last_n": _as("penalty_last_n"),
    "repeat_penalty": _as("repetition_penalty"),
    "think": Synonym("`reasoning_effort`: a level, tokens, or whether at all", _depth),
    "thinking": Synonym("`reasoning_effort`: Anthropic's object, or whether at all", _depth),
    "thinking_budget": _as("reasoning_budget"),
    "thinking_budget_tokens": _as("reasoning_budget"),
    "thinking_token_budget": _as("reasoning_budget"),
    "reasoning_budget_tokens": _as("reasoning_budget"),
}
"""Fields of other servers, and what they mean."""

NORMAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "logit_bias": (lambda value: value == [], "`[]` is none"),
    "max_completion_tokens": (
        lambda value: value in (-1, -2) and value is not True,
        "-1: no limit",
    ),
    "max_tokens": (lambda value: value in (-1, -2) and value is not True, "-1 is no limit"),
    "seed": (lambda value: value in (-1, 4294967295) and value is not True, "-1: a random one"),
    "stop": (lambda value: value in ("", []) or _all_empty(value), '`""` and `[""]` are none'),
    "top_k": (lambda value: value == -1, "-1 is off"),
    "tools": (lambda value: value == [], ""),
}
"""Values of known fields that mean what leaving the field out means, except for top_k."""


def _all_empty(value: Any) -> bool:
    return isinstance(value, list) and not any(value)


REFUSED: dict[str, str] = {
    "grammar": "structured_outputs.grammar (llguidance's Lark; GBNF is not read)",
    "suffix": "a prompt that holds both ends: the model fills no gaps",
}
"""Fields known to be meant seriously by others, and what to use instead."""


def understand(body: Body, known: frozenset[str]) -> Body:
    """A body in nanorun's own words.

    Args:
        body: As it came.
        known: Fields that the request has itself.

    Raises:
        ApiError: 400, naming a field that would change the answer and cannot be served.
    """
    made: Body = {}
    others: Body = {}
    for name, value in {**body, **_extra_body(body)}.items():
        if name not in known:
            others[name] = value
        elif name not in NORMAL or not NORMAL[name][0](value):
            made[name] = value
        elif name == "top_k":
            made[name] = 0
    for name, value in others.items():
        _settle(made, name, value)
    return made


def _extra_body(body: Body) -> Body:
    """What a client of Python's `openai` meant to have sent beside the rest."""
    extra = body.get("extra_body")
    return extra if isinstance(extra, dict) else {}


def _settle(made: Body, name: str, value: Any) -> None:
    """Take one field that the request does not have itself."""
    if value is None or name in LABELS or name == "extra_body":
        return
    accepted, instead = NEUTRAL.get(name, ((), ""))
    if name in SYNONYMS:
        SYNONYMS[name].put(made, value)
    elif not any(_same(value, neutral) for neutral in accepted):
        raise _not_served(name, value, accepted, REFUSED.get(name, instead))


def _same(value: Any, other: Any) -> bool:
    """Equal, where a number is no truth value."""
    return value == other and isinstance(value, bool) is isinstance(other, bool)


def _not_served(name: str, value: Any, accepted: tuple[Any, ...], instead: str) -> ApiError:
    hint = f"; only {' or '.join(map(json.dumps, accepted))} is" if accepted else ""
    hint += f"; use {instead}" if instead else ""
    shown = json.dumps(value, ensure_ascii=False)[:80]
    return _refused(name, f"{name} {shown} is not supported{hint}", "unsupported_parameter")


def _refused(name: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=name)


def policy_table() -> str:
    """The table as Markdown, for docs/endpoints.md."""
    rows = [(name, "taken, says nothing about the answer", why) for name, why in LABELS.items()]
    rows += [
        (name, f"taken as {' or '.join(f'`{json.dumps(value)}`' for value in accepted)}" if accepted
         else "refused", f"else: {instead}")
        for name, (accepted, instead) in NEUTRAL.items() if name not in SYNONYMS
    ]  # fmt: skip
    rows += [(name, f"means {synonym.of}", "") for name, synonym in SYNONYMS.items()]
    rows += [(name, f"taken: {what}", "") for name, (_, what) in NORMAL.items() if what]
    rows += [(name, "refused", f"use {instead}") for name, instead in REFUSED.items()]
    lines = ["| field | what becomes of it | |", "|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| `{name}` | {what} | {why} |" for name, what, why in sorted(rows))]
    )
