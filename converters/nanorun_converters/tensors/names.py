"""Which tensors of a source model make each tensor of the GGUF, and what is done to their numbers.

GGUF names, shapes and order come from `nanorun.model.tensor_roles`; the source's names live here.
Rows that the engine wants together (the experts of a layer) stay parts, so that they can be read
one by one.

    H SSM heads   D SSM inner width   G SSM groups   C convolution channels   K convolution width
    X experts     F expert width      L expert input width
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nanorun.model.arch import HybridArch
from nanorun.model.tensor_roles import Role, TensorSpec, expected_tensors
from nanorun_converters.source.encodings import Part
from nanorun_converters.source.source_model import SourceModel
from nanorun_converters.tensors.claims import EMBEDDINGS, Claims, Shape
from nanorun_converters.tensors.tensor_plan import TensorPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray


def has_head(source: SourceModel) -> bool:
    """Whether any tensor is of a multi-token prediction head."""
    return any(_HEAD.match(name) for name in source.tensors)


def plan_tensors(
    source: SourceModel, arch: HybridArch, *, keep_mtp: bool = True
) -> list[TensorPlan]:
    """Find the source of every tensor of the GGUF, in file order.

    Args:
        source: The source model.
        arch: Its shape.
        keep_mtp: Whether a multi-token prediction head must have a place in `arch`.

    Raises:
        ModelError: If a tensor is missing, of a wrong shape or dtype, or not understood.
    """
    claims = Claims(source)
    finder = _Finder(claims, arch)
    tensors = [finder.find(spec) for spec in expected_tensors(arch).values()]
    if not keep_mtp:
        claims.leave_out(f"{claims.root}{_MTP}")
    ignore = [f"{claims.root}{_OUTPUT}"] if arch.tied_embeddings else []
    claims.refuse_unused(f"a NemotronH model of pattern {arch.pattern}", ignore=ignore)
    return tensors


@dataclass(frozen=True, slots=True)
class _Rule:
    """How one kind of tensor is spelled in the source."""

    names: tuple[str, ...]
    """Within the layer; the first is the usual one."""
    shape: Callable[[Shape], Shape] = lambda shape: shape
    """The source's shape for the GGUF's."""
    transform: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = None


def _minus_exp(a_log: NDArray[np.float32]) -> NDArray[np.float32]:
    # In float64, so that the float32 result is the correctly rounded one. What overflows becomes
    # infinite, and the quantizer refuses that by name.
    with np.errstate(over="ignore"):
        return (-np.exp(a_log.astype(np.float64))).astype(np.float32)


def _flat(shape: Shape) -> Shape:
    return (int(np.prod(shape)),)


_TRUNK_RULES = {
    "token_embd.weight": _Rule(EMBEDDINGS),
    "output_norm.weight": _Rule(("norm_f.weight", "norm.weight")),
}
_LAYER_RULES = {
    "attn_norm.weight": _Rule(("norm.weight",)),
    "ssm_in.weight": _Rule(("mixer.in_proj.weight",)),
    # (C, 1, K) in the source: a depthwise convolution of one input channel each.
    "ssm_conv1d.weight": _Rule(("mixer.conv1d.weight",), lambda shape: (shape[0], 1, shape[1])),
    "ssm_conv1d.bias": _Rule(("mixer.conv1d.bias",)),
    "ssm_dt.bias": _Rule(("mixer.dt_bias",)),
    # (H,) in the source, (H, 1) in the GGUF.
    "ssm_a": _Rule(("mixer.A_log",), _flat, _minus_exp),
    "ssm_d": _Rule(("mixer.D",), _flat),
    # (D,) in the source, (G, D / G) in the GGUF.
    "ssm_norm.weight": _Rule(("mixer.norm.weight",), _flat),
    "ssm_out.weight": _Rule(("mixer.out_proj.weight",)),
    "attn_q.weight": _Rule(("mixer.q_proj.weight",)),
    "attn_k.weight": _Rule(("mixer.k_proj.weight",)),
    "attn_v.weight": _Rule(("mixer.v_proj.weight",)),
    "attn_output.weight": _Rule(("mixer.o_proj.weight",)),
    "ffn_gate_inp.weight": _Rule(("mixer.gate.weight",)),
    "exp_probs_b.bias": _Rule(
        ("mixer.gate.e_score_correction_bias", "mixer.gate.e_score_correction.bias")
    ),
    "ffn_latent_down.weight": _Rule(("mixer.fc1_latent_proj.weight",)),
    "ffn_latent_up.weight": _Rule(("mixer.fc2_latent_proj.weight",)),
    "ffn_up_shexp.weight": _Rule(("mixer.shared_experts.up_proj.weight",)),
    "ffn_down_shexp.weight": _Rule(("mixer.shared_experts.down_proj.weight",)),
    "ffn_up.weight": _Rule(("mixer.up_proj.weight",)),
    "ffn_down.weight": _Rule(("mixer.down_proj.weight",)),
}
# The first layer of an MTP head fuses and attends, the second holds the experts and the last norm.
_MTP = "mtp."
_MTP_RULES = {
    "nextn.enorm.weight": "0.enorm.weight",
    "nextn.hnorm.weight": "0.hnorm.weight",
    "nextn.eh_proj.weight": "0.eh_proj.weight",
    "attn_norm.weight": "0.norm.weight",
    "post_attention_norm.weight": "1.norm.weight",
    "nextn.shared_head_norm.weight": "1.final_layernorm.weight",
}
_HEAD = re.compile(r"(?:model\.)?(?:language_model\.)?mtp\.")
_OUTPUT = "lm_head.weight"
_EXPERT_PROJECTIONS = {Role.EXPERT_UP: "up_proj", Role.EXPERT_DOWN: "down_proj"}
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class _Finder:
    """Knows the source's names of the tensors of a GGUF."""

    claims: Claims
    arch: HybridArch

    def find(self, spec: TensorSpec) -> TensorPlan:
        """Find the parts of one tensor."""
        in_block = _BLOCK_NAME.fullmatch(spec.name)
        if in_block is None:
            return self._find_outside(spec)
        layer, suffix = self._layer(int(in_block[1]), in_block[2]), in_block[2]
        if spec.role in _EXPERT_PROJECTIONS:
            return TensorPlan(spec, self._experts(spec, layer))
        if int(in_block[1]) >= self.arch.n_layer and suffix in _MTP_RULES:
            rule = _Rule((_MTP_RULES[suffix][2:],))
        else:
            rule = _LAYER_RULES[suffix]
        names = [layer + name for name in rule.names]
        part = self.claims.weight(names, rule.shape(spec.shape))
        return TensorPlan(spec, (part,), rule.transform)

    def _find_outside(self, spec: TensorSpec) -> TensorPlan:
        if spec.role is Role.OUTPUT:
            names = [f"{self.claims.root}{_OUTPUT}"]
        else:
            names = [self.claims.trunk + name for name in _TRUNK_RULES[spec.name].names]
        return TensorPlan(spec, (self.claims.weight(names, spec.shape),))

    def _layer(self, i_layer: int, suffix: str) -> str:
        """What the names of the source's layer start with."""
        if i_layer < self.arch.n_layer:
            return f"{self.claims.trunk}layers.{i_layer}."
        is_attention = suffix.startswith("attn_") or _MTP_RULES.get(suffix, "1.").startswith("0.")
        return f"{self.claims.root}{_MTP}layers.{0 if is_attention else 1}."

    def _experts(self, spec: TensorSpec, layer: str) -> tuple[Part, ...]:
        """The `(F, L)` or `(L, F)` matrices of a layer's experts, in order."""
        projection = _EXPERT_PROJECTIONS[spec.role]
        # transformers 5 saves the experts of a layer as one tensor.
        for stacked in (
            f"{layer}mixer.experts.{projection}",
            f"{layer}mixer.experts.{projection}.weight",
        ):
            if self.claims.has(stacked):
                whole = self.claims.plain(stacked, spec.shape)
                return tuple(whole.part(i) for i in range(spec.shape[0]))
        return tuple(
            self.claims.weight([f"{layer}mixer.experts.{i}.{projection}.weight"], spec.shape[1:])
            for i in range(spec.shape[0])
        )
