"""`nanorun inspect`: what is in a GGUF file or a source model, without loading it."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanorun.cli import options as opt
from nanorun.cli.diagnostics import is_terminal, note, write_data, write_json
from nanorun.model.arch import HybridArch, LayerKind
from nanorun.model.footprint import kv_bytes_per_token, state_bytes, weights_bytes
from nanorun.model.gguf import GgufFile, read_gguf
from nanorun.model.gguf_arch import arch_from_gguf
from nanorun.model.tensor_roles import check_tensors, role_of
from nanorun.model.units import format_gib

if TYPE_CHECKING:
    from rich.table import Table

# Wide enough for the pattern of the largest model where no terminal says how wide it is.
_WIDTH_WITHOUT_TERMINAL = 160


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor as it is shown."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    role: str | None
    """None in a source model, whose tensors are not yet those of the engine."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What `inspect` shows of a model."""

    path: Path
    n_files: int
    """More than one where the model is split or in shards; `path` is the first, or their folder."""
    name: str
    arch: HybridArch
    n_params: int
    file_bytes: int
    weights_bytes: int
    recipe: str | None
    source: str | None
    padding: tuple[str, ...]
    tensors: tuple[TensorRow, ...]

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors."""
        return 8 * self.weights_bytes / max(1, self.n_params)


def command(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="GGUF file, folder of a source model, or library name (pico)."
        ),
    ],
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor (--json always does).")
    ] = False,
    as_json: opt.JsonOption = False,
) -> None:
    """Show what is in a GGUF file or a source model.

    Reads headers only, and checks them: a file that the engine would refuse is refused here, by
    the key or tensor that is wrong.
    """
    summary = summarize(path)
    if as_json:
        write_json(as_keys(summary))
    else:
        write_data(_render(summary, tensors))


def summarize(path_or_name: str) -> Summary:
    """Read the model that a path or a name of the library stands for.

    Raises:
        UsageError: If nothing is called so.
        ModelError: If the model is damaged, or none that nanorun runs.
    """
    from nanorun.library import CATALOG, resolve_model

    folder = Path(path_or_name)
    if path_or_name not in CATALOG and (folder / "config.json").is_file():
        return _summarize_source(folder)
    return _summarize_gguf(read_gguf(resolve_model(path_or_name)))


def as_keys(summary: Summary) -> dict[str, Any]:
    """The object that `--json` prints."""
    arch = summary.arch
    return {
        "path": str(summary.path),
        "n_files": summary.n_files,
        "arch": arch.name,
        "name": summary.name,
        "pattern": arch.pattern,
        "n_layer": arch.n_layer,
        "n_params": summary.n_params,
        "bytes": summary.file_bytes,
        "bpw": round(summary.bpw, 4),
        "n_ctx_train": arch.n_ctx_train,
        "hybrid": _hybrid_keys(arch),
        "recipe": summary.recipe,
        "source": summary.source,
        "padding": list(summary.padding),
        "types": dict(Counter(t.type for t in summary.tensors).most_common()),
        "tensors": [asdict(t) for t in summary.tensors],
    }


def _hybrid_keys(arch: HybridArch) -> dict[str, Any]:
    sizes = {name: getattr(arch, name) for name in _SIZES}
    return {
        "n_layer_ssm": arch.n_layers_of(LayerKind.SSM),
        "n_layer_attention": arch.n_layers_of(LayerKind.ATTENTION),
        "n_layer_mlp": arch.n_layers_of(LayerKind.MLP),
        "n_layer_moe": arch.n_layers_of(LayerKind.MOE),
        **sizes,
        "kv_bytes_per_token": kv_bytes_per_token(arch),
        "state_bytes": state_bytes(arch),
    }


_SIZES = (
    "n_layer_nextn", "n_vocab", "n_embd", "n_head", "n_head_kv", "n_embd_head",
    "ssm_d_conv", "ssm_d_inner", "ssm_d_state", "ssm_dt_rank", "ssm_n_group",
    "n_ff", "n_expert", "n_expert_used", "n_expert_shared", "n_ff_exp", "n_ff_shexp", "n_latent",
)  # fmt: skip


def _summarize_gguf(gguf: GgufFile) -> Summary:
    arch = arch_from_gguf(gguf)
    check_tensors(gguf, arch)
    return Summary(
        path=gguf.path,
        n_files=len(gguf.parts),
        name=gguf.find("general.name", str) or gguf.path.stem,
        arch=arch,
        n_params=gguf.n_params,
        file_bytes=gguf.file_bytes,
        weights_bytes=weights_bytes(gguf),
        recipe=gguf.find("nanorun.recipe", str),
        source=_source_of(gguf),
        padding=tuple(map(str, gguf.find("nanorun.padding", list) or ())),
        tensors=tuple(
            TensorRow(t.name, t.type.label, t.shape, t.n_bytes, role_of(t.name).value)
            for t in gguf.tensors.values()
        ),
    )


def _source_of(gguf: GgufFile) -> str | None:
    repository = gguf.find("nanorun.source.repository", str)
    revision = gguf.find("nanorun.source.revision", str)
    return f"{repository}@{revision}" if repository and revision else repository or None


def _summarize_source(folder: Path) -> Summary:
    from nanorun_converters.family.config import arch_from_config
    from nanorun_converters.opened.open_model import lacks_head
    from nanorun_converters.options import ConvertOptions
    from nanorun_converters.source.foreign_quantization import refuse_foreign_method
    from nanorun_converters.source.open import open_source
    from nanorun_converters.tensors.names import plan_tensors
    from nanorun_converters.tensors.tensor_plan import count_params

    source = open_source(folder)
    config = source.read_json("config.json")
    refuse_foreign_method(source, config)
    arch = arch_from_config(
        config, str(folder / "config.json"), keep_mtp=not lacks_head(source, config),
        again=ConvertOptions().again(str(folder)),
    )  # fmt: skip
    for text in source.notes:
        note(text)
    tensors = source.tensors.values()
    n_bytes = sum(t.n_bytes for t in tensors)
    return Summary(
        path=folder,
        n_files=len(source.stores),
        name=source.name,
        arch=arch,
        # Of what the tensors stand for: codes of 4 bits lie two in a byte, and have scales beside.
        n_params=count_params(plan_tensors(source, arch)),
        file_bytes=sum(store.n_bytes for store in source.stores),
        weights_bytes=n_bytes,
        recipe=None,
        source=source.repository,
        padding=(),
        tensors=tuple(
            TensorRow(t.name, t.dtype.lower(), t.shape, t.n_bytes, None) for t in tensors
        ),
    )


def _render(summary: Summary, with_tensors: bool) -> str:
    from rich.console import Console

    on_terminal = is_terminal(sys.stdout)
    width = shutil.get_terminal_size().columns if on_terminal else _WIDTH_WITHOUT_TERMINAL
    # No colour and no markup: names in the file are data, and the output may go into a pipe.
    console = Console(
        file=StringIO(), width=width, color_system=None, markup=False, highlight=False, emoji=False
    )
    console.print(_facts_table(summary))
    console.print()
    console.print(_tensor_table(summary.tensors) if with_tensors else _role_table(summary))
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _facts_table(summary: Summary) -> Table:
    table = _table("", "")
    for name, value in _facts(summary):
        table.add_row(name, value)
    table.show_header = False
    return table


def _facts(summary: Summary) -> Iterable[tuple[str, str]]:
    arch = summary.arch
    yield "name", summary.name
    others = f" (and {summary.n_files - 1} more)" if summary.n_files > 1 else ""
    yield "file", f"{summary.path}{others}"
    yield "arch", arch.name
    yield "layers", f"{arch.n_layer}: {_layer_counts(arch)}"
    yield "pattern", arch.pattern
    yield "parameters", f"{summary.n_params:,}"
    yield "size", f"{format_gib(summary.file_bytes)}, {summary.bpw:.2f} bits per weight"
    yield "recipe", summary.recipe or "not stated"
    if summary.source:
        yield "source", summary.source
    if summary.padding:
        yield "padding", ", ".join(summary.padding)
    yield "context", f"trained for {arch.n_ctx_train:,} tokens"
    yield "KV cache", f"{format_gib(kv_bytes_per_token(arch))} a token (f16)"
    yield "SSM state", f"{format_gib(state_bytes(arch))} a sequence"
    if arch.n_expert:
        yield "experts", _experts(arch)


def _layer_counts(arch: HybridArch) -> str:
    names = {
        LayerKind.SSM: "SSM (M)",
        LayerKind.ATTENTION: "attention (*)",
        LayerKind.MLP: "MLP (-)",
        LayerKind.MOE: "MoE (E)",
    }
    counts = [f"{arch.n_layers_of(kind)} {name}" for kind, name in names.items()]
    if arch.n_layer_nextn:
        counts.append(f"{arch.n_layer_nextn} MTP")
    return ", ".join(count for count in counts if not count.startswith("0 "))


def _experts(arch: HybridArch) -> str:
    used = sorted({arch.n_expert_used_at(i) for i in _moe_layers(arch)})
    span = f"{used[0]}" if len(used) == 1 else f"{used[0]} to {used[-1]}"
    return f"{span} of {arch.n_expert} used, {arch.n_expert_shared} shared"


def _moe_layers(arch: HybridArch) -> list[int]:
    return [i for i, kind in enumerate(arch.layers) if kind is LayerKind.MOE]


def _role_table(summary: Summary) -> Table:
    """What each role's tensors became, most bytes first."""
    n_tensors: Counter[tuple[str, str]] = Counter()
    n_bytes: Counter[tuple[str, str]] = Counter()
    for tensor in summary.tensors:
        key = (tensor.role or "all", tensor.type)
        n_tensors[key] += 1
        n_bytes[key] += tensor.bytes
    table = _table("role", "type", "tensors", "size", numbers=2)
    for key, size in n_bytes.most_common():
        table.add_row(*key, str(n_tensors[key]), format_gib(size))
    return table


def _tensor_table(tensors: Iterable[TensorRow]) -> Table:
    table = _table("tensor", "role", "type", "shape", "size", numbers=1)
    for t in tensors:
        shape = " x ".join(map(str, t.shape))
        table.add_row(t.name, t.role or "", t.type, shape, format_gib(t.bytes))
    return table


def _table(*titles: str, numbers: int = 0) -> Table:
    """A table without lines whose last `numbers` columns are aligned right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, title in enumerate(titles):
        is_number = i >= len(titles) - numbers
        table.add_column(title, justify="right" if is_number else "left", overflow="fold")
    return table
