"""One pass against two steps: nanorun beside llama.cpp's converter and quantizer, on one source.

    python bench/convert.py --llama-cpp PATH/vendor/llama.cpp

The source is random, of Nano's proportions, with rows that are multiples of 256, so that the other
side falls back nowhere. Each side runs in a process of its own; wall time, the most memory it had
resident and the most disk it took (the source left out) are printed side by side.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.converters.upstream import converter_command  # noqa: E402
from tests.support.source_models import DEFAULT_SIZES, model_config, write_json, write_tokenizer  # noqa: E402

PATTERN = "MEMEM*EMEME"
# Nano's, scaled: experts hold nine of ten weights, and are 0.7 times as wide as the model.
SIZES = DEFAULT_SIZES | {
    "vocab_size": 32768, "hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 128, "mamba_num_heads": 24, "mamba_head_dim": 64, "ssm_state_size": 128,
    "n_groups": 8, "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 768,
    "moe_shared_expert_intermediate_size": 1536,
}  # fmt: skip
FILE_TYPES = {"q4_k": 14, "mxfp4": 38, "q5_0": 8, "q4_0": 2, "q8_0": 7, "iq4_nl": 25}
# What the other side can only do in two steps, and what its converter writes directly.
DIRECT = ("q8_0",)
TARGETS = {"q4_k": 0.92, "mxfp4": 0.4, "q8_0": 0.6}

OURS = """
import sys
from pathlib import Path
from nanorun_converters.convert import ConvertOptions, convert
options = ConvertOptions(
    out=Path(sys.argv[2]), recipe=sys.argv[3], quantizer="ggml", n_threads=int(sys.argv[4])
)
convert(Path(sys.argv[1]), options)
"""
QUANTIZE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.converters.upstream import quantize_with_llama
quantize_with_llama(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
"""


@dataclass(frozen=True, slots=True)
class Run:
    """What one side took."""

    seconds: float
    rss_bytes: int
    disk_bytes: int


def main() -> None:
    """Make the source, run both sides on each type, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-cpp", type=Path, required=True, help="folder of its sources")
    parser.add_argument("--types", default="q4_k,mxfp4,q8_0")
    parser.add_argument("--experts", type=int, default=128, help="fewer make a smaller source")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=None, help="where the files go for the while")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench-convert-", dir=options.work))
    try:
        source = work / "source"
        # In a process of its own: what this one once held would count for those it starts.
        maker = multiprocessing.get_context("spawn").Process(
            target=write_source, args=(source, SIZES | {"n_routed_experts": options.experts})
        )
        maker.start()
        maker.join()
        n_bytes = sum(path.stat().st_size for path in source.iterdir())
        print(f"source: {n_bytes / 1e9:.2f} GB BF16, {PATTERN}; {options.threads} threads\n")
        print(f"{'type':7} {'side':8} {'wall s':>8} {'RSS MiB':>8} {'disk MiB':>9}")
        for type_ in options.types.split(","):
            compare(type_, source, work, options.llama_cpp, options.threads)
    finally:
        shutil.rmtree(work)


def compare(type_: str, source: Path, work: Path, llama_cpp: Path, n_threads: int) -> None:
    """Run both sides on one type and print them."""
    out = work / "out"
    ours = measured(out, [[sys.executable, "-c", OURS, source, out / "o", type_, n_threads]])
    n_bytes = (out / "o").stat().st_size
    shutil.rmtree(out)
    if type_ in DIRECT:
        steps = [converter_command(llama_cpp, source, out / "t", type_)]
    else:
        steps = [
            converter_command(llama_cpp, source, out / "b", "bf16"),
            [sys.executable, "-c", QUANTIZE, ROOT, out / "b", out / "t", FILE_TYPES[type_],
             n_threads],
        ]  # fmt: skip
    theirs = measured(out, steps)
    shutil.rmtree(out)
    for side, run in (("nanorun", ours), ("llama", theirs)):
        mib = run.rss_bytes / 2**20, run.disk_bytes / 2**20
        print(f"{type_:7} {side:8} {run.seconds:8.1f} {mib[0]:8.0f} {mib[1]:9.0f}")
    extra = (ours.disk_bytes - n_bytes) / 2**20
    print(
        f"{type_:7} {'ratio':8} {ours.seconds / theirs.seconds:8.2f}"
        f" {ours.rss_bytes / theirs.rss_bytes:8.2f} {ours.disk_bytes / theirs.disk_bytes:9.2f}"
        f"   (wall wanted: {TARGETS.get(type_, 1)}; disk beyond the output: {extra:.0f} MiB)\n",
        flush=True,
    )


def measured(out: Path, steps: list[list[object]]) -> Run:
    """Run commands one after the other."""
    out.mkdir()
    with _DiskWatch(out) as watch:
        started = time.monotonic()
        rss = 0
        for step in steps:
            process = subprocess.Popen(
                [str(arg) for arg in step], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            assert process.stderr
            said = process.stderr.read()
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(f"{step[:2]} failed:\n{said.decode()[-2000:]}")
            rss = max(rss, usage.ru_maxrss * 1024)
        seconds = time.monotonic() - started
    return Run(seconds, rss, watch.most)


class _DiskWatch:
    """The most bytes that a folder took, looked at ten times a second."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most = folder, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> _DiskWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self._look()

    def _look(self) -> None:
        n_bytes = 0
        for path in self.folder.iterdir():
            try:
                n_bytes += path.stat().st_blocks * 512
            except OSError:  # Renamed just now.
                continue
        self.most = max(self.most, n_bytes)


def write_source(folder: Path, sizes: dict[str, object]) -> Path:
    """A random source model, tensor by tensor, so that it may be larger than memory."""
    folder.mkdir()
    config = model_config(PATTERN, sizes)
    write_json(folder / "config.json", config)
    write_tokenizer(folder, int(config["vocab_size"]))
    shapes = dict(tensor_shapes(config))
    directory, end = {}, 0
    for name, shape in shapes.items():
        first, end = end, end + 2 * int(np.prod(shape))
        directory[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [first, end]}
    header = json.dumps(directory).encode()
    header += b" " * (-len(header) % 8)
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes.items():
            values = rng.standard_normal(int(np.prod(shape)), dtype=np.float32)
            values *= 1.0 if len(shape) == 1 else shape[-1] ** -0.5
            if name.endswith("A_log"):
                np.abs(values, out=values)
            stream.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())
    return folder


def tensor_shapes(config: dict[str, object]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a source model with its shape, without making any."""

    def size(name: str) -> int:
        return int(str(config[name]))

    n_embd, n_vocab = size("hidden_size"), size("vocab_size")
    n_ssm = size("mamba_num_heads")
    d_inner = n_ssm * size("mamba_head_dim")
    n_channels = d_inner + 2 * size("n_groups") * size("ssm_state_size")
    head, width = size("head_dim"), size("moe_intermediate_size")
    shared = size("moe_shared_expert_intermediate_size")
    n_q, n_kv = size("num_attention_heads") * head, size("num_key_value_heads") * head
    mixers: dict[str, dict[str, tuple[int, ...]]] = {
        "M": {
            "in_proj.weight": (d_inner + n_channels + n_ssm, n_embd),
            "conv1d.weight": (n_channels, 1, size("conv_kernel")), "conv1d.bias": (n_channels,),
            "A_log": (n_ssm,), "D": (n_ssm,), "dt_bias": (n_ssm,), "norm.weight": (d_inner,),
            "out_proj.weight": (n_embd, d_inner),
        },
        "*": {
            "q_proj.weight": (n_q, n_embd), "k_proj.weight": (n_kv, n_embd),
            "v_proj.weight": (n_kv, n_embd), "o_proj.weight": (n_embd, n_q),
        },
        "E": {
            "gate.weight": (size("n_routed_experts"), n_embd),
            "gate.e_score_correction_bias": (size("n_routed_experts"),),
            "shared_experts.up_proj.weight": (shared, n_embd),
            "shared_experts.down_proj.weight": (n_embd, shared),
        },
    }  # fmt: skip
    for i in range(size("n_routed_experts")):
        mixers["E"][f"experts.{i}.up_proj.weight"] = (width, n_embd)
        mixers["E"][f"experts.{i}.down_proj.weight"] = (n_embd, width)
    yield "backbone.embeddings.weight", (n_vocab, n_embd)
    for i, kind in enumerate(PATTERN):
        yield f"backbone.layers.{i}.norm.weight", (n_embd,)
        for name, shape in mixers[kind].items():
            yield f"backbone.layers.{i}.mixer.{name}", shape
    yield "backbone.norm_f.weight", (n_embd,)
    yield "lm_head.weight", (n_vocab, n_embd)


if __name__ == "__main__":
    main()
