"""Bytes a model takes: weights, KV cache, recurrent state.

Formulas only, checked against what the engine allocates (llama-kv-cache.cpp,
llama-memory-recurrent.cpp). They need an architecture, not a file and not an engine.
"""

from __future__ import annotations

from nanorun.model.arch import HybridArch, LayerKind
from nanorun.model.ggml_type import GgmlType
from nanorun.model.gguf import GgufFile
from nanorun.model.tensor_roles import TensorSpec

N_CTX_MULTIPLE = 256
"""llama-context.cpp rounds n_ctx up to it."""
_STATE_ELEMENT_BYTES = GgmlType.F32.type_size


def weights_bytes(gguf: GgufFile) -> int:
    """Bytes of a file's tensors, without its header and the padding between them."""
    return sum(tensor.n_bytes for tensor in gguf.tensors.values())


def tensor_bytes(spec: TensorSpec, type_: GgmlType) -> int:
    """Bytes of one tensor in `type_`.

    Raises:
        ValueError: If the type's block does not divide a row.
    """
    return spec.n_elements // spec.n_per_row * type_.row_bytes(spec.n_per_row)


def kv_bytes_per_token(
    arch: HybridArch, type_k: GgmlType = GgmlType.F16, type_v: GgmlType = GgmlType.F16
) -> int:
    """Bytes of K and V that one token adds, over all attention layers of the trunk."""
    return arch.n_layers_of(LayerKind.ATTENTION) * _kv_row_bytes(arch, type_k, type_v)


def kv_bytes(
    arch: HybridArch,
    n_ctx: int,
    type_k: GgmlType = GgmlType.F16,
    type_v: GgmlType = GgmlType.F16,
) -> int:
    """Bytes of the KV cache of a context of `n_ctx` tokens, which all sequences share."""
    return padded_n_ctx(n_ctx) * kv_bytes_per_token(arch, type_k, type_v)


def mtp_kv_bytes(
    arch: HybridArch,
    n_ctx: int,
    type_k: GgmlType = GgmlType.F16,
    type_v: GgmlType = GgmlType.F16,
) -> int:
    """Bytes of the KV cache of the context that drafts with the MTP blocks; 0 without any."""
    return arch.n_layer_nextn * padded_n_ctx(n_ctx) * _kv_row_bytes(arch, type_k, type_v)


def state_bytes(arch: HybridArch, n_seq_max: int = 1, n_rs_seq: int = 0) -> int:
    """Bytes of SSM and conv state for `n_seq_max` sequences, always in F32.

    Args:
        arch: The model.
        n_seq_max: Sequences of the context.
        n_rs_seq: Tokens a sequence can be rolled back; each keeps a whole state more.
    """
    per_layer = conv_state_elements(arch) + ssm_state_elements(arch)
    per_plane = arch.n_layers_of(LayerKind.SSM) * per_layer * _STATE_ELEMENT_BYTES
    return n_seq_max * (1 + n_rs_seq) * per_plane


def output_bytes(arch: HybridArch, n_outputs_max: int = 1) -> int:
    """Bytes of the rows of logits that a context keeps in host memory."""
    return n_outputs_max * arch.n_vocab * _STATE_ELEMENT_BYTES


def conv_state_elements(arch: HybridArch) -> int:
    """Elements of one SSM layer's convolution tail, shape `(ssm_d_conv - 1, channels)`."""
    return (arch.ssm_d_conv - 1) * arch.ssm_d_conv_channels


def ssm_state_elements(arch: HybridArch) -> int:
    """Elements of one SSM layer's recurrent state, shape `(ssm_d_state, ssm_d_inner)`."""
    return arch.ssm_d_state * arch.ssm_d_inner


def padded_n_ctx(n_ctx: int) -> int:
    """Tokens the engine makes of `n_ctx`."""
    return -(-n_ctx // N_CTX_MULTIPLE) * N_CTX_MULTIPLE


def _kv_row_bytes(arch: HybridArch, type_k: GgmlType, type_v: GgmlType) -> int:
    return type_k.row_bytes(arch.n_embd_gqa) + type_v.row_bytes(arch.n_embd_gqa)
