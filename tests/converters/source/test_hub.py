"""Streaming from the Hub: the same file as from a folder, through every fault a network has."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nanorun.errors import ModelError, NanorunError, SourceUnreachableError, UsageError
from nanorun.model.gguf import read_gguf
from nanorun.net.ranges import Policy
from nanorun_converters import convert as convert_module
from nanorun_converters.convert import ConvertOptions, ConvertProgress, convert
from nanorun_converters.output import files as output_module
from nanorun_converters.source import hub as hub_module
from nanorun_converters.source.hub import HubFiles, parse_repository
from nanorun_converters.source.range_cache import BLOCK_BYTES
from tests.support.hub_server import COMMIT, REPOSITORY, TOKEN, FakeHub, serve_hub
from tests.support.quantized_sources import nvfp4_modelopt, write_quantized_model
from tests.support.source_models import write_source_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source_model(tmp_path / "source", n_shards=3)


@pytest.fixture
def hub(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serve_hub(source) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        yield served


def files_of(hub: FakeHub, revision: str | None = None) -> HubFiles:
    return HubFiles(REPOSITORY, revision, pause=lambda seconds: None)


def tensor_bytes(path: Path) -> bytes:
    return path.read_bytes()[read_gguf(path).data_offset :]


def expected_bytes(source: Path, folder: Path) -> bytes:
    convert(source, ConvertOptions(out=folder / "expected.gguf"))
    return tensor_bytes(folder / "expected.gguf")


def test_file_from_the_hub_equals_that_from_a_folder(
    hub: FakeHub, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    convert(files_of(hub), ConvertOptions(out=out))
    assert tensor_bytes(out) == expected_bytes(source, tmp_path)
    metadata = read_gguf(out).metadata
    assert metadata["nanorun.source.repository"] == REPOSITORY
    assert metadata["nanorun.source.revision"] == COMMIT
    assert metadata["general.name"] == "Tiny"
    shards = sorted(source.glob("*.safetensors"))
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in shards]
    assert metadata["nanorun.source.sha256"] == hashes
    assert metadata["nanorun.source.files"] == [path.name for path in shards]


def test_default_name_is_that_of_the_model(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert convert(files_of(hub), ConvertOptions()).path == "Tiny-q8_0.gguf"


def test_nothing_but_the_output_touches_the_disk(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    convert(files_of(hub), ConvertOptions(out=Path("out.gguf")))
    assert not list((tmp_path / "home").rglob("*"))
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["out.gguf"]


def test_dry_run_reads_headers_only(hub: FakeHub, source: Path, tmp_path: Path) -> None:
    result = convert(files_of(hub), ConvertOptions(out=tmp_path / "o.gguf", dry_run=True))
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    small = sum(path.stat().st_size for path in source.iterdir()) - weights
    # Of each file of weights, one block at most.
    assert hub.n_bytes_sent < small * 2 + 3 * BLOCK_BYTES
    assert hub.requests["GET storage"] <= 3 + 1
    assert result.bytes > 10_000


FAULTS = {
    "too many requests": {"429": 0.3},
    "server errors": {"500": 0.2, "503": 0.2},
    "resets": {"reset": 0.3},
    "connections that break": {"short": 0.4},
    "answers shorter than asked for": {"less": 0.4},
    "addresses that run out": {"expired": 0.3},
    "all at once": {
        "429": 0.1, "500": 0.1, "reset": 0.1, "short": 0.1, "less": 0.1, "expired": 0.1,
    },
}  # fmt: skip


@pytest.mark.parametrize("faults", FAULTS.values(), ids=list(FAULTS))
def test_file_is_the_same_through_every_fault(
    faults: dict[str, float], hub: FakeHub, source: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # Small pieces and blocks, so that there are requests enough for faults to strike.
    monkeypatch.setattr("nanorun_converters.source.range_cache.BLOCK_BYTES", 8192)
    monkeypatch.setattr(hub_module, "POLICY", Policy(n_tries=40))
    hub.faults = faults
    convert(files_of(hub), ConvertOptions(out=tmp_path / "out.gguf"))
    assert hub.requests["GET storage"] > 40
    assert tensor_bytes(tmp_path / "out.gguf") == expected_bytes(source, tmp_path)


def test_pauses_grow_and_obey_the_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    hub.faults = {"503": 1.0}
    with pytest.raises(SourceUnreachableError, match="cannot be read from"):
        HubFiles(REPOSITORY, pause=pauses.append)
    assert len(pauses) == Policy().n_tries - 1  # after the last try there is nothing to wait for
    assert all(later > earlier for earlier, later in pairwise(pauses[:6]))
    assert max(pauses) <= Policy().longest_pause_s * 1.25


def test_hub_that_goes_away_leaves_a_start_to_go_on_with(
    hub: FakeHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanorun_converters.source.range_cache.BLOCK_BYTES", 8192)
    monkeypatch.setattr(convert_module, "PIECE_ELEMENTS", 3000)
    monkeypatch.setattr(output_module, "SYNC_BYTES", 1)
    out = tmp_path / "out.gguf"

    def pull_the_plug(progress: ConvertProgress) -> None:
        if progress.n_bytes_done > progress.n_bytes // 3:
            hub.faults = {"500": 1.0}

    with pytest.raises(SourceUnreachableError) as caught:
        convert(files_of(hub), ConvertOptions(out=out), pull_the_plug)
    assert "HTTP status 500" in caught.value.facts[0]
    assert "what was converted so far is kept" in caught.value.facts[-1]
    assert (tmp_path / "out.gguf.part").exists()
    hub.faults = {}
    assert convert(files_of(hub), ConvertOptions(out=out)).resumed
    assert tensor_bytes(out) == expected_bytes(source, tmp_path)


def stop_at_a_third(hub: FakeHub, change: Any) -> Any:
    def progress(progress: ConvertProgress) -> None:
        if progress.n_bytes_done > progress.n_bytes // 3:
            change(hub)

    return progress


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanorun_converters.source.range_cache.BLOCK_BYTES", 8192)
    monkeypatch.setattr(convert_module, "PIECE_ELEMENTS", 3000)
    monkeypatch.setattr(output_module, "SYNC_BYTES", 1)


@pytest.mark.usefixtures("small_steps")
def test_token_that_runs_out_leaves_a_start_to_go_on_with(
    hub: FakeHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def revoke(hub: FakeHub) -> None:
        hub.token, hub.faults = "another", {"expired": 1.0}

    out = tmp_path / "out.gguf"
    with pytest.raises(ModelError, match="does not let you read it"):
        convert(files_of(hub), ConvertOptions(out=out), stop_at_a_third(hub, revoke))
    assert (tmp_path / "out.gguf.part").exists()
    hub.faults = {}
    monkeypatch.setenv("HF_TOKEN", "another")
    assert convert(files_of(hub), ConvertOptions(out=out)).resumed
    assert tensor_bytes(out) == expected_bytes(source, tmp_path)


@pytest.mark.usefixtures("small_steps")
def test_ctrl_c_does_not_wait_for_a_hub_that_is_away(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "POLICY", Policy(first_pause_s=10.0**6))

    n_calls = 0

    def stop(hub: FakeHub) -> None:
        nonlocal n_calls
        n_calls += 1
        hub.faults = {"503": 1.0}
        if n_calls == 5:  # of the pieces handed out meanwhile, some wait for the Hub
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(
            HubFiles(REPOSITORY),
            ConvertOptions(out=tmp_path / "o.gguf"),
            stop_at_a_third(hub, stop),
        )
    assert (tmp_path / "o.gguf.part").exists()


def test_hub_is_not_needed_once_the_weights_are_read(hub: FakeHub, tmp_path: Path) -> None:
    def unplug(progress: ConvertProgress) -> None:
        if progress.n_bytes_done == progress.n_bytes:
            hub.faults = {"500": 1.0}

    assert convert(files_of(hub), ConvertOptions(out=tmp_path / "o.gguf"), unplug).bytes > 10_000


def test_memory_for_small_reads_does_not_grow_with_the_files(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanorun_converters.source.range_cache.BLOCK_BYTES", 1024)
    monkeypatch.setattr("nanorun_converters.source.range_cache.N_BLOCKS", 4)
    files = files_of(hub)
    shards = [files.find(f"model-0000{i}-of-00003.safetensors") for i in (1, 2, 3)]
    for store in shards:
        assert store is not None
        for offset in range(0, 16 * 1024, 1024):
            expected = (hub.folder / store.name).read_bytes()[offset : offset + 9]
            assert store.read(offset, 9).tobytes() == expected
    assert len(files._cache._blocks) == 4


def test_quantized_source_is_streamed(tmp_path: Path, source: Path, hub: FakeHub) -> None:
    for path in source.iterdir():
        path.unlink()
    write_quantized_model(
        source, lambda name: nvfp4_modelopt if ".experts." in name else None,
        hidden_size=192, num_attention_heads=3,
    )  # fmt: skip
    types = {"expert_up": "nvfp4", "expert_down": "nvfp4"}
    convert(files_of(hub), ConvertOptions(out=tmp_path / "a.gguf", type_map=types))
    convert(source, ConvertOptions(out=tmp_path / "b.gguf", type_map=types))
    assert tensor_bytes(tmp_path / "a.gguf") == tensor_bytes(tmp_path / "b.gguf")


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT])
def test_revision_is_pinned_to_its_commit(revision: str | None, hub: FakeHub) -> None:
    files = files_of(hub, revision)
    assert files.revision == COMMIT
    assert str(files.where) == (f"{REPOSITORY}@{revision}" if revision else REPOSITORY)


def test_token_is_shown_to_the_hub_and_to_nobody_else(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = TOKEN
    with pytest.raises(ModelError, match="does not let you read it"):
        files_of(hub)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    convert(files_of(hub), ConvertOptions(out=tmp_path / "out.gguf"))
    assert hub.leaked == []


def test_line_break_after_the_token_is_no_part_of_it(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\n")
    assert files_of(hub).revision == COMMIT


@pytest.mark.parametrize("token", [f"{TOKEN}\x01", f"{TOKEN}\u20ac"])
def test_token_that_is_none_is_refused_without_showing_it(
    token: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UsageError) as caught:
        files_of(hub)
    assert TOKEN not in caught.value.render()


@pytest.mark.parametrize(
    "endpoint",
    [
        "hub.test",
        "ftp://hub.test",
        "https://",
        "http://a b",
        "http://[::1",
        "http://a:b",
        "http://:1",
    ],
)
def test_endpoint_that_is_no_address_is_refused_at_once(
    endpoint: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(UsageError, match="HF_ENDPOINT is no address"):
        files_of(hub)


def test_password_in_the_endpoint_is_not_shown(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint.replace("//", "//me:secret@"))
    with pytest.raises(ModelError) as caught:
        HubFiles("nvidia/None", pause=lambda seconds: None)
    assert "secret" not in caught.value.render()


def test_hub_that_never_answers_is_given_up(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "POLICY", Policy(timeout_s=0.1))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(SourceUnreachableError):
            files_of(hub)


@pytest.mark.parametrize(
    ("repository", "revision", "what"),
    [("nvidia/None", None, "no such model"), (REPOSITORY, "v9", "no such revision")],
)
def test_what_the_hub_does_not_have_is_said(
    repository: str, revision: str | None, what: str, hub: FakeHub
) -> None:
    with pytest.raises(ModelError, match=what):
        HubFiles(repository, revision, pause=lambda seconds: None)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_content_of_another_hash_is_refused(name: str, hub: FakeHub) -> None:
    hub.damaged = name
    store = files_of(hub).find(name)
    assert store is not None
    with pytest.raises(SourceUnreachableError, match="expected content of hash"):
        store.read(0, store.n_bytes)


def test_file_that_has_another_size_by_now_is_refused(hub: FakeHub, source: Path) -> None:
    files = files_of(hub)
    store = files.find("model-00001-of-00003.safetensors")
    assert store is not None
    path = source / store.name
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(ModelError, match="the file changed while it was read"):
        store.read(100, 50)


def test_file_that_is_gone_by_now_is_refused(hub: FakeHub, source: Path) -> None:
    store = files_of(hub).find("config.json")
    assert store is not None
    (source / "config.json").unlink()
    with pytest.raises(ModelError, match="no such file any more"):
        store.read(0, store.n_bytes)


def test_offline_mode_is_obeyed(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceUnreachableError) as caught:
        files_of(hub)
    assert "HF_HUB_OFFLINE" in caught.value.facts[0]
    assert not hub.requests


@pytest.mark.parametrize("body", ["[]", "{}", '{"id": 1, "siblings": 7}', "not json"])
def test_answer_that_is_no_model_is_refused(
    body: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeHub, "info", lambda self: json.loads(body) if body[0] in "[{" else body)
    with pytest.raises(NanorunError):
        files_of(hub)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nvidia/Nano-4B", ("nvidia/Nano-4B", None)),
        ("nvidia/Nano-4B@main", ("nvidia/Nano-4B", "main")),
        ("nvidia/Nano-4B@refs/pr/3", ("nvidia/Nano-4B", "refs/pr/3")),
        ("a/b/c", None), ("./nano", None), ("../x", None), ("/etc/passwd", None), ("nano", None),
        ("nvidia/", None), ("nvidia/x@", None), ("nvidia/x y", None),
    ],
)  # fmt: skip
def test_repository_is_told_from_a_path(text: str, expected: tuple[str, str | None] | None) -> None:
    assert parse_repository(text) == expected
