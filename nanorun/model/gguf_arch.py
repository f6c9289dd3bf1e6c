"""The shape of a hybrid model by the keys of its GGUF."""

from __future__ import annotations

from typing import TypeVar

from nanorun.errors import ModelError
from nanorun.model.arch import (
    ARCHITECTURES,
    MAX_LAYERS,
    HybridArch,
    LayerKind,
)
from nanorun.model.gguf import GgufFile
from nanorun.model.loadable import check_loadable

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
