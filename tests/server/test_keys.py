from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nanorun.errors import UsageError
from nanorun.server.keys import (
    ApiKey,
    Keyring,
    check_distinct,
    numbered,
    read_key_file,
    read_keys,
)
from tests.server.conftest import Endpoint, error_of
from tests.support.fakes import reply
from tests.support.waiting import become

Make = Callable[..., Endpoint]


def test_keys_are_read_with_and_without_names() -> None:
    text = "# ours\n\nlaptop: sk-1\n  sk-2  \nci.box:sk:3\nsk-ü\n"
    assert read_keys(text, "F") == (
        ApiKey("laptop", "sk-1"),
        ApiKey("", "sk-2"),
        ApiKey("ci.box", "sk:3"),
        ApiKey("", "sk-ü"),
    )


def test_keys_without_a_name_are_named_by_their_place() -> None:
    keys = numbered([ApiKey("", "a"), ApiKey("laptop", "b"), ApiKey("", "c")])
    assert [key.name for key in keys] == ["key-1", "laptop", "key-3"]


@pytest.mark.parametrize("text", ["", "\n# nothing\n", "laptop:", "a: b\nlaptop:  \n"])
def test_text_without_a_key_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        read_keys(text, "F")


def test_refusal_of_a_key_file_names_the_line_and_no_key() -> None:
    with pytest.raises(UsageError) as caught:
        read_keys("a: secret-one\nlaptop:\n", "F")
    assert "F, line 2" in caught.value.message
    assert "secret-one" not in caught.value.render()


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ([ApiKey("a", " ")], "an API key is empty"),
        ([ApiKey("a", "x"), ApiKey("a", "y")], "two API keys are named 'a'"),
        ([ApiKey("a", "x"), ApiKey("b", "x")], "the API key 'b' is there twice"),
    ],
)
def test_keys_that_cannot_be_told_apart_are_refused(keys: list[ApiKey], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        check_distinct(keys)


def test_a_key_is_not_shown() -> None:
    assert "secret" not in repr(ApiKey("laptop", "secret"))


def test_keyring_knows_keys_by_name() -> None:
    keyring = Keyring([ApiKey("a", "one"), ApiKey("b", "schlüssel")])
    assert keyring.name_of("schlüssel".encode()) == "b"
    assert keyring.name_of(b"on") is None
    assert keyring.name_of(b"") is None


@pytest.mark.skipif(os.name != "posix", reason="permissions of group and others are POSIX's")
@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o640, True), (0o604, True)])
def test_key_file_that_others_can_read_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warns: bool
) -> None:
    file = tmp_path / "keys"
    file.write_text("\ufefflaptop: sk-1\n", encoding="utf-8")
    file.chmod(mode)
    assert read_key_file(file) == (ApiKey("laptop", "sk-1"),)
    assert (f"chmod 600 {file}" in caplog.text) is warns
    assert "sk-1" not in caplog.text


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_key_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match="--api-key-file"):
        read_key_file(file)


async def test_key_may_have_so_many_requests_at_a_time(endpoint: Make) -> None:
    keys = (ApiKey("laptop", "sk-1"), ApiKey("phone", "sk-2"))
    gate = asyncio.Event()
    api = endpoint([gate, *reply("x")], named_keys=keys, max_per_key=2)

    async def ask(key: str) -> int:
        body = {"messages": [{"role": "user", "content": "x"}]}
        headers = {"authorization": f"Bearer {key}"}
        response = await api.request("POST", "/v1/chat/completions", json=body, headers=headers)
        if response.status_code == 429:
            error = error_of(response)
            assert error["code"] == "key_limit"
            assert "'laptop'" in error["message"] and "--max-per-key 2" in error["message"]
            assert "sk-1" not in response.text
            assert int(response.headers["retry-after"]) >= 1
        return response.status_code

    running = [asyncio.create_task(ask("sk-1")) for _ in range(2)]
    await become(lambda: len(api.client.requests) == 2)
    assert await ask("sk-1") == 429
    other = asyncio.create_task(ask("sk-2"))
    await become(lambda: len(api.client.requests) == 3)
    gate.set()
    assert await asyncio.gather(*running, other) == [200, 200, 200]
    assert await ask("sk-1") == 200
