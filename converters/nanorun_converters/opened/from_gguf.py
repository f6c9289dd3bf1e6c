"""A GGUF of whole numbers (BF16, F16, F32) as the source of a conversion.

Its tensors have their names and forms already, and its metadata is carried over as it stands, byte
by byte, but for the keys that the conversion changes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from nanorun.errors import ModelError
from nanorun.file_names import readable
from nanorun.model.arch import HybridArch
from nanorun.model.ggml_type import GgmlType
from nanorun.model.gguf import GgufFile, read_gguf
from nanorun.model.gguf_arch import arch_from_gguf
from nanorun.model.tensor_roles import check_tensors, expected_tensors, optional_tensors
from nanorun_converters.output.gguf_header import RawValue
from nanorun_converters.source.files import Store, local_file
from nanorun_converters.source.source_model import SourceModel, SourceTensor
from nanorun_converters.tensors.tensor_plan import TensorPlan

SUFFIX = ".gguf"
_DTYPES = {GgmlType.F32: "F32", GgmlType.F16: "F16", GgmlType.BF16: "BF16"}
# About the file that they are in, not about the model; or made anew for every file. What was padded
# stays padded, and what nobody understood stays so.
_NOT_CARRIED = re.compile(
    r"(split|nanorun(?!\.(padding|ignored_fields)$)|quantize\.imatrix)\..+|general\.alignment"
)
_NUMBER_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufFiles:
    """A GGUF in the place of a folder; it has no files of its own."""

    where: Path
    """The folder it lies in."""
    argument: str
    repository: str
    revision: str
    n_reads_ahead: int = 0

    def names(self) -> list[str]:
        """None."""
        return []

    def find(self, name: str) -> Store | None:
        """None, whatever the name."""
        return None

    def modified(self, name: str) -> int | None:
        """None: when a file was written says nothing here."""
        return None

    def give_up(self) -> None:
        """Nothing to do: a disk answers soon."""


@dataclass(frozen=True, slots=True)
class GgufSource:
    """What a GGUF gives to a conversion."""

    model: SourceModel
    arch: HybridArch
    tensors: list[TensorPlan]
    metadata: dict[str, RawValue]
    """What is carried over, by key."""
    has_template: bool
    """Whether it has a chat template that is not empty."""


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF rather than a folder."""
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def open_gguf(path: Path, *, keep_mtp: bool = True) -> GgufSource:
    """Read a GGUF, or all files of one that is split.

    Raises:
        ModelError: If it is damaged, no Nemotron-H model, or quantized already.
    """
    gguf = read_gguf(path)
    arch = arch_from_gguf(gguf)
    check_tensors(gguf, arch)
    tensors = _tensors_of(gguf)
    kept = arch if keep_mtp else replace(arch, n_layer_nextn=0)
    return GgufSource(
        model=_model(gguf, tensors),
        arch=kept,
        tensors=list(_plans(kept, tensors)),
        metadata=_carried(gguf),
        has_template=bool((gguf.find("tokenizer.chat_template", str) or "").strip()),
    )


def _tensors_of(gguf: GgufFile) -> dict[str, SourceTensor]:
    stores = {part.path: _store(part.path) for part in gguf.parts}
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in gguf.tensors.items():
        if tensor.type not in _DTYPES:
            raise ModelError(
                f"{tensor.path}: tensor {name!r}: expected f32, f16 or bf16, found"
                f" {tensor.type.label}",
                facts=["quantizing what is quantized already would lose twice"],
            )
        tensors[name] = SourceTensor(
            name, stores[tensor.path], _DTYPES[tensor.type], tensor.shape, tensor.offset,
            tensor.n_bytes,
        )  # fmt: skip
    return tensors


def _store(path: Path) -> Store:
    store = local_file(path)
    if store is None:
        raise ModelError(f"{path}: expected this file, found nothing there")
    return store


def _model(gguf: GgufFile, tensors: dict[str, SourceTensor]) -> SourceModel:
    repository = gguf.find("nanorun.source.repository", str) or readable(gguf.path.stem)
    files = GgufFiles(
        where=gguf.path.parent,
        argument=str(gguf.path),
        repository=repository,
        revision=gguf.find("nanorun.source.revision", str) or "",
    )
    stores = {tensor.store.name: tensor.store for tensor in tensors.values()}
    return SourceModel(files, tensors, tuple(stores[name] for name in sorted(stores)))


def _plans(arch: HybridArch, tensors: dict[str, SourceTensor]) -> Iterator[TensorPlan]:
    """The tensors in nanorun's order; a bias or a factor behind its weight."""
    optional = optional_tensors(arch)
    for spec in expected_tensors(arch).values():
        tensor = tensors[spec.name]
        is_stack = len(spec.shape) == 3
        parts = [tensor.part(i) for i in range(spec.shape[0])] if is_stack else [tensor]
        yield TensorPlan(spec, tuple(parts))
        stem = spec.name.removesuffix(".weight")
        for name in (f"{stem}.bias", f"{stem}.scale", f"{stem}.input_scale"):
            if name in optional and name in tensors:
                yield TensorPlan(optional[name], (tensors[name],))


def _carried(gguf: GgufFile) -> dict[str, RawValue]:
    """The value of every key that stays, as it stands in the file."""
    with gguf.path.open("rb") as stream:
        # The reader has checked all of it.
        raw = stream.read(gguf.data_offset)
    position, carried = 24, {}
    for key in gguf.metadata:
        start = _string_end(raw, position)
        position = _value_end(raw, start)
        if not _NOT_CARRIED.fullmatch(key):
            carried[key] = RawValue(raw[start:position])
    return carried


def _string_end(raw: bytes, position: int) -> int:
    (n_bytes,) = struct.unpack_from("<Q", raw, position)
    return int(position + 8 + n_bytes)


def _value_end(raw: bytes, position: int) -> int:
    """Where the value ends that starts, with its type, at `position`."""
    (type_id,) = struct.unpack_from("<I", raw, position)
    position += 4
    if type_id == _STRING:
        return _string_end(raw, position)
    if type_id != _ARRAY:
        return position + _NUMBER_BYTES[type_id]
    element, n = struct.unpack_from("<IQ", raw, position)
    position += 12
    if element != _STRING:
        return int(position + n * _NUMBER_BYTES[element])
    for _ in range(n):
        position = _string_end(raw, position)
    return position
