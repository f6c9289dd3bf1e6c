"""Files for tests, good and bad, made without the code under test."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from nanorun.model.arch import HybridArch, LayerKind
from nanorun.model.ggml_type import GgmlType
from nanorun.model.tensor_roles import expected_tensors


@dataclass(frozen=True)
class Raw:
    """A metadata value as it stands in the file: type id and payload, right or wrong."""

    type_id: int
    payload: bytes


@dataclass(frozen=True)
class Tensor:
    """A tensor to write; `data` of None is zeros, `offset` of None follows the one before."""

    name: str | bytes
    type: int
    shape: tuple[int, ...]
    data: bytes | None = None
    offset: int | None = None


def write_gguf(
    path: Path,
    kv: Mapping[str, Any] | Iterable[tuple[str | bytes, Any]] = (),
    tensors: Iterable[Tensor] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_kv: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
    with_data: bool = True,
) -> Path:
    """Write a GGUF; the keyword arguments and `Raw` and `Tensor` values can make it a bad one.

    Python values become: bool BOOL, int UINT32 (UINT64 or INT64 if it does not fit), float FLOAT32,
    str STRING, list an array of its first element's type.
    """
    pairs = list(kv.items() if isinstance(kv, Mapping) else kv)
    tensors = list(tensors)
    counts = (
        len(tensors) if n_tensors is None else n_tensors,
        len(pairs) if n_kv is None else n_kv,
    )
    head = magic + struct.pack("<I", version) + struct.pack("<QQ", *counts)
    for key, value in pairs:
        head += gguf_string(key) + gguf_value(value)
    data = b""
    for tensor in tensors:
        head += gguf_string(tensor.name) + struct.pack("<I", len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        offset = len(data) if tensor.offset is None else tensor.offset
        head += struct.pack("<IQ", tensor.type, offset)
        data += _padded(_data_of(tensor), alignment)
    path.write_bytes(_padded(head, alignment) + data if with_data else head)
    return path


def gguf_string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def gguf_value(value: Any) -> bytes:
    if isinstance(value, Raw):
        return struct.pack("<I", value.type_id) + value.payload
    if isinstance(value, list):
        if any(type(element) is int and element < 0 for element in value):
            return struct.pack(f"<IIQ{len(value)}q", 9, 11, len(value), *value)
        type_id = _payload(value[0])[0] if value else 4
        payload = b"".join(_payload(element)[1] for element in value)
        return struct.pack("<IIQ", 9, type_id, len(value)) + payload
    type_id, payload = _payload(value)
    return struct.pack("<I", type_id) + payload


def _payload(value: Any) -> tuple[int, bytes]:
    match value:
        case bool():
            return 7, struct.pack("<B", value)
        case int() if value < 0:
            return 11, struct.pack("<q", value)
        case int() if value >= 2**32:
            return 10, struct.pack("<Q", value)
        case int():
            return 4, struct.pack("<I", value)
        case float():
            return 6, struct.pack("<f", value)
        case _:
            return 8, gguf_string(value)


def _data_of(tensor: Tensor) -> bytes:
    if tensor.data is not None:
        return tensor.data
    *outer, n_per_row = tensor.shape
    return bytes(prod(outer) * GgmlType(tensor.type).row_bytes(n_per_row))


def _padded(data: bytes, alignment: int) -> bytes:
    return data + bytes(-len(data) % alignment)


def gguf_metadata(arch: HybridArch) -> dict[str, Any]:
    """The keys a GGUF of `arch` carries, with a vocabulary of `n_vocab` made-up tokens."""
    nextn = arch.n_layer_nextn
    wide = (LayerKind.MLP, LayerKind.MOE)
    n_ff = [(arch.n_ff or arch.n_ff_exp) if kind in wide else 0 for kind in arch.layers]
    heads = [arch.n_head_kv if kind is LayerKind.ATTENTION else 0 for kind in arch.layers]
    shape: dict[str, Any] = {
        "block_count": arch.n_layer + nextn,
        "context_length": arch.n_ctx_train,
        "embedding_length": arch.n_embd,
        "feed_forward_length": n_ff + [arch.n_ff_exp] * nextn,
        "attention.head_count": arch.n_head,
        "attention.head_count_kv": heads + [arch.n_head_kv] * nextn,
        "attention.key_length": arch.n_embd_head,
        "attention.value_length": arch.n_embd_head,
        "attention.layer_norm_epsilon": arch.norm_eps,
        "attention.layer_norm_rms_epsilon": arch.norm_eps,
        "ssm.conv_kernel": arch.ssm_d_conv,
        "ssm.inner_size": arch.ssm_d_inner,
        "ssm.state_size": arch.ssm_d_state,
        "ssm.time_step_rank": arch.ssm_dt_rank,
        "ssm.group_count": arch.ssm_n_group,
    }
    if arch.n_expert:
        shape |= _expert_metadata(arch)
    return {
        "general.architecture": arch.name,
        **{f"{arch.name}.{key}": value for key, value in shape.items()},
        "tokenizer.ggml.tokens": [f"token{i}" for i in range(arch.n_vocab)],
    }


def _expert_metadata(arch: HybridArch) -> dict[str, Any]:
    n_used, n_ff_exp = arch.n_expert_used_per_layer, arch.n_ff_exp_per_layer
    nextn = arch.n_layer_nextn
    keys = {
        "expert_count": arch.n_expert,
        "expert_used_count": [*n_used, *[arch.n_expert_used] * nextn],
        "expert_shared_count": arch.n_expert_shared,
        "expert_feed_forward_length": [*n_ff_exp, *[arch.n_ff_exp] * nextn],
        "expert_shared_feed_forward_length": arch.n_ff_shexp,
        "expert_weights_norm": arch.expert_weights_norm,
        "expert_weights_scale": arch.expert_weights_scale,
        "expert_group_count": arch.n_expert_group,
        "expert_group_used_count": arch.n_expert_group_used,
        "moe_latent_size": arch.n_latent,
        "nextn_predict_layers": nextn,
    }
    if not n_used:
        keys["expert_used_count"] = arch.n_expert_used
    if not n_ff_exp:
        keys["expert_feed_forward_length"] = arch.n_ff_exp
    return keys


def arch_tensors(arch: HybridArch, type_: GgmlType = GgmlType.F32) -> list[Tensor]:
    """The tensors of `arch`, all zeros; those that may be quantized have `type_`."""
    return [
        Tensor(spec.name, type_ if spec.quantizable else GgmlType.F32, spec.shape)
        for spec in expected_tensors(arch).values()
    ]
