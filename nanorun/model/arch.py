"""The shape of a hybrid Nemotron-H model: which layer is of which kind, and every size.

A `HybridArch` is built once, from a source model's config.json (by the converter) or from a GGUF's
metadata (`gguf_arch.py`), and everything else reads it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from nanorun.errors import ModelError

ARCHITECTURES = ("nemotron_h", "nemotron_h_moe")
"""llama.cpp's names of the architectures; the second has experts."""
MAX_LAYERS = 512
"""LLAMA_MAX_LAYERS: the engine's fixed arrays hold so many."""
MAX_EXPERTS = 1024
"""LLAMA_MAX_EXPERTS: the engine aborts above it."""


class LayerKind(StrEnum):
    """What one layer of the pattern does; the value is its letter."""

    SSM = "M"
    ATTENTION = "*"
    MLP = "-"
    MOE = "E"


def parse_pattern(text: str) -> tuple[LayerKind, ...]:
    """The layers of a pattern such as `MEM*E`.

    Raises:
        ModelError: If a letter is no layer kind, or there is none.
    """
    if not text:
        raise ModelError("layer pattern is empty")
    return tuple(_layer_kind(text, i) for i in range(len(text)))


def _layer_kind(pattern: str, i_layer: int) -> LayerKind:
    try:
        return LayerKind(pattern[i_layer])
    except ValueError as error:
        raise ModelError(
            f"layer pattern {pattern!r}: layer {i_layer} is {pattern[i_layer]!r},"
            " expected M (SSM), * (attention), - (MLP) or E (MoE)"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridArch:
    """Layers and sizes of one model; `validate` says whether they can be meant."""

    layers: tuple[LayerKind, ...]
    """The trunk; an MTP block after it is counted by `n_layer_nextn` alone."""
    n_vocab: int
    n_embd: int
    n_ctx_train: int
    norm_eps: float
    n_head: int
    n_head_kv: int
    n_embd_head: int
    ssm_d_conv: int
    ssm_d_inner: int
    ssm_d_state: int
    ssm_dt_rank: int
    """Heads of the SSM; `ssm_d_inner` is their number times their size."""
    ssm_n_group: int
    n_ff: int = 0
    """Width of the dense MLP layers; 0 if there are none."""
    n_expert: int = 0
    n_expert_used: int = 0
    n_expert_shared: int = 0
    n_ff_exp: int = 0
    n_ff_shexp: int = 0
    """Width of all shared experts together."""
    n_latent: int = 0
    """Width the experts work on when it is not `n_embd`; 0 if it is."""
    expert_weights_scale: float = 1.0
    expert_weights_norm: bool = False
    n_expert_group: int = 1
    n_expert_group_used: int = 1
    n_layer_nextn: int = 0
    """MTP blocks after the trunk, each an attention and a MoE part in one."""
    tied_embeddings: bool = False
    n_ff_exp_per_layer: tuple[int, ...] = ()
    """Overrides `n_ff_exp` where it varies (Puzzle): one entry a layer, 0 off MoE layers."""
    n_expert_used_per_layer: tuple[int, ...] = ()
    """Overrides `n_expert_used` where it varies: one entry a layer, 0 off MoE layers."""

    @property
    def n_layer(self) -> int:
        """Layers of the trunk."""
        return len(self.layers)

    @property
    def n_layer_all(self) -> int:
        """Blocks of the file: the trunk and the MTP blocks."""
        return self.n_layer + self.n_layer_nextn

    @property
    def pattern(self) -> str:
        """The trunk as letters, `MEM*E`."""
        return "".join(self.layers)

    @property
    def name(self) -> str:
        """llama.cpp's name of the architecture."""
        return ARCHITECTURES[1] if self.n_expert else ARCHITECTURES[0]

    @property
    def n_embd_q(self) -> int:
        """Rows of an attention layer's query projection."""
        return self.n_head * self.n_embd_head

    @property
    def n_embd_gqa(self) -> int:
        """Elements of K, and of V, that one attention layer keeps per token."""
        return self.n_head_kv * self.n_embd_head

    @property
    def ssm_d_conv_channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.ssm_d_inner + 2 * self.ssm_n_group * self.ssm_d_state

    @property
    def ssm_d_in_proj(self) -> int:
        """Rows of an SSM layer's input projection: z, x, B, C and dt."""
        return self.ssm_d_inner + self.ssm_d_conv_channels + self.ssm_dt_rank

    @property
    def n_embd_exp(self) -> int:
        """Width the routed experts read and write."""
        return self.n_latent or self.n_embd

    def n_layers_of(self, kind: LayerKind) -> int:
        """Layers of one kind in the trunk."""
        return self.layers.count(kind)

    def n_ff_exp_at(self, i_layer: int) -> int:
        """Width of the experts of layer `i_layer`; the MTP blocks use the common width."""
        return _at(self.n_ff_exp_per_layer, i_layer, self.n_ff_exp)

    def n_expert_used_at(self, i_layer: int) -> int:
        """Experts each token uses in layer `i_layer`."""
        return _at(self.n_expert_used_per_layer, i_layer, self.n_expert_used)

    def validate(self) -> None:
        """Check that every size is possible and that they fit together.

        Raises:
            ModelError: Naming the size, what was expected and what was found.
        """
        self._validate_trunk()
        if LayerKind.SSM in self.layers:
            self._validate_ssm()
        if LayerKind.ATTENTION in self.layers or self.n_layer_nextn:
            self._validate_attention()
        if LayerKind.MLP in self.layers:
            _need_positive("n_ff", self.n_ff)
        if LayerKind.MOE in self.layers or self.n_layer_nextn or self.n_expert:
            self._validate_experts()

    def _validate_trunk(self) -> None:
        for name in ("n_vocab", "n_embd", "n_ctx_train"):
            _need_positive(name, getattr(self, name))
        n_layer = self.n_layer_all
        _need(1 <= n_layer <= MAX_LAYERS, "n_layer", f"1 to {MAX_LAYERS}", n_layer)
        _need(self.n_layer_nextn in (0, 1), "n_layer_nextn", "0 or 1", self.n_layer_nextn)
        eps_is_small = math.isfinite(self.norm_eps) and 0 < self.norm_eps < 1
        _need(eps_is_small, "norm_eps", "a number between 0 and 1", self.norm_eps)
        mixed = LayerKind.MLP in self.layers and LayerKind.MOE in self.layers
        _need(not mixed, "layer pattern", "MLP or MoE layers, not both", self.pattern)

    def _validate_ssm(self) -> None:
        for name in ("d_conv", "d_inner", "d_state", "dt_rank", "n_group"):
            _need_positive(f"ssm_{name}", getattr(self, f"ssm_{name}"))
        _need(self.ssm_d_conv >= 2, "ssm_d_conv", "2 or more", self.ssm_d_conv)
        _need_multiple("ssm_d_inner", self.ssm_d_inner, "ssm_dt_rank", self.ssm_dt_rank)
        _need_multiple("ssm_d_inner", self.ssm_d_inner, "ssm_n_group", self.ssm_n_group)
        _need_multiple("ssm_dt_rank", self.ssm_dt_rank, "ssm_n_group", self.ssm_n_group)

    def _validate_attention(self) -> None:
        for name in ("n_head", "n_head_kv", "n_embd_head"):
            _need_positive(name, getattr(self, name))
        _need_multiple("n_head", self.n_head, "n_head_kv", self.n_head_kv)

    def _validate_experts(self) -> None:
        _need(LayerKind.MOE in self.layers, "layer pattern", "a MoE layer (E)", self.pattern)
        _need(2 <= self.n_expert <= MAX_EXPERTS, "n_expert", f"2 to {MAX_EXPERTS}", self.n_expert)
        # The engine loads the shared expert's tensors whatever the count says.
        _need_positive("n_expert_shared", self.n_expert_shared)
        _need_positive("n_ff_shexp", self.n_ff_shexp)
        _need(self.n_latent >= 0, "n_latent", "0 or more", self.n_latent)
        scale_is_number = math.isfinite(self.expert_weights_scale) and self.expert_weights_scale > 0
        _need(scale_is_number, "expert_weights_scale", "above 0", self.expert_weights_scale)
        self._validate_expert_layers()
        self._validate_expert_groups()

    def _validate_expert_layers(self) -> None:
        for name in ("n_ff_exp_per_layer", "n_expert_used_per_layer"):
            n_entries = len(getattr(self, name))
            _need(n_entries in (0, self.n_layer), name, f"{self.n_layer} entries", n_entries)
        indices = [i for i, kind in enumerate(self.layers) if kind is LayerKind.MOE]
        for i in (*indices, *range(self.n_layer, self.n_layer_all)):
            n_used = self.n_expert_used_at(i)
            _need(
                1 <= n_used <= self.n_expert,
                f"n_expert_used of layer {i}",
                f"1 to {self.n_expert}",
                n_used,
            )
            _need_positive(f"n_ff_exp of layer {i}", self.n_ff_exp_at(i))

    def _validate_expert_groups(self) -> None:
        n_group, n_used = self.n_expert_group, self.n_expert_group_used
        _need(1 <= n_group < self.n_expert, "n_expert_group", "1 to n_expert - 1", n_group)
        _need_multiple("n_expert", self.n_expert, "n_expert_group", n_group)
        most = max(1, n_group - 1)
        _need(1 <= n_used <= most, "n_expert_group_used", f"1 to {most}", n_used)


def _at(per_layer: tuple[int, ...], i_layer: int, common: int) -> int:
    return per_layer[i_layer] if i_layer < len(per_layer) else common


def _need(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise ModelError(f"{name}: expected {expected}, found {found}")


def _need_positive(name: str, value: int) -> None:
    _need(value > 0, name, "a positive number", value)


def _need_multiple(name: str, value: int, of_name: str, of: int) -> None:
    _need(value % of == 0, name, f"a multiple of {of_name} ({of})", value)
