"""The shape of a hybrid Nemotron-H model: which layer is of which kind, and every size.

A `HybridArch` is built once, from a source model's config.json (by the converter) or from a GGUF's
metadata (`arch_from_gguf`), and everything else reads it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from nanorun.errors import ModelError
from nanorun.model.gguf import GgufFile
from nanorun.model.loadable import check_loadable

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


T = TypeVar("T", int, float, bool)
KEY_PATTERN = "nanorun.layer_pattern"


def arch_from_gguf(gguf: GgufFile) -> HybridArch:
    """The shape that a GGUF's metadata describes, validated.

    Raises:
        ModelError: If it is no Nemotron-H model, a key is missing or of the wrong kind, or the
            sizes contradict each other.
    """
    if gguf.architecture not in ARCHITECTURES:
        raise ModelError(
            f"{gguf.path}: not a Nemotron-H model: general.architecture is {gguf.architecture!r}",
            facts=[f"nanorun runs {' and '.join(ARCHITECTURES)}"],
        )
    check_loadable(gguf)
    arch = _ArchKeys(gguf).read()
    try:
        arch.validate()
    except ModelError as error:
        raise ModelError(f"{gguf.path}: {error.message}") from error
    _check_pattern_key(gguf, arch)
    return arch


def _check_pattern_key(gguf: GgufFile, arch: HybridArch) -> None:
    written = gguf.find(KEY_PATTERN, str)
    if written is not None and written != arch.pattern:
        raise ModelError(
            f"{gguf.path}: key {KEY_PATTERN!r}: expected {arch.pattern!r}"
            f" (from head_count_kv and feed_forward_length), found {written!r}"
        )


class _ArchKeys:
    """Reads the keys under the architecture's prefix, with llama.cpp's defaults.

    Sizes that may differ between blocks are arrays with one entry a block, MTP blocks last; a file
    may give one number instead where all agree.
    """

    def __init__(self, gguf: GgufFile) -> None:
        self.gguf = gguf
        self.n_layer_nextn = self._int("nextn_predict_layers", 0)
        self.n_block = self._int("block_count")
        self.n_layer = self.n_block - self.n_layer_nextn
        if not 0 <= self.n_layer_nextn < self.n_block <= MAX_LAYERS:
            found = f"{self.n_block} blocks, {self.n_layer_nextn} of them MTP"
            raise self._wrong("block_count", f"1 to {MAX_LAYERS} with MTP blocks", found)
        self.n_expert = self._int("expert_count", 0)
        self.layers = self._layers()
        self.blocks = {
            kind: [i for i, k in enumerate(self.layers) if k is kind] for kind in LayerKind
        }
        blocks_mtp = range(self.n_layer, self.n_block)
        self.blocks_attention = [*self.blocks[LayerKind.ATTENTION], *blocks_mtp]
        self.blocks_moe = [*self.blocks[LayerKind.MOE], *blocks_mtp]

    def read(self) -> HybridArch:
        n_embd = self._int("embedding_length")
        n_head = self._common("attention.head_count", self.blocks_attention)
        n_expert_used, n_expert_used_per_layer = self._split(self._experts_used())
        n_ff_exp, n_ff_exp_per_layer = self._split(self._expert_widths())
        return HybridArch(
            layers=self.layers,
            n_vocab=self._n_vocab(),
            n_embd=n_embd,
            n_ctx_train=self._int("context_length"),
            norm_eps=self._norm_eps(),
            n_head=n_head,
            n_head_kv=self._common("attention.head_count_kv", self.blocks_attention),
            n_embd_head=self._n_embd_head(n_embd, n_head),
            ssm_d_conv=self._int("ssm.conv_kernel"),
            ssm_d_inner=self._int("ssm.inner_size"),
            ssm_d_state=self._int("ssm.state_size"),
            ssm_dt_rank=self._int("ssm.time_step_rank"),
            ssm_n_group=self._int("ssm.group_count"),
            n_ff=self._common("feed_forward_length", self.blocks[LayerKind.MLP]),
            n_expert=self.n_expert,
            n_expert_used=n_expert_used,
            n_expert_shared=self._int("expert_shared_count", 0),
            n_ff_exp=n_ff_exp,
            n_ff_shexp=self._int("expert_shared_feed_forward_length", 0),
            n_latent=self._int("moe_latent_size", 0),
            expert_weights_scale=self._float("expert_weights_scale", 1.0),
            expert_weights_norm=self._find("expert_weights_norm", bool, False),
            # None and 0 are one group, for the engine as well.
            n_expert_group=self._int("expert_group_count", 1) or 1,
            n_expert_group_used=self._int("expert_group_used_count", 1) or 1,
            n_layer_nextn=self.n_layer_nextn,
            tied_embeddings="output.weight" not in self.gguf.tensors,
            n_ff_exp_per_layer=n_ff_exp_per_layer,
            n_expert_used_per_layer=n_expert_used_per_layer,
        )

    def _layers(self) -> tuple[LayerKind, ...]:
        heads, widths = self._per_block("attention.head_count_kv"), self._ff_lengths()
        return tuple(self._kind(heads[i], widths[i]) for i in range(self.n_layer))

    def _kind(self, n_head_kv: int, n_ff: int) -> LayerKind:
        # nemotron-h.cpp tells the kinds apart by these two numbers alone.
        if n_ff:
            return LayerKind.MOE if self.n_expert else LayerKind.MLP
        return LayerKind.ATTENTION if n_head_kv else LayerKind.SSM

    def _ff_lengths(self) -> tuple[int, ...]:
        return self._per_block("feed_forward_length")

    def _experts_used(self) -> tuple[int, ...]:
        return self._per_block("expert_used_count", 0)

    def _expert_widths(self) -> tuple[int, ...]:
        if self._key("expert_feed_forward_length") in self.gguf.metadata:
            return self._per_block("expert_feed_forward_length")
        # Older files give only the width of all used experts together.
        pairs = zip(self._ff_lengths(), self._experts_used(), strict=True)
        return tuple(n_ff // n_used if n_used else 0 for n_ff, n_used in pairs)

    def _split(self, values: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """The common value of the MoE blocks, and the trunk's values if some are others."""
        if not self.blocks_moe:
            return 0, ()
        common, moe = values[self.blocks_moe[-1]], self.blocks[LayerKind.MOE]
        if all(values[i] == common for i in moe):
            return common, ()
        return common, tuple(values[i] if i in moe else 0 for i in range(self.n_layer))

    def _n_vocab(self) -> int:
        tokens = self.gguf.find("tokenizer.ggml.tokens", list)
        return self._int("vocab_size") if tokens is None else len(tokens)

    def _norm_eps(self) -> float:
        # The engine insists on the first; the second, where given, is the one the trunk uses.
        eps = self._float("attention.layer_norm_epsilon")
        return self._float("attention.layer_norm_rms_epsilon", eps)

    def _n_embd_head(self, n_embd: int, n_head: int) -> int:
        default = n_embd // n_head if n_head else 0
        size_k = self._int("attention.key_length", default)
        size_v = self._int("attention.value_length", default)
        if size_k != size_v:
            raise self._wrong("attention.value_length", f"{size_k} as key_length", size_v)
        return size_k

    def _common(self, name: str, blocks: list[int]) -> int:
        """The one value that `name` has in all `blocks`; 0 if there are none."""
        values = self._per_block(name)
        found = sorted({values[i] for i in blocks})
        if len(found) > 1:
            raise self._wrong(name, "one size for all such layers", found)
        return found[0] if found else 0

    def _per_block(self, name: str, default: int | None = None) -> tuple[int, ...]:
        value = self.gguf.metadata.get(self._key(name), default)
        if not isinstance(value, list):
            return (self._int(name, default),) * self.n_block
        if len(value) != self.n_block:
            raise self._wrong(name, f"{self.n_block} entries, one a block", len(value))
        for entry in value:
            if type(entry) is not int or entry < 0:
                raise self._wrong(name, "whole numbers from 0", repr(entry))
        return tuple(value)

    def _int(self, name: str, default: int | None = None) -> int:
        value = self._find(name, int, default)
        if not 0 <= value < 2**31:
            raise self._wrong(name, "a number from 0 to 2147483647", value)
        return value

    def _float(self, name: str, default: float | None = None) -> float:
        # A file holds float32: seven digits give back the 1e-05 that was meant.
        return float(f"{self._find(name, float, default):.7g}")

    def _find(self, name: str, kind: type[T], default: T | None = None) -> T:
        key = self._key(name)
        if default is None:
            return self.gguf.require(key, kind)
        value = self.gguf.find(key, kind)
        return default if value is None else value

    def _key(self, name: str) -> str:
        return f"{self.gguf.architecture}.{name}"

    def _wrong(self, name: str, expected: str, found: object) -> ModelError:
        where = f"{self.gguf.path}: key {self._key(name)!r}"
        return ModelError(f"{where}: expected {expected}, found {found}")
