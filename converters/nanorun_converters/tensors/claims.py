"""Looking up the tensors of a source model by name, and accounting for every one of them.

A weight may be stored as numbers or as codes with scales beside them; whatever belongs to it is
claimed with it. What nobody claims is refused at the end, because leaving it out could change what
the model computes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from typing import NoReturn

from nanorun.errors import ModelError
from nanorun_converters.source.encodings import (
    FP8_DTYPES,
    NVFP4_GROUP,
    Fp8Tensor,
    Nvfp4Tensor,
    Part,
)
from nanorun_converters.source.policy import unmerged_adapter
from nanorun_converters.source.source_model import (
    READABLE_DTYPES,
    UNKNOWN_DTYPE,
    SourceModel,
    SourceTensor,
)

Shape = tuple[int, ...]

# Roots of the trunk's names: `backbone.` on the Hub, `model.` where transformers or PEFT saved it,
# and both below the language part of a model with eyes or ears.
_ROOTS = ("", "language_model.", "model.language_model.")
_TRUNKS = ("backbone.", "model.")
EMBEDDINGS = ("embeddings.weight", "embedding.weight", "embed_tokens.weight")
"""Within the trunk: NVIDIA's name, mamba's own, and that of transformers' other models."""
# Made anew from the config when a model is opened; old versions of transformers saved them.
_BUFFER = re.compile(
    r"(?:.+\.)?(?:rotary_emb\.\w+|inv_freq|position_ids|causal_mask|attention_mask"
    r"|num_batches_tracked)"
)
_ADAPTER = re.compile(r"(?:^|\.)(?:base_layer|lora_\w+|modules_to_save)\.")
# Calibration of activations and of an FP8 KV cache. The engine keeps both in their own precision.
_CALIBRATION = re.compile(
    r".+\.(input_scale|input_global_scale|(?:[qkv]_proj\.)?[qkv]_scale|output_scale)"
)
# Of 128 rows and columns, as every block-wise FP8 checkpoint has them.
_FP8_BLOCK = 128


class Claims:
    """The tensors of a source model, and which of them have a use."""

    def __init__(self, source: SourceModel) -> None:
        self.source = source
        self._refuse_adapter()
        self.root, self.trunk = self._prefixes()
        self._used: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this full name."""
        return name in self.source.tensors

    def weight(self, names: Sequence[str], shape: Shape) -> Part:
        """The weight under the first of `names` that exists, in whatever encoding.

        Raises:
            ModelError: If there is none, or it or its scales are not as they must be.
        """
        for name in names:
            if self.has(name):
                return self._decodable(name, shape)
            packed = f"{name}_packed"
            if self.has(packed):
                return self._nvfp4(name.removesuffix(".weight"), packed, shape)
        return self.plain(names[0], shape)  # which says what is missing

    def plain(self, name: str, shape: Shape) -> SourceTensor:
        """The tensor called `name`, which must hold plain numbers."""
        return self._take(name, shape, READABLE_DTYPES)

    def leave_out(self, prefix: str) -> int:
        """Give up the tensors below `prefix` on purpose; how many there are."""
        dropped = {name for name in self.source.tensors if name.startswith(prefix)}
        self._used |= dropped
        return len(dropped)

    def refuse_unused(self, what: str, *, ignore: Sequence[str] = ()) -> None:
        """Refuse a source that holds more than was asked for.

        Raises:
            ModelError: Naming the first such tensor, and `what` has no such.
        """
        unused = set(self.source.tensors) - self._used - set(ignore)
        if self.root:
            # Beside a language part there are parts that see and hear, which no GGUF of it has.
            unused = {name for name in unused if name.startswith(self.root)}
        modules = _modules_of(self._used)
        unused = {name for name in unused if not _is_calibration(name, modules)}
        unused = {name for name in unused if not _BUFFER.fullmatch(name)}
        if unused:
            raise ModelError(
                f"{self.source.origin}: tensor {min(unused)!r} is none that {what} has",
                facts=[f"{len(unused)} such tensors, and leaving them out could change answers"],
            )

    def _prefixes(self) -> tuple[str, str]:
        for root in _ROOTS:
            for trunk in _TRUNKS:
                names = (f"{root}{trunk}{name}{s}" for name in EMBEDDINGS for s in ("", "_packed"))
                if any(map(self.has, names)):
                    return root, root + trunk
        name = f"{_TRUNKS[0]}{EMBEDDINGS[0]}"
        raise ModelError(
            f"{self.source.origin}: expected tensor {name!r}, found no such tensor",
            facts=self._nearest(name),
        )

    def _refuse_adapter(self) -> None:
        names = (name for name in self.source.tensors if _ADAPTER.search(name))
        if (name := next(names, None)) is not None:
            where = str(self.source.origin / self.source.tensors[name].store.name)
            raise unmerged_adapter(where, self.source.files.argument, name)

    def _nearest(self, name: str) -> list[str]:
        """What a missing tensor may be called instead, for people to see what they have."""
        names = list(self.source.tensors)
        found = difflib.get_close_matches(name, names, n=4, cutoff=0.5) or names[:3]
        return [f"nearest of {len(names)}: {', '.join(found)}"]

    def _decodable(self, name: str, shape: Shape) -> Part:
        tensor = self.source.tensors[name]
        stem = name.removesuffix(".weight")
        is_unknown = tensor.dtype == UNKNOWN_DTYPE
        if tensor.dtype in ("U8", "F4") or (is_unknown and self.has(f"{stem}.weight_scale_2")):
            return self._nvfp4(stem, name, shape)
        if tensor.dtype in FP8_DTYPES or (is_unknown and self.has(f"{stem}.weight_scale")):
            return self._fp8(stem, name, shape)
        return self._take(name, shape, READABLE_DTYPES)

    def _fp8(self, stem: str, name: str, shape: Shape) -> Fp8Tensor:
        weight = self._take(name, shape, FP8_DTYPES)
        if len(shape) != 2:
            self._refuse(weight, "plain numbers where there are no rows", weight.dtype)
        scale_name = f"{stem}.weight_scale"
        if not self.has(scale_name):
            # DeepSeek's spelling; it multiplies all the same.
            scale_name += "_inv" if self.has(f"{scale_name}_inv") else ""
        if not self.has(scale_name):
            self._refuse(weight, f"its scale {scale_name!r}", "no such tensor")
        n_rows, n_columns = shape
        whole = (n_rows, n_columns)
        blocks = {
            (): whole,
            (1,): whole,
            (1, 1): whole,
            (n_rows,): (1, n_columns),
            (n_rows, 1): (1, n_columns),
            (-(-n_rows // _FP8_BLOCK), -(-n_columns // _FP8_BLOCK)): (_FP8_BLOCK, _FP8_BLOCK),
        }
        scale = self.source.tensors[scale_name]
        if scale.dtype == UNKNOWN_DTYPE:
            return Fp8Tensor(weight, self._take(scale_name, (), READABLE_DTYPES), whole)
        if scale.shape not in blocks:
            self._refuse(
                scale,
                f"one scale in all, one a row, or one for {_FP8_BLOCK} x {_FP8_BLOCK} elements of"
                f" {list(shape)}",
                str(list(scale.shape)),
            )
        found = self._take(scale_name, scale.shape, READABLE_DTYPES)
        return Fp8Tensor(weight, found, blocks[scale.shape])

    def _nvfp4(self, stem: str, name: str, shape: Shape) -> Nvfp4Tensor:
        n_columns = shape[-1]
        if len(shape) != 2 or n_columns % NVFP4_GROUP:
            tensor = self.source.tensors[name]
            expected = f"shape {list(shape)}, whose rows NVFP4's groups of 16 do not divide"
            self._refuse(tensor, expected, f"{tensor.dtype} {list(tensor.shape)}")
        is_divisor = self.has(f"{stem}.weight_global_scale")
        factor = "weight_global_scale" if is_divisor else "weight_scale_2"
        calibration = f"{stem}.{'input_global_scale' if is_divisor else 'input_scale'}"
        return Nvfp4Tensor(
            codes=self._codes(name, shape),
            scales=self._take(
                f"{stem}.weight_scale", (shape[0], n_columns // NVFP4_GROUP), ("F8_E4M3",)
            ),
            factor=self._scalar(f"{stem}.{factor}"),
            is_divisor=is_divisor,
            input_scale=self._scalar(calibration) if self.has(calibration) else None,
        )

    def _codes(self, name: str, shape: Shape) -> SourceTensor:
        """Two codes a byte, whether the file counts bytes (U8) or codes (F4)."""
        packed = (shape[0], shape[1] // 2)
        if self.has(name) and self.source.tensors[name].dtype == "F4":
            return replace(self._take(name, shape, ("F4",)), dtype="U8", shape=packed)
        return self._take(name, packed, ("U8",))

    def _scalar(self, name: str) -> SourceTensor:
        found = self.source.tensors.get(name)
        shape = found.shape if found is not None and found.n_elements == 1 else ()
        return self._take(name, shape, ("F32",))

    def _take(self, name: str, shape: Shape, dtypes: Sequence[str]) -> SourceTensor:
        tensor = self.source.tensors.get(name)
        if tensor is None:
            raise ModelError(
                f"{self.source.origin}: tensor {name!r}: expected shape {list(shape)},"
                " found no such tensor",
                facts=self._nearest(name),
            )
        self._used.add(name)
        if tensor.dtype == UNKNOWN_DTYPE:
            return tensor.assumed(dtypes[0], shape)
        if tensor.shape != shape:
            self._refuse(tensor, f"shape {list(shape)}", str(list(tensor.shape)))
        if tensor.dtype not in dtypes:
            self._refuse(tensor, f"a dtype of {' '.join(dtypes)}", tensor.dtype)
        return tensor

    def _refuse(self, tensor: SourceTensor, expected: str, found: str) -> NoReturn:
        path = self.source.origin / tensor.store.name
        raise ModelError(f"{path}: tensor {tensor.name!r}: expected {expected}, found {found}")


def _modules_of(names: Iterable[str]) -> set[str]:
    """Every module that one of `names` lies in."""
    modules: set[str] = set()
    for name in names:
        while (name := name.rpartition(".")[0]) and name not in modules:
            modules.add(name)
    return modules


def _is_calibration(name: str, modules: Container[str]) -> bool:
    # Only beside a weight that is used: in a module of its own it would be something else.
    found = _CALIBRATION.fullmatch(name)
    return found is not None and name.removesuffix(f".{found[1]}") in modules
