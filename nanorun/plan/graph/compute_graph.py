"""The graphs that llama.cpp evaluates for a Nemotron-H model, as far as their memory goes.

One function a kind of layer, in the order of operations of llama.cpp's src/models/nemotron-h.cpp,
mamba-base.cpp and llama-graph.cpp: the order decides which tensors are alive together. Shapes are
ggml's, innermost first. E n_embd   T tokens   S sequences   H SSM heads   X experts
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import prod

from nanorun.model.arch import HybridArch, LayerKind
from nanorun.model.engine_options import ALL_LAYERS, EngineOptions
from nanorun.model.footprint import padded_n_ctx
from nanorun.model.ggml_type import GgmlType
from nanorun.plan.graph.graph_allocator import ALIGNMENT, Graph, Node, buffer_bytes

_F32, _I32, _I64, _F16 = 4, 4, 8, 2
# llama-kv-cache.cpp turns K and V of a quantized cache by Hadamard matrices of this size; that of
# K is doubled while it divides a head.
_ROTATION = 64
_CUDA_ALIGNMENT = 128


def compute_bytes(arch: HybridArch, options: EngineOptions, *, on_gpu: bool = False) -> int:
    """Bytes of the compute buffer of a context of `arch`, all layers on one device."""
    return _trunk_bytes(arch, _of_graph(options), on_gpu)


def mtp_compute_bytes(arch: HybridArch, options: EngineOptions, *, on_gpu: bool = False) -> int:
    """Bytes of the compute buffer of the MTP head's context; 0 without a head."""
    # The head's context takes no guesses back.
    return _head_bytes(arch, _of_graph(replace(options, n_draft=0)), on_gpu)


def _of_graph(options: EngineOptions) -> EngineOptions:
    """The options without what no graph depends on: plans that differ there share one result."""
    return replace(
        options, n_gpu_layers=ALL_LAYERS, n_cpu_moe=0, checkpoint_bytes=0, archive_bytes=0
    )


@lru_cache(maxsize=1024)
def _trunk_bytes(arch: HybridArch, options: EngineOptions, on_gpu: bool) -> int:
    builder = _Builder(arch, options, on_gpu=on_gpu)
    builder.trunk()
    return buffer_bytes(builder.graph, _alignment(on_gpu))


@lru_cache(maxsize=1024)
def _head_bytes(arch: HybridArch, options: EngineOptions, on_gpu: bool) -> int:
    if not arch.n_layer_nextn:
        return 0
    builder = _Builder(arch, options, on_gpu=on_gpu)
    builder.mtp()
    return buffer_bytes(builder.graph, _alignment(on_gpu))


def _alignment(on_gpu: bool) -> int:
    return _CUDA_ALIGNMENT if on_gpu else ALIGNMENT


def mask_bytes(n_ctx: int, n_ubatch: int) -> int:
    """Bytes of the attention mask of a batch: which token sees which cell of the cache."""
    return _F16 * padded_n_ctx(n_ctx) * n_ubatch


def input_bytes(arch: HybridArch, options: EngineOptions) -> int:
    """Bytes of what an evaluation is given: tokens, places in the cache, and the mask.

    They lie in host memory beside an accelerator's own copies.
    """
    return sum(node.n_bytes for node in _Builder(arch, options, on_gpu=False).inputs)


class _Builder:
    """Builds the largest graph that a context reserves memory for."""

    def __init__(self, arch: HybridArch, options: EngineOptions, *, on_gpu: bool) -> None:
        self.arch = arch
        self.options = options
        # On CUDA, attention unpacks a quantized cache as a whole before it reads it.
        self.dequantizes_kv = on_gpu
        self.graph = Graph()
        self.n_seqs = options.n_seq_max
        # llama-context.cpp rounds the tokens up so that all sequences get as many.
        n_ubatch = max(1, min(options.n_ubatch, options.n_batch, padded_n_ctx(options.n_ctx)))
        self.n_seq_tokens = -(-n_ubatch // self.n_seqs)
        self.n_tokens = self.n_seq_tokens * self.n_seqs
        self.n_outputs = min(n_ubatch, options.n_outputs_max)
        self.weight = Node(0, is_external=True)
        self._add_inputs()

    def _add_inputs(self) -> None:
        n_kv, n_tokens = padded_n_ctx(self.options.n_ctx), self.n_tokens
        self.tokens = _leaf(_I32, n_tokens)
        self.embeddings = _leaf(_F32, self.arch.n_embd, n_tokens)
        self.state_rows = _leaf(_I32, self.n_seqs)
        self.state_rows_main = self.state_rows.view()
        self.state_rows_extra = self.state_rows.view()
        self.k_rows = _leaf(_I64, n_tokens)
        self.v_rows = _leaf(_I64, n_tokens)
        self.mask = _leaf(_F16, n_kv, n_tokens)
        self.output_rows = _leaf(_I32, self.n_outputs)
        self.rotate_k = self._rotation(self.options.type_k, _k_rotation(self.arch.n_embd_head))
        self.rotate_v = self._rotation(self.options.type_v, _ROTATION)
        self.inputs = [
            self.tokens, self.embeddings, self.state_rows, self.k_rows, self.v_rows, self.mask,
            self.output_rows, *filter(None, (self.rotate_k, self.rotate_v)),
        ]  # fmt: skip

    def _rotation(self, type_: GgmlType, n: int) -> Node | None:
        is_quantized = type_.block_size > 1
        return _leaf(_F32, n, n) if is_quantized and self.arch.n_embd_head % 64 == 0 else None

    # -- whole graphs ---------------------------------------------------------------------------

    def trunk(self) -> None:
        """All layers and the output head."""
        current = self._op((self.arch.n_embd, self.n_tokens), self.weight, self.tokens)
        # Both ways to feed the model are part of the graph, whichever is used.
        self.graph.expand(current, self.embeddings)
        for i_layer, kind in enumerate(self.arch.layers):
            branch = self._layer(kind, self._norm(current), i_layer)
            current = self._elementwise(branch, current)
        current = self._norm(current)
        current = self._op((self.arch.n_embd, self.n_outputs), current, self.output_rows)
        self._head(current)

    def mtp(self) -> None:
        """The MTP block: it sees the trunk's last layer, and keeps the rows that are asked for."""
        n_embd, n_tokens = self.arch.n_embd, self.n_tokens
        embedded = self._op((n_embd, n_tokens), self.weight, self.tokens)
        trunk_end = _leaf(_F32, n_embd, n_tokens)
        pair = self._op((2 * n_embd, n_tokens), self._norm(embedded), self._norm(trunk_end))
        fused = self._matmul(n_embd, pair)
        current = self._elementwise(self._attention(self._norm(fused)), fused)
        current = self._op((n_embd, self.n_outputs), current, self.output_rows)
        normed = self._norm(current)
        current = self._elementwise(self._mtp_experts(normed), current)
        # A LayerNorm, which unlike RMS norm is not computed in place.
        current = self._elementwise(self._op(current.layout, current), self.weight)
        self._head(current)

    def _head(self, current: Node) -> None:
        logits = self._matmul(self.arch.n_vocab, current)
        logits.is_output = True
        self.graph.expand(logits)

    def _layer(self, kind: LayerKind, current: Node, i_layer: int) -> Node:
        match kind:
            case LayerKind.SSM:
                return self._ssm(current)
            case LayerKind.ATTENTION:
                return self._attention(current)
            case LayerKind.MLP:
                return self._mlp(current, self.arch.n_ff)
            case LayerKind.MOE:
                return self._experts(current, i_layer)

    # -- layers ---------------------------------------------------------------------------------

    def _ssm(self, current: Node) -> Node:
        arch, n_seqs, n_seq_tokens = self.arch, self.n_seqs, self.n_seq_tokens
        n_channels, d_inner = arch.ssm_d_conv_channels, arch.ssm_d_inner
        head = (d_inner // arch.ssm_dt_rank, arch.ssm_dt_rank, n_seq_tokens, n_seqs)
        tail = self._state_copy((arch.ssm_d_conv - 1) * n_channels)
        projected = self._matmul(arch.ssm_d_in_proj, current).view()
        z, xbc, dt = projected.view(), projected.view(), projected.view()
        with_tail = (arch.ssm_d_conv - 1 + n_seq_tokens, n_channels, n_seqs)
        window = self._op(with_tail, tail.view(), xbc.view())
        for _ in range(min(n_seq_tokens, 1 + self.options.n_rs_seq)):
            self.graph.expand(self._into_cache(window.view()))
        xbc = self._op((n_channels, n_seq_tokens, n_seqs), window, self.weight)
        xbc = self._elementwise(self._elementwise(xbc, self.weight))
        x, b, c = xbc.view(), xbc.view(), xbc.view()
        dt = self._elementwise(self._op((arch.ssm_dt_rank, n_seq_tokens, n_seqs), dt), self.weight)
        n_states = (1 + self.options.n_rs_seq) * arch.ssm_d_state * d_inner * n_seqs
        scanned = self._op(
            (d_inner * self.n_tokens + n_states,),
            self.weight, x, dt, self.weight, b, c, self.state_rows_main,
        )  # fmt: skip
        self.graph.expand(scanned)
        self._extra_states(arch.ssm_d_state * d_inner)
        self.graph.expand(self._into_cache(scanned.view()))
        gate = self._op(head, z)
        y = self._elementwise(scanned.view(head), self._op_in_place(head, x, self.weight))
        gated = self._op(head, gate, y)
        by_group = (d_inner // arch.ssm_n_group, arch.ssm_n_group, n_seq_tokens, n_seqs)
        normed = self._norm(gated.view(by_group))
        return self._matmul(arch.n_embd, normed.view((d_inner, self.n_tokens)))

    def _state_copy(self, n_state: int) -> Node:
        """The states that the batch's sequences start from."""
        states = self._op((n_state, self.n_seqs), self.weight, self.state_rows_main)
        self.graph.expand(states)
        self._extra_states(n_state)
        return states

    def _extra_states(self, n_state: int) -> None:
        # States of sequences outside the batch; none in the graph that memory is reserved for.
        self.graph.expand(self._into_cache(self._op((n_state, 0), self.state_rows_extra)))

    def _attention(self, current: Node) -> Node:
        arch, n_tokens = self.arch, self.n_tokens
        q = self._matmul(arch.n_embd_q, current).view()
        k = self._matmul(arch.n_embd_gqa, current).view()
        v = self._matmul(arch.n_embd_gqa, current).view()
        q, k = self._rotated(q, self.rotate_k), self._rotated(k, self.rotate_k)
        v = self._rotated(v, self.rotate_v)
        self.graph.expand(q, v, k)
        self.graph.expand(self._into_cache(k.view(), self.k_rows))
        self.graph.expand(self._into_cache(v.view(), self.v_rows))
        shape = (arch.n_embd_head, arch.n_head, n_tokens)
        attended = self._op(shape, q.view().view(), self.weight, self.weight, self.mask)
        attended.n_bytes += self._unpacked_kv_bytes()
        attended = attended.view((arch.n_embd_q, n_tokens))
        self.graph.expand(attended)
        return self._matmul(arch.n_embd, self._rotated(attended, self.rotate_v))

    def _unpacked_kv_bytes(self) -> int:
        # Evaluations of one or two tokens read the packed cache; memory is for the larger ones.
        if not self.dequantizes_kv or self.n_tokens <= 2:
            return 0
        n_quantized = sum(t.block_size > 1 for t in (self.options.type_k, self.options.type_v))
        return n_quantized * padded_n_ctx(self.options.n_ctx) * self.arch.n_embd_gqa * _F16

    def _rotated(self, current: Node, rotation: Node | None) -> Node:
        if rotation is None:
            return current
        n_elements = (current.view_of or current).n_bytes // _F32
        return self._op((n_elements,), rotation, current.view()).view(current.layout)

    def _mlp(self, current: Node, n_ff: int) -> Node:
        hidden = self._elementwise(self._elementwise(self._matmul(n_ff, current)))
        return self._matmul(self.arch.n_embd, hidden)

    def _experts(self, current: Node, i_layer: int) -> Node:
        arch = self.arch
        narrow = self._matmul(arch.n_latent, current) if arch.n_latent else current
        routed = self._routed(current, narrow, arch.n_expert_used_at(i_layer), i_layer)
        if arch.n_latent:
            routed = self._matmul(arch.n_embd, routed)
        return self._elementwise(routed, self._mlp(current, arch.n_ff_shexp))

    def _mtp_experts(self, current: Node) -> Node:
        arch, i_layer = self.arch, self.arch.n_layer
        shared = self._mlp(current, arch.n_ff_shexp)
        narrow = self._matmul(arch.n_latent, current) if arch.n_latent else current
        routed = self._routed(current, narrow, arch.n_expert_used_at(i_layer), i_layer)
        if arch.n_latent:
            routed = self._matmul(arch.n_embd, routed)
        return self._elementwise(routed, shared)

    def _routed(self, current: Node, narrow: Node, n_used: int, i_layer: int) -> Node:
        arch, n_tokens = self.arch, current.layout[1]
        chosen, weights = self._route(current, n_used)
        self.graph.expand(weights)
        up_shape = (arch.n_ff_exp_at(i_layer), n_used, n_tokens)
        up = self._op(up_shape, self.weight, narrow.view(), chosen)
        up = self._elementwise(self._elementwise(up))
        down = self._op((arch.n_embd_exp, n_used, n_tokens), self.weight, up, chosen)
        down = self._elementwise(down, weights)
        self.graph.expand(down)
        parts = [down.view() for _ in range(n_used)]
        self.graph.expand(*parts)
        shape = (arch.n_embd_exp, n_tokens)
        if n_used == 1:
            return self._op(shape, parts[0])
        total = parts[0]
        for part in parts[1:]:
            total = self._op_in_place(shape, total, part)
            self.graph.expand(total)
        return total

    def _route(self, current: Node, n_used: int) -> tuple[Node, Node]:
        """The chosen experts of each token, and their weights."""
        arch, n_tokens = self.arch, current.layout[1]
        probabilities = self._elementwise(self._matmul(arch.n_expert, current))
        biased = self._elementwise(probabilities, self.weight)
        chosen = self._op((arch.n_expert, n_tokens), biased).view()
        weights = self._op((1, n_used, n_tokens), probabilities.view(), chosen)
        if arch.expert_weights_norm:
            flat = weights.view((n_used, n_tokens))
            total = self._elementwise(self._op((1, n_tokens), flat))
            weights = self._op_in_place((n_used, n_tokens), flat, total)
            weights = weights.view((1, n_used, n_tokens))
        if arch.expert_weights_scale not in (0.0, 1.0):
            weights = self._elementwise(weights)
        return chosen, weights

    # -- operations -----------------------------------------------------------------------------

    def _op(self, shape: tuple[int, ...], *inputs: Node) -> Node:
        return Node(_F32 * prod(shape), inputs, layout=shape)

    def _op_in_place(self, shape: tuple[int, ...], *inputs: Node) -> Node:
        return Node(_F32 * prod(shape), inputs, layout=shape, in_place=True)

    def _elementwise(self, *inputs: Node) -> Node:
        return self._op_in_place(inputs[0].layout, *inputs)

    def _matmul(self, n_rows: int, current: Node) -> Node:
        return self._op((n_rows, current.layout[1]), self.weight, current)

    def _norm(self, current: Node) -> Node:
        return self._elementwise(self._elementwise(current), self.weight)

    def _into_cache(self, *inputs: Node) -> Node:
        """A write to a cache, whose result is a view of it."""
        return Node(0, inputs, view_of=self.weight, is_external=True)


def _leaf(n_element_bytes: int, *shape: int) -> Node:
    return Node(n_element_bytes * prod(shape), layout=shape)


def _k_rotation(n_embd_head: int) -> int:
    n = _ROTATION
    while n_embd_head % (2 * n) == 0:
        n *= 2
    return n
