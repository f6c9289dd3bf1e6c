"""Every tensor of a Nemotron-H GGUF: its name, role, shape, and the weakest type it may have.

One row per tensor, so converter, recipes, planner and checks agree. Shapes are in numpy order
(outermost first). Names and shapes are those of llama.cpp's src/models/nemotron-h.cpp.

    E n_embd   V n_vocab   X n_expert   F expert or MLP width   L expert input width (n_latent or E)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from nanorun.errors import ModelError
from nanorun.model.arch import HybridArch, LayerKind
from nanorun.model.ggml_type import GgmlType
from nanorun.model.gguf import GgufFile


class Role(StrEnum):
    """What a tensor is for; recipes and `--type-map` speak of these."""

    EMBEDDING = "embedding"
    OUTPUT = "output"
    NORM = "norm"
    SSM_IN = "ssm_in"
    SSM_OUT = "ssm_out"
    SSM_SMALL = "ssm_small"
    ATTN_Q = "attn_q"
    ATTN_K = "attn_k"
    ATTN_V = "attn_v"
    ATTN_OUT = "attn_out"
    ROUTER = "router"
    EXPERT_UP = "expert_up"
    EXPERT_DOWN = "expert_down"
    SHARED_UP = "shared_up"
    SHARED_DOWN = "shared_down"
    LATENT_DOWN = "latent_down"
    LATENT_UP = "latent_up"
    FFN_UP = "ffn_up"
    FFN_DOWN = "ffn_down"
    MTP_PROJ = "mtp_proj"
    SCALE = "scale"
    """A factor beside a quantized tensor (NVFP4 sources)."""
    BIAS = "bias"


# The weakest type of each role that may be quantized; every other role stays F32.
# Routed experts are 9 of 10 weights and each token sees few of them, so they may go lowest. Layers
# that every token passes, and those that feed the SSM state, whose errors add up over the whole
# context, keep four bits.
FLOORS: dict[Role, GgmlType] = {
    Role.EMBEDDING: GgmlType.IQ3_XXS,
    Role.OUTPUT: GgmlType.IQ4_XS,
    Role.SSM_IN: GgmlType.IQ4_XS,
    Role.SSM_OUT: GgmlType.IQ4_XS,
    Role.ATTN_Q: GgmlType.IQ4_XS,
    Role.ATTN_K: GgmlType.IQ4_XS,
    Role.ATTN_V: GgmlType.IQ4_XS,
    Role.ATTN_OUT: GgmlType.IQ4_XS,
    Role.EXPERT_UP: GgmlType.IQ2_XXS,
    Role.EXPERT_DOWN: GgmlType.IQ2_XXS,
    Role.SHARED_UP: GgmlType.IQ3_XXS,
    Role.SHARED_DOWN: GgmlType.IQ3_XXS,
    Role.LATENT_DOWN: GgmlType.IQ4_XS,
    Role.LATENT_UP: GgmlType.IQ4_XS,
    Role.FFN_UP: GgmlType.Q2_K,
    Role.FFN_DOWN: GgmlType.Q2_K,
    Role.MTP_PROJ: GgmlType.IQ4_XS,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor an architecture calls for, or allows."""

    name: str
    role: Role
    shape: tuple[int, ...]
    required: bool = True

    @property
    def quantizable(self) -> bool:
        """Whether it may be anything but F32."""
        return self.role in FLOORS

    @property
    def floor(self) -> GgmlType:
        """The weakest type it may have."""
        return FLOORS.get(self.role, GgmlType.F32)

    def allows(self, type_: GgmlType) -> bool:
        """Whether `type_` is at least as strong as the floor."""
        return type_.bpw >= self.floor.bpw

    @property
    def n_elements(self) -> int:
        """Numbers the tensor holds."""
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def n_per_row(self) -> int:
        """Elements of a row, which a type's block must divide."""
        return self.shape[-1]


_ROLES_OF_TRUNK = {
    "token_embd.weight": Role.EMBEDDING,
    "output_norm.weight": Role.NORM,
    "output.weight": Role.OUTPUT,
}
_ROLES_IN_BLOCK = {
    "attn_norm.weight": Role.NORM,
    "post_attention_norm.weight": Role.NORM,
    "nextn.enorm.weight": Role.NORM,
    "nextn.hnorm.weight": Role.NORM,
    "nextn.shared_head_norm.weight": Role.NORM,
    "nextn.eh_proj.weight": Role.MTP_PROJ,
    "ssm_in.weight": Role.SSM_IN,
    "ssm_conv1d.weight": Role.SSM_SMALL,
    "ssm_conv1d.bias": Role.SSM_SMALL,
    "ssm_dt.bias": Role.SSM_SMALL,
    "ssm_a": Role.SSM_SMALL,
    "ssm_d": Role.SSM_SMALL,
    "ssm_norm.weight": Role.NORM,
    "ssm_out.weight": Role.SSM_OUT,
    "attn_q.weight": Role.ATTN_Q,
    "attn_k.weight": Role.ATTN_K,
    "attn_v.weight": Role.ATTN_V,
    "attn_output.weight": Role.ATTN_OUT,
    "ffn_gate_inp.weight": Role.ROUTER,
    "exp_probs_b.bias": Role.ROUTER,
    "ffn_up_exps.weight": Role.EXPERT_UP,
    "ffn_down_exps.weight": Role.EXPERT_DOWN,
    "ffn_up_shexp.weight": Role.SHARED_UP,
    "ffn_down_shexp.weight": Role.SHARED_DOWN,
    "ffn_latent_down.weight": Role.LATENT_DOWN,
    "ffn_latent_up.weight": Role.LATENT_UP,
    "ffn_up.weight": Role.FFN_UP,
    "ffn_down.weight": Role.FFN_DOWN,
}
_BLOCK_NAME = re.compile(r"blk\.(?:0|[1-9][0-9]{0,3})\.(.+)")


def role_of(name: str) -> Role:
    """The role of the tensor called `name`.

    Raises:
        ModelError: If Nemotron-H has no such tensor.
    """
    in_block = _BLOCK_NAME.fullmatch(name)
    suffix = in_block[1] if in_block else name
    role = (_ROLES_IN_BLOCK if in_block else _ROLES_OF_TRUNK).get(suffix)
    if role is not None:
        return role
    if suffix.endswith((".scale", ".input_scale")):
        return Role.SCALE
    if in_block and suffix.endswith(".bias"):
        return Role.BIAS
    raise ModelError(f"tensor {name!r} is none that a Nemotron-H model has")


def expected_tensors(arch: HybridArch) -> dict[str, TensorSpec]:
    """Every tensor a GGUF of `arch` must hold, in file order."""
    return {spec.name: spec for spec in _required(arch)}


def optional_tensors(arch: HybridArch) -> dict[str, TensorSpec]:
    """Tensors the engine also reads where a file has them: biases and NVFP4's factors.

    nanorun writes none of the biases, but other converters may.
    """
    specs: dict[str, TensorSpec] = {}
    for spec in _required(arch):
        for name, role, shape in _companions(arch, spec):
            specs[name] = TensorSpec(name, role, shape, required=False)
    return specs


def check_tensors(gguf: GgufFile, arch: HybridArch) -> None:
    """Check that a file holds the tensors of `arch`, each in its shape, and no others.

    Raises:
        ModelError: Naming the file, the tensor, what was expected and what was found.
    """
    required, optional = expected_tensors(arch), optional_tensors(arch)
    for spec in required.values():
        if spec.name not in gguf.tensors:
            raise ModelError(
                f"{gguf.path}: tensor {spec.name!r}: expected shape {list(spec.shape)},"
                " found no such tensor"
            )
    for tensor in gguf.tensors.values():
        known = required.get(tensor.name) or optional.get(tensor.name)
        if known is None or _is_unread_factor(gguf, tensor.name):
            raise ModelError(
                f"{gguf.path}: tensor {tensor.name!r}: expected no such tensor"
                f" in a {arch.name} model of pattern {arch.pattern}"
            )
        if tensor.shape != known.shape:
            raise ModelError(
                f"{gguf.path}: tensor {tensor.name!r}: expected shape {list(known.shape)},"
                f" found {list(tensor.shape)}"
            )


def _is_unread_factor(gguf: GgufFile, name: str) -> bool:
    """Whether `name` is a factor of an output that is not NVFP4, the only one the engine scales."""
    if name not in ("output.scale", "output.input_scale"):
        return False
    return gguf.tensors["output.weight"].type is not GgmlType.NVFP4


def _required(arch: HybridArch) -> Iterator[TensorSpec]:
    yield from _specs("", {"token_embd.weight": (arch.n_vocab, arch.n_embd)})
    for i, kind in enumerate(arch.layers):
        yield from _specs(f"blk.{i}.", {"attn_norm.weight": (arch.n_embd,)})
        yield from _specs(f"blk.{i}.", _mixer_shapes(arch, kind, i))
    for i in range(arch.n_layer, arch.n_layer_all):
        yield from _specs(f"blk.{i}.", _mtp_shapes(arch, i))
    yield from _specs("", {"output_norm.weight": (arch.n_embd,)})
    if not arch.tied_embeddings:
        yield from _specs("", {"output.weight": (arch.n_vocab, arch.n_embd)})


def _specs(prefix: str, shapes: dict[str, tuple[int, ...]]) -> Iterator[TensorSpec]:
    roles = _ROLES_IN_BLOCK if prefix else _ROLES_OF_TRUNK
    for suffix, shape in shapes.items():
        yield TensorSpec(prefix + suffix, roles[suffix], shape)


def _mixer_shapes(arch: HybridArch, kind: LayerKind, i_layer: int) -> dict[str, tuple[int, ...]]:
    match kind:
        case LayerKind.SSM:
            return _ssm_shapes(arch)
        case LayerKind.ATTENTION:
            return _attention_shapes(arch)
        case LayerKind.MLP:
            return _mlp_shapes(arch)
        case LayerKind.MOE:
            return _moe_shapes(arch, i_layer)


def _ssm_shapes(arch: HybridArch) -> dict[str, tuple[int, ...]]:
    n_channels, n_group = arch.ssm_d_conv_channels, arch.ssm_n_group
    return {
        "ssm_in.weight": (arch.ssm_d_in_proj, arch.n_embd),
        "ssm_conv1d.weight": (n_channels, arch.ssm_d_conv),
        "ssm_conv1d.bias": (n_channels,),
        "ssm_dt.bias": (arch.ssm_dt_rank,),
        "ssm_a": (arch.ssm_dt_rank, 1),
        "ssm_d": (arch.ssm_dt_rank, 1),
        "ssm_norm.weight": (n_group, arch.ssm_d_inner // n_group),
        "ssm_out.weight": (arch.n_embd, arch.ssm_d_inner),
    }


def _attention_shapes(arch: HybridArch) -> dict[str, tuple[int, ...]]:
    return {
        "attn_q.weight": (arch.n_embd_q, arch.n_embd),
        "attn_k.weight": (arch.n_embd_gqa, arch.n_embd),
        "attn_v.weight": (arch.n_embd_gqa, arch.n_embd),
        "attn_output.weight": (arch.n_embd, arch.n_embd_q),
    }


def _mlp_shapes(arch: HybridArch) -> dict[str, tuple[int, ...]]:
    return {
        "ffn_up.weight": (arch.n_ff, arch.n_embd),
        "ffn_down.weight": (arch.n_embd, arch.n_ff),
    }


def _moe_shapes(arch: HybridArch, i_layer: int) -> dict[str, tuple[int, ...]]:
    n_embd, n_expert, n_exp = arch.n_embd, arch.n_expert, arch.n_embd_exp
    n_ff_exp = arch.n_ff_exp_at(i_layer)
    shapes: dict[str, tuple[int, ...]] = {
        "ffn_gate_inp.weight": (n_expert, n_embd),
        "exp_probs_b.bias": (n_expert,),
    }
    if arch.n_latent:
        shapes["ffn_latent_down.weight"] = (n_exp, n_embd)
        shapes["ffn_latent_up.weight"] = (n_embd, n_exp)
    return shapes | {
        "ffn_up_exps.weight": (n_expert, n_ff_exp, n_exp),
        "ffn_down_exps.weight": (n_expert, n_exp, n_ff_exp),
        "ffn_up_shexp.weight": (arch.n_ff_shexp, n_embd),
        "ffn_down_shexp.weight": (n_embd, arch.n_ff_shexp),
    }


def _mtp_shapes(arch: HybridArch, i_layer: int) -> dict[str, tuple[int, ...]]:
    """An MTP block: fuse the embedding with the trunk's output, attention, MoE, LayerNorm."""
    n_embd = arch.n_embd
    return {
        "nextn.enorm.weight": (n_embd,),
        "nextn.hnorm.weight": (n_embd,),
        "nextn.eh_proj.weight": (n_embd, 2 * n_embd),
        "attn_norm.weight": (n_embd,),
        **_attention_shapes(arch),
        "post_attention_norm.weight": (n_embd,),
        **_moe_shapes(arch, i_layer),
        "nextn.shared_head_norm.weight": (n_embd,),
    }


# Weights whose bias the engine adds when there is one; those of the dense MLP and of attention.
_ROLES_WITH_BIAS = (
    Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V, Role.ATTN_OUT, Role.FFN_UP, Role.FFN_DOWN,
)  # fmt: skip
# The engine multiplies these plainly, so a factor beside them would be ignored.
_ROLES_WITHOUT_SCALE = (Role.EMBEDDING, Role.ROUTER, Role.LATENT_DOWN, Role.LATENT_UP)


def _companions(arch: HybridArch, spec: TensorSpec) -> Iterator[tuple[str, Role, tuple[int, ...]]]:
    stem = spec.name.removesuffix(".weight")
    if spec.role in _ROLES_WITH_BIAS:
        yield f"{stem}.bias", Role.BIAS, (spec.shape[0],)
    if spec.quantizable and spec.role not in _ROLES_WITHOUT_SCALE:
        per_expert = spec.role in (Role.EXPERT_UP, Role.EXPERT_DOWN)
        shape = (arch.n_expert if per_expert else 1,)
        yield f"{stem}.scale", Role.SCALE, shape
        yield f"{stem}.input_scale", Role.SCALE, shape
