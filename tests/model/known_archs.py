"""Architectures for tests: the released models (reference: their config.json) and small ones."""

from __future__ import annotations

from dataclasses import replace

from nanorun.model.arch import HybridArch, parse_pattern

NANO = HybridArch(
    layers=parse_pattern("MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"),
    n_vocab=131072,
    n_embd=2688,
    n_ctx_train=1048576,
    norm_eps=1e-5,
    n_head=32,
    n_head_kv=2,
    n_embd_head=128,
    ssm_d_conv=4,
    ssm_d_inner=4096,
    ssm_d_state=128,
    ssm_dt_rank=64,
    ssm_n_group=8,
    n_expert=128,
    n_expert_used=6,
    n_expert_shared=1,
    n_ff_exp=1856,
    n_ff_shexp=3712,
    expert_weights_norm=True,
    expert_weights_scale=2.5,
)

LIGHTNING = replace(NANO, n_layer_nextn=1)

SUPER_TRUNK = HybridArch(
    layers=parse_pattern(
        "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
    ),
    n_vocab=131072,
    n_embd=4096,
    n_ctx_train=1048576,
    norm_eps=1e-5,
    n_head=32,
    n_head_kv=2,
    n_embd_head=128,
    ssm_d_conv=4,
    ssm_d_inner=8192,
    ssm_d_state=128,
    ssm_dt_rank=128,
    ssm_n_group=8,
    n_expert=512,
    n_expert_used=22,
    n_expert_shared=1,
    n_ff_exp=2688,
    n_ff_shexp=5376,
    n_latent=1024,
    expert_weights_norm=True,
    expert_weights_scale=5.0,
)

SUPER = replace(SUPER_TRUNK, n_layer_nextn=1)

NANO_4B = HybridArch(
    layers=parse_pattern("M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"),
    n_vocab=131072,
    n_embd=3136,
    n_ctx_train=1048576,
    norm_eps=1e-5,
    n_head=40,
    n_head_kv=8,
    n_embd_head=128,
    ssm_d_conv=4,
    ssm_d_inner=7680,
    ssm_d_state=128,
    ssm_dt_rank=96,
    ssm_n_group=8,
    n_ff=12544,
)

TINY_MOE = HybridArch(
    layers=parse_pattern("ME*EM"),
    n_vocab=16,
    n_embd=64,
    n_ctx_train=4096,
    norm_eps=1e-5,
    n_head=4,
    n_head_kv=2,
    n_embd_head=32,
    ssm_d_conv=4,
    ssm_d_inner=64,
    ssm_d_state=16,
    ssm_dt_rank=4,
    ssm_n_group=2,
    n_expert=8,
    n_expert_used=3,
    n_expert_shared=1,
    n_ff_exp=32,
    n_ff_shexp=96,
    expert_weights_norm=True,
    expert_weights_scale=2.5,
)

TINY_LATENT_MTP = replace(TINY_MOE, n_latent=32, n_layer_nextn=1)

TINY_PUZZLE = replace(
    TINY_MOE, n_ff_exp_per_layer=(0, 32, 0, 64, 0), n_ff_exp=64,
    n_expert_used_per_layer=(0, 3, 0, 2, 0), n_expert_used=2,
)  # fmt: skip

TINY_DENSE = replace(
    TINY_MOE,
    layers=parse_pattern("M-*-"),
    n_ff=128,
    n_expert=0,
    n_expert_used=0,
    n_expert_shared=0,
    n_ff_exp=0,
    n_ff_shexp=0,
    expert_weights_scale=1.0,
    expert_weights_norm=False,
)
