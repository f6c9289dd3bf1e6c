from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanorun import __version__
from nanorun.model.chat import PrefillProgress, TextDelta, ThinkingDelta, ToolCallBegun
from nanorun.model.gguf import read_gguf
from nanorun.server.keys import ApiKey
from tests.server.conftest import CHAT, Endpoint, error_of
from tests.support.fakes import MODEL_INFO, FakeClient, reply
from tests.support.waiting import become

Make = Callable[..., Endpoint]


async def slots(api: Endpoint, **options: Any) -> list[dict[str, Any]]:
    response = await api.request("GET", "/slots", **options)
    assert response.status_code == 200
    found: list[dict[str, Any]] = response.json()
    return found


async def test_slots_tell_who_is_answered_and_no_contents(endpoint: Make) -> None:
    gate = asyncio.Event()
    reading = [PrefillProgress(50, 120, 20), gate, *reply("x")]
    thinking = [PrefillProgress(9, 9, 0), ThinkingDelta("secretly"), gate, *reply("x")]
    waiting = [gate, *reply("x")]
    keys = (ApiKey("laptop", "k1"), ApiKey("phone", "k2"))
    api = endpoint(reading, thinking, waiting, named_keys=keys, n_parallel=3)
    body = {"messages": [{"role": "user", "content": "whisper"}]}
    asked = []
    for i, key in enumerate(("k1", "k2", "k2")):
        headers = {"x-api-key": key}
        asked.append(asyncio.create_task(api.request("POST", CHAT, json=body, headers=headers)))
        await become(lambda n=i: len(api.client.requests) == n + 1)
    await become(lambda: len(api.client.requests[1].generation.sent) == 2)

    response = await api.request("GET", "/slots", headers={"x-api-key": "k1"})
    first, second, free, last = response.json()
    assert [slot["is_processing"] for slot in response.json()] == [True, True, False, False]
    assert [slot["id"] for slot in response.json()] == [0, 1, 2, 3]
    assert (first["phase"], first["key"], first["route"]) == ("prefill", "laptop", CHAT)
    assert (first["model"], first["n_ctx"]) == ("pico", MODEL_INFO.n_ctx)
    assert first["n_prompt_tokens"] == 120
    assert (first["n_prompt_tokens_processed"], first["n_prompt_tokens_cache"]) == (30, 20)
    assert (second["phase"], second["key"]) == ("thinking", "phone")
    assert second["next_token"][0]["n_decoded"] == 1
    assert set(free) == {"id", "n_ctx", "is_processing"}
    assert (last["phase"], last["key"]) == ("waiting", "phone")
    assert len({slot["id_task"] for slot in (first, second, last)}) == 3
    for word in ("whisper", "secretly", "k1", "k2"):
        assert word not in response.text
    gate.set()
    answers = await asyncio.gather(*asked)
    assert answers[0].headers["x-request-id"] == first["request_id"]
    assert answers[0].json()["id"] == first["reply_id"]
    free = await slots(api, headers={"x-api-key": "k1"})
    assert [slot["is_processing"] for slot in free] == [False] * 3


@pytest.mark.parametrize(
    ("event", "phase"), [(TextDelta("x"), "answer"), (ToolCallBegun(0, "c", "f"), "tool_call")]
)
async def test_slot_tells_the_phase(endpoint: Make, event: Any, phase: str) -> None:
    gate = asyncio.Event()
    api = endpoint([event, gate, *reply("x")])
    asked = asyncio.create_task(api.chat())
    await become(lambda: api.client.requests and api.client.last.generation.sent)
    assert (await slots(api))[0]["phase"] == phase
    gate.set()
    await asked


async def test_slots_tell_when_none_is_free(endpoint: Make) -> None:
    gate = asyncio.Event()
    api = endpoint([PrefillProgress(1, 9, 0), gate, *reply("x")], n_parallel=1)
    assert await slots(api, params={"fail_on_no_slot": "1"})
    asked = asyncio.create_task(api.chat())
    await become(lambda: api.client.requests and api.client.last.generation.sent)
    response = await api.request("GET", "/slots", params={"fail_on_no_slot": "1"})
    assert response.status_code == 503
    assert error_of(response)["code"] == "no_slot"
    gate.set()
    await asked


async def test_props_are_what_clients_of_llama_cpp_read(endpoint: Make, pico_gguf: Path) -> None:
    client = FakeClient(model_info=replace(MODEL_INFO, path=str(pico_gguf)))
    api = endpoint(client=client, n_parallel=3)
    response = await api.request("GET", "/props")
    props = response.json()
    assert props["default_generation_settings"]["n_ctx"] == MODEL_INFO.n_ctx
    assert (props["total_slots"], props["model_alias"]) == (3, "pico")
    assert props["model_path"] == pico_gguf.name
    assert str(pico_gguf.parent) not in response.text
    assert __version__ in props["build_info"]
    template = read_gguf(pico_gguf).metadata["tokenizer.chat_template"]
    assert props["chat_template"] == template and "messages" in str(template)


async def test_props_of_a_file_that_is_gone_have_no_template(endpoint: Make) -> None:
    props = (await endpoint().request("GET", "/props")).json()
    assert props["chat_template"] == ""
