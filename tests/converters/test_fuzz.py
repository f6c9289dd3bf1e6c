"""Bad sources by the thousand: each ends in a clear error or a whole file, soon and in bounds."""

from __future__ import annotations

import json
import random
import resource
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from nanorun.errors import NanorunError
from nanorun.model.gguf import read_gguf
from nanorun_converters.convert import ConvertOptions, convert
from tests.support.mutating import mutated
from tests.support.quantized_sources import nvfp4_modelopt, write_quantized_model
from tests.support.source_models import write_source_model
from tests.support.waiting import little_work

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
MOST_CPU_S = 10.0
MAX_GROWTH_BYTES = 400 * 2**20

Mutation = Callable[[Path, random.Random], None]


def flip_bytes(name: str, n_first: int) -> Mutation:
    def mutate(folder: Path, rng: random.Random) -> None:
        raw = bytearray((folder / name).read_bytes())
        for _ in range(rng.choice([1, 1, 3, 20])):
            raw[rng.randrange(min(n_first, len(raw)))] = rng.randrange(256)
        (folder / name).write_bytes(raw)

    return mutate


def cut_or_extend(name: str) -> Mutation:
    def mutate(folder: Path, rng: random.Random) -> None:
        raw = (folder / name).read_bytes()
        if rng.random() < 0.7:
            raw = raw[: rng.choice([rng.randrange(len(raw)), rng.randrange(min(64, len(raw)))])]
        else:
            raw += rng.randbytes(rng.randrange(1, 100))
        (folder / name).write_bytes(raw)

    return mutate


def edit_json(name: str) -> Mutation:
    def mutate(folder: Path, rng: random.Random) -> None:
        value = mutated(json.loads((folder / name).read_text(encoding="utf-8")), rng)
        text = json.dumps(value)
        (folder / name).write_text(text, encoding="utf-8")

    return mutate


def edit_header(name: str) -> Mutation:
    def mutate(folder: Path, rng: random.Random) -> None:
        raw = (folder / name).read_bytes()
        n_header = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + n_header])
        text = json.dumps(mutated(header, rng)).encode()
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n_header :])

    return mutate


def reorder_header(folder: Path, rng: random.Random) -> None:
    raw = (folder / SHARD).read_bytes()
    n_header = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n_header])
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.sample(names, 2)
    field = rng.choice(["data_offsets", "shape", "dtype"])
    header[one][field], header[other][field] = header[other][field], header[one][field]
    text = json.dumps(header).encode()
    (folder / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n_header :])


def play_with_links(folder: Path, rng: random.Random) -> None:
    name = rng.choice([SHARD, INDEX, "config.json", "tokenizer.json"])
    (folder / name).unlink()
    target = rng.choice([name, "/dev/zero", "/dev/null", "..", "config.json", "/nowhere", "."])
    (folder / name).symlink_to(target)


MUTATIONS: dict[str, Mutation] = {
    "header bytes": flip_bytes(SHARD, 400),
    "header length": flip_bytes(SHARD, 8),
    "file size": cut_or_extend(SHARD),
    "header values": edit_header(SHARD),
    "header order": reorder_header,
    "index bytes": flip_bytes(INDEX, 10**9),
    "index values": edit_json(INDEX),
    "index size": cut_or_extend(INDEX),
    "config bytes": flip_bytes("config.json", 10**9),
    "config values": edit_json("config.json"),
    "config size": cut_or_extend("config.json"),
    "tokenizer values": edit_json("tokenizer.json"),
    "tokenizer config": edit_json("tokenizer_config.json"),
    "generation config": edit_json("generation_config.json"),
    "links": play_with_links,
}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def restore(folder: Path, files: dict[str, bytes]) -> None:
    for name, raw in files.items():
        path = folder / name
        if path.is_symlink():
            path.unlink()
        path.write_bytes(raw)


def run_case(folder: Path, out: Path, dry_run: bool) -> str:
    """Convert what is there; the class of the error, or "" if a whole file came out."""
    options = ConvertOptions(out=out, recipe="q8_0", force=True, dry_run=dry_run, n_threads=1)
    try:
        with little_work(MOST_CPU_S):
            convert(folder, options)
    except NanorunError as error:
        assert error.message and "\n" not in error.message
        assert not list(out.parent.iterdir()), "an error left something behind"
        return type(error).__name__
    if not dry_run:
        read_gguf(out)
        out.unlink()
    return ""


def fuzz(folder: Path, mutations: dict[str, Mutation], n_cases: int, seed: int) -> Counter[str]:
    """Run cases of each mutation; what they ended in."""
    out = folder.with_name("out") / "model.gguf"
    out.parent.mkdir(exist_ok=True)
    files = snapshot(folder)
    assert run_case(folder, out, dry_run=False) == "", "it must be good to begin with"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ends: Counter[str] = Counter()
    for name, mutate in mutations.items():
        rng = random.Random(f"{seed} {name}")
        for _ in range(n_cases):
            mutate(folder, rng)
            ends[run_case(folder, out, dry_run=rng.random() < 0.2)] += 1
            restore(folder, files)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < MAX_GROWTH_BYTES
    return ends


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source_model(
        tmp_path / "source", n_shards=2, vocab_size=296, hidden_size=32, num_attention_heads=1,
        mamba_num_heads=2, mamba_head_dim=32, moe_intermediate_size=32, n_routed_experts=3,
        moe_shared_expert_intermediate_size=32, mtp=True,
    )  # fmt: skip


def test_bad_sources_end_in_an_error(source: Path) -> None:
    ends = fuzz(source, MUTATIONS, n_cases=12, seed=0)
    assert ends["ModelError"] > 80


@pytest.mark.slow
def test_thousands_of_bad_sources_end_in_an_error(source: Path) -> None:
    ends = fuzz(source, MUTATIONS, n_cases=160, seed=1)
    assert sum(ends.values()) >= 2400
    assert ends["ModelError"] > 1200


@pytest.mark.parametrize(
    "n_cases", [20, pytest.param(250, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_bad_quantized_sources_end_in_an_error(n_cases: int, tmp_path: Path) -> None:
    folder, _ = write_quantized_model(
        tmp_path / "source", lambda name: nvfp4_modelopt if ".experts." in name else None,
        scheme={"quant_method": "modelopt", "quantized_layers": {"a": {"quant_algo": "FP8"}}},
        vocab_size=296, hidden_size=64, num_attention_heads=2, mamba_num_heads=2,
        n_routed_experts=2, moe_shared_expert_intermediate_size=32,
    )  # fmt: skip
    mutations = {
        "values": edit_header("model.safetensors"), "config": edit_json("config.json"),
    }  # fmt: skip
    ends = fuzz(folder, mutations, n_cases, seed=2)
    assert ends["ModelError"] > n_cases / 2
