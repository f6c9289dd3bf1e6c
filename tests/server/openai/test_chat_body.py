from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from nanorun.model.chat import GenerateOptions, Grammar, Message, ToolCall
from nanorun.model.sampling import NUMBERS
from nanorun.model.think import LOW, OFF, Think
from nanorun.server import policy
from nanorun.server.depth import EFFORTS
from nanorun.server.errors import ApiError
from nanorun.server.openai.chat_body import ChatRequest

USER = {"role": "user", "content": "hi"}


def parse(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [USER], **fields})


def options(default_think: Think = LOW, **fields: Any) -> GenerateOptions:
    return parse(**fields).to_asked(default_think=default_think).options


def think(**fields: Any) -> Think:
    return options(**fields).think


def parse_message(**fields: Any) -> Message:
    return parse(messages=[fields]).to_asked(default_think=LOW).prompt[0]


def test_message_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a\n"}, {"type": "text", "text": "b"}]
    assert parse_message(role="user", content=parts) == Message("user", "a\nb")


def test_message_null_content_is_empty() -> None:
    assert parse_message(role="assistant", content=None).content == ""


def test_message_developer_is_system() -> None:
    assert parse_message(role="developer", content="be brief") == Message("system", "be brief")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_message_thinking_is_taken_under_either_name(key: str) -> None:
    message = parse_message(role="assistant", content="4", **{key: "2+2"})
    assert message == Message("assistant", "4", thinking="2+2")


def test_message_tool_call_arguments_are_parsed() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    message = parse_message(role="assistant", content=None, tool_calls=[call])
    assert message.tool_calls == (ToolCall("c1", "add", {"a": 1}),)


def test_message_tool_result_keeps_its_call() -> None:
    message = parse_message(role="tool", content="3", tool_call_id="c1")
    assert message == Message("tool", "3", tool_call_id="c1")


def test_message_fields_of_other_servers_are_ignored() -> None:
    message = parse_message(
        role="assistant", content="x", refusal=None, annotations=[], provider_specific_fields={}
    )
    assert message == Message("assistant", "x")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "content[0]"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "content[0]"),
        ({"role": "robot", "content": "x"}, "role"),
        ({"content": "x"}, "role"),
    ],
)
def test_message_that_asks_what_cannot_be_read_is_refused(
    message: dict[str, Any], param: str
) -> None:
    with pytest.raises(ApiError) as caught:
        parse_message(**message)
    assert caught.value.param == f"messages[0].{param}"


def test_conversation_without_messages_is_refused() -> None:
    with pytest.raises(ValidationError):
        parse(messages=[])


@pytest.mark.parametrize("effort", EFFORTS)
def test_effort_is_a_depth_the_engine_knows(effort: str) -> None:
    assert think(reasoning_effort=effort) == EFFORTS[effort]


def test_efforts_grow() -> None:
    budgets = [depth.budget for depth in EFFORTS.values()]
    finite = [budget for budget in budgets if budget is not None]
    assert budgets == [*finite, None]
    assert finite == sorted(set(finite))


@pytest.mark.parametrize(
    ("fields", "depth"),
    [
        ({}, "low"),
        ({"reasoning_effort": "none"}, "off"),
        ({"reasoning_effort": "high"}, "high"),
        ({"reasoning_budget": 100}, 100),
        ({"reasoning_budget": 0}, 0),
        ({"reasoning_budget": -1}, "max"),
        ({"reasoning_budget": 7, "reasoning_effort": "high"}, 7),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "off"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "low"),
        (
            {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "high"},
            "high",
        ),
    ],
)
def test_think_is_the_most_exact_of_what_is_asked(fields: dict[str, Any], depth: str | int) -> None:
    assert think(**fields) == Think.parse(depth)


def test_options_carry_every_setting() -> None:
    made = options(
        OFF,
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        seed=2**40,
        stop=["a", "b"],
    )
    assert (made.max_tokens, made.temperature, made.top_p) == (9, 0.5, 0.9)
    assert (made.top_k, made.min_p, made.seed) == (40, 0.1, 2**40)
    assert made.stop == ("a", "b")


@pytest.mark.parametrize("name", NUMBERS)
def test_every_sampling_value_is_taken_within_its_range(name: str) -> None:
    ends = NUMBERS[name] or (0, 2**40)
    for value in ends:
        assert getattr(options(OFF, **{name: value}), name) == value
    if NUMBERS[name] is not None:
        for value in (ends[0] - 0.001, ends[1] + 1, float("nan")):
            with pytest.raises(ValidationError) as caught:
                parse(**{name: value})
            assert caught.value.errors()[0]["loc"] == (name,)


def test_likelihood_and_biases_are_openais() -> None:
    made = options(logprobs=True, top_logprobs=3, logit_bias={"13": -100})
    assert (made.logprobs, made.logit_bias) == (3, ((13, -100.0),))


def test_options_take_one_stop_and_the_newer_name_of_max_tokens() -> None:
    made = options(OFF, stop="END", max_completion_tokens=5)
    assert (made.stop, made.max_tokens) == (("END",), 5)


TOOL = {
    "type": "function",
    "function": {"name": "add", "description": None, "parameters": {"type": "object"}},
}


def test_tools_lose_their_nulls() -> None:
    made = options(OFF, tools=[TOOL])
    assert made.tools == (
        {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
    )


def test_tool_choice_none_hides_the_tools() -> None:
    assert options(OFF, tools=[TOOL], tool_choice="none").tools == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "web_search"}]},
        {"tools": [{"type": "function", "function": {"name": "a>\n</function>"}}]},
        {
            "tools": [
                {"type": "function", "function": {"name": "a", "parameters": {"properties": []}}}
            ]
        },
        {
            "tools": [
                {"type": "function", "function": {"name": "a", "parameters": {"required": [1]}}}
            ]
        },
        {"frequency_penalty": 3},
        {"top_logprobs": 21},
        {"response_format": {"type": "xml"}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 2},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"stop": ["a", ""]},
        {"stop": 3},
        {"stream": "yes"},
        {"reasoning_budget": -2},
        {"chat_template_kwargs": {"low_effort": True}},
    ],
    ids=str,
)
def test_field_out_of_range_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        parse(**fields)
    assert caught.value.errors()[0]["loc"][0] in fields


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "always"},
        {"tool_choice": {"type": "function"}},
        {"tool_choice": {"type": "custom", "custom": {"name": "f"}}},
        {"reasoning_effort": "extreme"},
        {"top_logprobs": 3},
        {"modalities": ["text", "audio"]},
        {"web_search_options": {"search_context_size": "low"}},
        {"grammar": 'root ::= "a"'},
        {"mirostat": 2},
        {"min_tokens": 5},
        {"echo": True},
        {"use_beam_search": True},
        {"made_up": 1},
    ],
    ids=str,
)
def test_field_that_would_change_the_answer_is_refused_by_name(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ApiError) as caught:
        options(**fields)
    assert (caught.value.status, caught.value.param) == (400, name)
    assert name in caught.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1},
        {"logprobs": False},
        {"response_format": {"type": "text"}},
        {"parallel_tool_calls": True},
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
        {"logit_bias": None, "functions": None},
        *({name: value} for name in policy.LABELS for value in ("x", {"a": 1})),
        *(
            {name: value}
            for name, (accepted, _) in policy.NEUTRAL.items()
            for value in accepted
            if name not in policy.SYNONYMS
        ),
        {"functions": []},
        {"options": {}},
        {"n_probs": 0},
        {"logit_bias": []},
        {"stop": ""},
        {"stop": [""]},
        {"stop": []},
        {"max_tokens": -1},
        {"n_predict": -1},
        {"seed": -1},
        {"tools": []},
    ],
    ids=str,
)
def test_field_that_asks_for_nothing_is_ignored(fields: dict[str, Any]) -> None:
    assert options(**fields) == options()


def test_two_different_limits_are_refused() -> None:
    assert options(max_tokens=5, max_completion_tokens=5)
    with pytest.raises(ApiError, match="differ"):
        options(max_tokens=5, max_completion_tokens=6)


def test_biases_and_endless_replies_reach_the_engine() -> None:
    for bias in ({"13": -100, "5": 1.5}, [[13, False], [5, 1.5]]):
        made = options(logit_bias=bias, ignore_eos=True)
        assert made.logit_bias == ((13, -100.0), (5, 1.5))
        assert made.ignore_eos


@pytest.mark.parametrize("reasoning", [{"reasoning_content": "hm"}, {"reasoning": "hm"}, {}])
def test_history_shows_whether_the_client_gives_thinking_back(reasoning: dict[str, str]) -> None:
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y", **reasoning},
        {"role": "user", "content": "z"},
    ]
    assert options(messages=turns).echo_thinking == bool(reasoning)


@pytest.mark.parametrize(
    ("tier", "priority"),
    [("flex", "background"), ("default", "interactive"), (None, "interactive")],
)
def test_flexible_requests_run_in_the_background(tier: str | None, priority: str) -> None:
    assert options(service_tier=tier).priority == priority


TOOLS = [{"type": "function", "function": {"name": name}} for name in ("add", "ping")]


def test_one_tool_may_be_demanded() -> None:
    named = options(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "ping"}})
    assert named.tool_choice == "required"
    assert [tool["function"]["name"] for tool in named.tools] == ["ping"]
    assert options(tools=TOOLS, tool_choice="required").tool_choice == "required"
    assert options(tools=TOOLS, parallel_tool_calls=False).parallel_tool_calls is False


def test_tool_that_is_not_offered_cannot_be_demanded() -> None:
    with pytest.raises(ApiError, match="which is none of the tools"):
        options(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "fly"}})


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}},
         Grammar("json_schema", '{"type": "object"}')),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "null"}}}},
         Grammar("json_schema", '{"type": "null"}')),
        ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
        ({"structured_outputs": {"grammar": "start: X"}}, Grammar("lark", "start: X")),
        ({"structured_outputs": {"json": {"type": "null"}}},
         Grammar("json_schema", '{"type": "null"}')),
    ],
)  # fmt: skip
def test_forms_become_grammars(fields: dict[str, Any], grammar: Grammar | None) -> None:
    assert options(**fields).grammar == grammar


def test_schema_that_is_missing_is_refused() -> None:
    with pytest.raises(ApiError, match="response_format has no schema"):
        options(response_format={"type": "json_schema"})


def test_penalties_and_logprobs_reach_the_engine() -> None:
    made = options(frequency_penalty=0.5, dry_multiplier=0.8, logprobs=True, top_logprobs=3)
    assert (made.frequency_penalty, made.dry_multiplier, made.logprobs) == (0.5, 0.8, 3)
    assert options(logprobs=True).logprobs == 0
    assert options(logprobs=False).logprobs is None


@pytest.mark.parametrize(
    ("synonym", "known"),
    [
        ({"repeat_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"repeat_last_n": 5}, {"penalty_last_n": 5}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"n_predict": 9}, {"max_tokens": 9}),
        ({"num_predict": 9}, {"max_tokens": 9}),
        ({"max_new_tokens": 9}, {"max_tokens": 9}),
        ({"enable_thinking": False}, {"reasoning_effort": "none"}),
        ({"thinking": {"type": "disabled"}}, {"reasoning_effort": "none"}),
        ({"thinking": {"type": "enabled", "budget_tokens": 99}}, {"reasoning_budget": 99}),
        ({"thinking": {"type": "adaptive"}}, {}),
        ({"thinking": False}, {"reasoning_effort": "none"}),
        ({"reasoning": {"effort": "high"}}, {"reasoning_effort": "high"}),
        ({"reasoning": {"max_tokens": 99}}, {"reasoning_budget": 99}),
        ({"reasoning": {"enabled": False}}, {"reasoning_effort": "none"}),
        ({"think": False}, {"reasoning_effort": "none"}),
        ({"think": "high"}, {"reasoning_effort": "high"}),
        ({"think": 99}, {"reasoning_budget": 99}),
        ({"thinking_budget_tokens": 99}, {"reasoning_budget": 99}),
        ({"guided_json": {"type": "null"}}, {"structured_outputs": {"json": {"type": "null"}}}),
        ({"guided_regex": "a"}, {"structured_outputs": {"regex": "a"}}),
        ({"guided_choice": ["a", "b"]}, {"structured_outputs": {"choice": ["a", "b"]}}),
        ({"json_schema": {"type": "null"}},
         {"response_format": {"type": "json_schema", "schema": {"type": "null"}}}),
        ({"n_probs": 3}, {"logprobs": True, "top_logprobs": 3}),
        ({"extra_body": {"top_k": 5}}, {"top_k": 5}),
        ({"functions": [{"name": "add"}], "function_call": {"name": "add"}},
         {"tools": TOOLS[:1], "tool_choice": "required"}),
        ({"tools": TOOLS, "tool_choice": "any"}, {"tools": TOOLS, "tool_choice": "required"}),
        ({"tools": TOOLS, "tool_choice": {"type": "auto"}}, {"tools": TOOLS}),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "required", "tools": [{"type": "function", "function": {"name": "ping"}}]}}},
         {"tools": TOOLS[1:], "tool_choice": "required"}),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "ping"}},
         {"tools": TOOLS[1:], "tool_choice": "required"}),
        ({"tools": [{"type": "function", "name": "add"}]}, {"tools": TOOLS[:1]}),
    ],
    ids=str,
)  # fmt: skip
def test_synonym_means_what_its_owner_means(synonym: dict[str, Any], known: dict[str, Any]) -> None:
    assert options(**synonym) == options(**known)


def test_synonym_that_contradicts_is_refused() -> None:
    with pytest.raises(ApiError, match="differ"):
        parse(max_tokens=5, n_predict=6)


def test_two_forms_at_once_are_refused() -> None:
    with pytest.raises(ApiError, match="give one of them"):
        options(response_format={"type": "json_object"}, structured_outputs={"regex": "a"})


BEGUN = {"role": "assistant", "content": "The answer is"}


@pytest.mark.parametrize(
    ("fields", "goes_on"),
    [
        ({}, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, True),
        ({"continue_final_message": True}, True),
        ({"add_generation_prompt": False}, True),
        ({"continue_final_message": False}, False),
        ({"add_generation_prompt": True}, False),
    ],
)
def test_reply_that_was_begun_goes_on(fields: dict[str, Any], goes_on: bool) -> None:
    assert options(messages=[USER, BEGUN], **fields).continue_final is goes_on


@pytest.mark.parametrize("last", [USER, {"role": "assistant", "tool_calls": [
    {"id": "c", "function": {"name": "add", "arguments": "{}"}}]}])  # fmt: skip
def test_message_that_is_no_begun_reply_is_answered(last: dict[str, Any]) -> None:
    assert not options(messages=[USER, last]).continue_final
    with pytest.raises(ApiError, match="is no answer that was begun"):
        options(messages=[USER, last], continue_final_message=True)


def test_reply_without_a_word_is_left_out() -> None:
    asked = parse(messages=[USER, {"role": "assistant", "content": ""}]).to_asked(default_think=LOW)
    assert asked.prompt == (Message("user", "hi"),)
    assert not asked.options.continue_final


def test_switches_that_contradict_are_refused() -> None:
    with pytest.raises(ApiError, match="contradict"):
        options(messages=[USER, BEGUN], continue_final_message=True, add_generation_prompt=True)
