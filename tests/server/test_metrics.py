from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanorun.errors import EngineDied
from nanorun.model.chat import Finished, PrefillProgress, TextDelta, Timings, Usage
from nanorun.server.app import create_app
from nanorun.server.settings import ServerSettings
from tests.server.conftest import CHAT, Endpoint
from tests.support.fakes import FakeClient, reply
from tests.support.waiting import become

Make = Callable[..., Endpoint]


async def figures(api: Endpoint) -> dict[str, float]:
    """Every sample of /metrics by its name, with its labels as they are written."""
    response = await api.request("GET", "/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


LONG = Usage(
    prompt_tokens=120, cached_tokens=96, cached_from="disk", thinking_tokens=3,
    completion_tokens=11, drafted_tokens=8, accepted_tokens=5,
)  # fmt: skip
TIMES = Timings(queue_s=0.2, prefill_s=0.4, decode_s=2.0)


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_are_counted_as_the_engine_counts_them(endpoint: Make, stream: bool) -> None:
    script = [PrefillProgress(120, 120, 96), TextDelta("x"), Finished("stop", LONG, TIMES)]
    api = endpoint(script)
    for _ in range(2):
        await api.chat(stream=stream)
    found = await figures(api)
    assert found["nanorun_prompt_tokens_total"] == 240
    assert found["nanorun_prompt_tokens_cached_total{source=disk}"] == 192
    assert found["nanorun_generation_tokens_total"] == 22
    assert found["nanorun_thinking_tokens_total"] == 6
    assert found["nanorun_spec_decode_num_draft_tokens_total"] == 16
    assert found["nanorun_spec_decode_num_accepted_tokens_total"] == 10
    assert found["nanorun_request_success_total{finished_reason=stop}"] == 2
    assert found["nanorun_time_to_first_token_seconds_count"] == 2
    assert found["nanorun_request_time_per_output_token_seconds_sum"] == pytest.approx(0.4)
    assert found["nanorun_request_queue_time_seconds_sum"] == pytest.approx(0.4)


async def test_requests_are_counted_by_route_and_status(endpoint: Make) -> None:
    api = endpoint(reply("x"), host="0.0.0.0", api_keys=("k",), max_body_bytes=1000)
    key = {"authorization": "Bearer k"}
    body = {"messages": [{"role": "user", "content": "x"}]}
    await api.request("POST", CHAT, json=body, headers=key)
    await api.request("POST", CHAT, json=body)
    await api.request("GET", "/v1/models/pico", headers=key)
    await api.request("GET", "/some/path", headers=key)
    await api.request("POST", CHAT, json={"messages": "x" * 1000}, headers=key)
    response = await api.request("GET", "/metrics", headers=key)
    for line in (
        f'{{method="POST",route="{CHAT}",status="200"}} 1.0',
        '{method="GET",route="/v1/models/{name:path}",status="200"} 1.0',
        '{method="GET",route="other",status="404"} 1.0',
        '{method="POST",route="other",status="401"} 1.0',
        '{method="POST",route="other",status="413"} 1.0',
    ):
        assert f"nanorun_requests_total{line}\n" in response.text


async def test_metrics_are_open_on_this_machine_and_need_a_key_beyond(endpoint: Make) -> None:
    here = endpoint(api_keys=("k",))
    assert (await here.request("GET", "/metrics")).status_code == 200
    assert (await here.request("GET", "/slots")).status_code == 401
    beyond = endpoint(host="0.0.0.0", api_keys=("k",))
    assert (await beyond.request("GET", "/metrics")).status_code == 401
    headers = {"x-api-key": "k"}
    assert (await beyond.request("GET", "/metrics", headers=headers)).status_code == 200


async def test_who_runs_and_who_waits_is_told(endpoint: Make) -> None:
    gate = asyncio.Event()
    api = endpoint([PrefillProgress(1, 9, 0), gate, *reply("x")], [gate, *reply("x")])
    asked = [asyncio.create_task(api.chat()) for _ in range(3)]
    await become(lambda: len(api.client.requests) == 3 and api.client.requests[0].generation.sent)
    found = await figures(api)
    assert found["nanorun_num_requests_running"] == 1
    assert found["nanorun_num_requests_waiting"] == 2
    gate.set()
    await asyncio.gather(*asked)
    found = await figures(api)
    assert found["nanorun_num_requests_running"] == found["nanorun_num_requests_waiting"] == 0


async def test_reply_that_is_cut_off_is_counted_as_far_as_it_came(endpoint: Make) -> None:
    died = [PrefillProgress(64, 100, 32), TextDelta("a"), TextDelta("b"), EngineDied("gone")]
    api = endpoint(died)
    await api.chat(stream=True)
    found = await figures(api)
    assert found["nanorun_request_success_total{finished_reason=abort}"] == 1
    assert found["nanorun_prompt_tokens_total"] == 64
    assert found["nanorun_generation_tokens_total"] == 2


async def test_memory_and_restarts_are_those_of_the_engine() -> None:
    client = FakeClient(pid=os.getpid(), n_restarts=3)
    api = Endpoint(client, ServerSettings())
    api.app = create_app(client, model_name="pico", planned_bytes=lambda: 2**30)
    found = await figures(api)
    assert found["nanorun_engine_memory_planned_bytes"] == 2**30
    assert found["nanorun_engine_memory_resident_bytes"] > 2**20
    assert found["nanorun_engine_restarts_total"] == 3
    assert found["nanorun_engine_up"] == 1


async def test_engine_that_is_unloaded_takes_no_memory(endpoint: Make) -> None:
    found = await figures(endpoint())
    assert found["nanorun_engine_up"] == 0
    assert "nanorun_engine_memory_resident_bytes" not in found
    assert found["nanorun_server_memory_resident_bytes"] > 2**20


async def test_endpoints_count_apart(endpoint: Make) -> None:
    one, other = endpoint(reply("x")), endpoint(reply("x"))
    await one.chat()
    assert (await figures(one))["nanorun_prompt_tokens_total"] == 7
    assert (await figures(other))["nanorun_prompt_tokens_total"] == 0


async def test_metrics_name_no_text_of_requests(endpoint: Make) -> None:
    api = endpoint(reply("answerword"))
    await api.chat("questionword")
    text: Any = (await api.request("GET", "/metrics")).text
    assert "questionword" not in text and "answerword" not in text
