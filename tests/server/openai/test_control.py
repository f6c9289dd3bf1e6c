"""Changing how long a reply thinks while it streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nanorun.model.chat import Finished, TextDelta
from tests.server.conftest import CHAT, Endpoint, error_of
from tests.support.fakes import reply

Make = Callable[..., Endpoint]
CONTROL = f"{CHAT}/control"


async def test_control_of_no_reply_changes_nothing(endpoint: Make) -> None:
    api = endpoint(reply("4"))
    await api.stream()
    answer = await api.request(
        "POST", CONTROL, json={"id": "chatcmpl-x", "action": "reasoning_end"}
    )
    assert answer.status_code == 200
    assert answer.json() == {"success": False, "message": "no reply with this id streams now"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"action": "reasoning_end"}, "id"),
        ({"id": "x", "action": "louder"}, "action"),
        ({"id": "x", "action": "reasoning_budget", "reasoning_budget": -2}, "reasoning_budget"),
    ],
)
async def test_control_that_cannot_be_meant_is_refused(
    endpoint: Make, body: dict[str, Any], param: str
) -> None:
    answer = await endpoint(reply("4")).request("POST", CONTROL, json=body)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


async def test_control_budget_must_say_how_many(endpoint: Make) -> None:
    body = {"id": "x", "action": "reasoning_budget"}
    answer = await endpoint(reply("4")).request("POST", CONTROL, json=body)
    assert answer.status_code == 400
    assert "reasoning_budget must say how many tokens" in answer.text


async def test_history_thinking_is_kept_when_the_template_is_told_so(endpoint: Make) -> None:
    api = endpoint(reply("4"))
    await api.chat(chat_template_kwargs={"truncate_history_thinking": False})
    assert api.client.last.options.keep_thinking
    await api.chat(chat_template_kwargs={"truncate_history_thinking": True})
    assert not api.client.last.options.keep_thinking


async def test_stream_names_the_stop_string_that_ended_it(endpoint: Make) -> None:
    stream = await endpoint([TextDelta("4"), Finished("stop", stop_text="END")]).stream()
    assert stream.chunks[-1]["choices"][0]["stop_reason"] == "END"
