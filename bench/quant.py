"""What recipes, padding and the search are worth on pico: bytes against KL divergence.

    python bench/quant.py [--work FOLDER] [--part presets|search|sensitivity] [--scale 0.92]
                          [--quantizer ggml|torch] [--feedback auto|never] [--fixed q4 iq4_nl ...]

Reference: pico in F32. Imatrix: `nanorun.runtime.measure.imatrix` on one half of the conversations,
with sensitivities measured on 8 chunks of it, and Gram matrices; the KL divergence is of the other
half, control tokens parsed, in chunks of 512, by the method of llama-perplexity. `llama.cpp` rows
are made by its `llama_model_quantize`, with the same imatrix, from the unpadded F32 file, so they
hold its fallbacks; `padded` rows are the same preset on padded shapes, `auto` rows what nanorun
makes of it; `searched` rows have the size of the recipe or of llama.cpp's file above, times
`--scale`, and are encoded by `--quantizer` with `--feedback`; others by ggml, as `llama-quantize`
does, but for
`with feedback`. `sensitivity` encodes one tensor at a time and compares its KL divergence with the
prediction.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "scripts")]

from nanorun.chat.template import ChatTemplate  # noqa: E402
from nanorun.model.chat import Message  # noqa: E402
from nanorun.model.engine_options import EngineOptions  # noqa: E402
from nanorun.model.ggml_type import GgmlType  # noqa: E402
from nanorun.runtime.llama.binding import load_llama  # noqa: E402
from nanorun.runtime.measure.divergence import measure  # noqa: E402
from nanorun.runtime.measure.imatrix import collect_imatrix  # noqa: E402
from nanorun.runtime.measure.perplexity import Source  # noqa: E402
from nanorun.runtime.measure.sensitivity import measure_sensitivity  # noqa: E402
from nanorun_converters.conversion_plan import plan_conversion  # noqa: E402
from nanorun_converters.convert import ConvertOptions, convert, write_plan  # noqa: E402
from nanorun_converters.types.importance import importance  # noqa: E402
from nanorun_converters.types.search import Measure  # noqa: E402
from nanorun_quant.imatrix import Imatrix  # noqa: E402
from nanorun_quant.imatrix_file import read_imatrix  # noqa: E402

SOURCE = ROOT / "nanorun" / "data" / "pico"
# llama_ftype of llama.h.
PRESETS = {"Q4_K_M": 15, "Q3_K_M": 12, "Q2_K": 10}
N_SENSITIVITY = 8
FIXED = ("q8", "q6", "q5", "q4", "q3", "q2", "12g", "24g", "mxfp4_moe", "q4_0", "iq4_nl")


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    label: str
    path: Path
    padding: str = ""


def conversations(source: Path, seed: int, n: int) -> str:
    """Pico's own kind of text, as its template renders it."""
    from pico_tasks import draw

    template = ChatTemplate((source / "chat_template.jinja").read_text(), name="pico")
    rng = random.Random(seed)
    texts = []
    for _ in range(n):
        conversation = draw(rng)
        messages = [
            Message(m["role"], m["content"], thinking=m.get("reasoning_content"))
            for m in conversation.messages
        ]
        texts.append(
            template.render(
                messages, enable_thinking=conversation.enable_thinking,
                truncate_history_thinking=False, add_generation_prompt=False,
            ).text
        )  # fmt: skip
    return "".join(texts)


def quantize_with_llama(source: Path, out: Path, ftype: int, imatrix: Imatrix) -> None:
    """What llama-quantize makes of the unpadded file, fallbacks and all."""
    llama = load_llama()
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, 1
    rows = (llama.llama_model_imatrix_data * (len(imatrix.entries) + 1))()
    kept = []
    for row, (name, entry) in zip(rows, imatrix.entries.items(), strict=False):
        means = [imatrix.weights(name, i, entry.sums.shape[1]) for i in range(len(entry.sums))]
        values = (ctypes.c_float * entry.sums.size)(*[float(v) for m in means for v in m])
        kept.append(values)
        row.name, row.size = name.encode(), entry.sums.size
        row.data = ctypes.cast(values, ctypes.POINTER(ctypes.c_float))
    params.imatrix = rows
    status = llama.llama_model_quantize(
        str(source).encode(), str(out).encode(), ctypes.byref(params)
    )
    assert status == 0, f"llama_model_quantize failed with {status}"


def presets(work: Path, imatrix: Path, args: argparse.Namespace) -> Iterator[Entry]:
    """Each preset as llama.cpp makes it, without fallbacks, and a search at the first's size."""
    for name, ftype in PRESETS.items():
        theirs = work / f"{name}-llama.cpp.gguf"
        quantize_with_llama(work / "f32.gguf", theirs, ftype, read_imatrix(imatrix))
        yield Entry(f"{name} llama.cpp", theirs)
        for label, pad in (("auto", "auto"), ("padded", "always")):
            out = work / f"{name}-{label}.gguf"
            options = ConvertOptions(
                out=out, recipe=name, imatrix=imatrix, pad=pad, quantizer="ggml",
                feedback="never", force=True,
            )  # fmt: skip
            result = convert(SOURCE, options)
            sizes = " ".join(f"{k} {a}->{b}" for k, (a, b) in result.padding.items())
            yield Entry(f"{name} {label}", out, sizes)
            yield from with_feedback(options, args)
        yield searched(work, name, theirs, imatrix, args)


def with_feedback(options: ConvertOptions, args: argparse.Namespace) -> Iterator[Entry]:
    """The same file with error feedback, unless that is not wanted."""
    if args.feedback == "auto":
        assert options.out is not None
        out = options.out.with_name(f"{options.out.stem}-feedback.gguf")
        convert(SOURCE, replace(options, out=out, feedback="auto"))
        yield Entry("  with feedback", out)


def recipes(work: Path, imatrix: Path, args: argparse.Namespace) -> Iterator[Entry]:
    """Each fixed recipe, and the search at its size."""
    for name in args.fixed:
        out = work / f"{name}.gguf"
        options = ConvertOptions(
            out=out, recipe=name, imatrix=imatrix, quantizer="ggml", feedback="never", force=True
        )
        convert(SOURCE, options)
        yield Entry(name, out)
        yield from with_feedback(options, args)
        yield searched(work, name, out, imatrix, args)


def sensitivity(work: Path, imatrix: Path, text: str, options: EngineOptions) -> None:
    """Print, for each tensor alone as Q4_0 and as Q2_0, what was predicted and what came."""
    exact = ConvertOptions(recipe="f32", imatrix=imatrix, feedback="never")
    plan = plan_conversion(SOURCE, exact)
    measured = Measure(plan.quantizer.open(), plan.imatrix)
    factors = importance(plan.arch, measured.powers(plan.tensors))
    rows, paths = [], []
    for type_ in (GgmlType.Q4_0, GgmlType.Q2_0):
        for tensor in plan.tensors:
            name = tensor.spec.name
            if name in factors:
                path = work / f"{type_.label}-{name}.gguf"
                alone = replace(tensor, type=type_, reason="alone")
                tensors = tuple(alone if t is tensor else t for t in plan.tensors)
                one = replace(plan, tensors=tensors, out=path)
                write_plan(one, ConvertOptions(out=path, force=True))
                paths.append(path)
                predicted = factors[name] * measured.relative_error(tensor, type_)
                rows.append((type_.label, name, predicted))
    results = measure(work / "f32.gguf", paths, text, 512, options, special=True)
    ratios = [r.kld_mean / row[2] for r, row in zip(results, rows, strict=True)]
    scale = statistics.median(ratios)
    print("| type | tensor | KLD mean | predicted | ratio |\n|---|---|---|---|---|")
    for row, result, ratio in zip(rows, results, ratios, strict=True):
        predicted = row[2] * scale
        print(f"| {row[0]} | {row[1]} | {result.kld_mean:.6f} | {predicted:.6f} |"
              f" {ratio / scale:.2f} |")  # fmt: skip
    for label, is_attention in (("attention", True), ("all others", False)):
        some = [r / scale for r, row in zip(ratios, rows, strict=True)
                if ("attn_" in row[1]) is is_attention]  # fmt: skip
        near = sum(0.25 <= r <= 4 for r in some)
        print(f"{label}: {near} of {len(some)} within a factor of 4")


def searched(work: Path, name: str, like: Path, imatrix: Path, args: argparse.Namespace) -> Entry:
    """The searched file of another one's size, times `--scale`."""
    out = work / f"{name}-searched.gguf"
    options = ConvertOptions(
        out=out, target_bytes=int(args.scale * like.stat().st_size), imatrix=imatrix, pad="never",
        quantizer=args.quantizer, feedback=args.feedback, force=True,
    )  # fmt: skip
    convert(SOURCE, options)
    return Entry("  searched", out)


def main() -> None:
    """Make the files, measure them, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("bench-quant"))
    parser.add_argument("--conversations", type=int, default=150)
    parser.add_argument("--part", choices=("presets", "search", "sensitivity"), default="search")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--quantizer", choices=("ggml", "torch"), default="ggml")
    parser.add_argument("--feedback", choices=("auto", "never"), default="auto")
    parser.add_argument("--fixed", nargs="+", default=FIXED)
    args = parser.parse_args()
    args.work.mkdir(exist_ok=True)
    reference, imatrix = args.work / "f32.gguf", args.work / "imatrix.gguf"
    convert(SOURCE, ConvertOptions(out=reference, recipe="f32", force=True))
    imatrix.unlink(missing_ok=True)
    options = EngineOptions(n_threads=1)
    text = conversations(SOURCE, 1, args.conversations)
    collect_imatrix(reference, text, "pico", imatrix, 512, options, special=True, grams=True)
    measure_sensitivity(reference, Source(text, 512, special=True), imatrix, N_SENSITIVITY, options)
    if args.part == "sensitivity":
        sensitivity(args.work, imatrix, conversations(SOURCE, 2, args.conversations), options)
        return
    make = presets if args.part == "presets" else recipes
    entries = list(make(args.work, imatrix, args))
    paths = [entry.path for entry in entries]
    results = measure(
        reference, paths, conversations(SOURCE, 2, args.conversations), 512, options, special=True
    )
    print("| file | bytes | bpw | KLD mean | KLD p99 | same top | padding |")
    print("|---|---|---|---|---|---|---|")
    for entry, r in zip(entries, results, strict=True):
        print(
            f"| {entry.label} | {r.bytes} | {r.bpw:.2f} | {r.kld_mean:.5f} | {r.kld_p99:.3f} |"
            f" {r.top1_agreement:.2%} | {entry.padding} |"
        )


if __name__ == "__main__":
    main()
