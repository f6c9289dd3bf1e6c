"""The models nanorun knows by name, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nanorun.model.arch import HybridArch, parse_pattern


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One model with a name of its own."""

    name: str
    summary: str
    repository: str | None
    """On the Hugging Face Hub; None for the models that nanorun brings along."""
    arch: HybridArch | None = None
    """Its shape, where the sizes are published; enough to plan without a file."""


# Sizes as in each repository's config.json. The context is the trained 1M, which NVIDIA's configs
# cap at 262144.
_NANO = HybridArch(
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
_SUPER = HybridArch(
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
    n_layer_nextn=1,
)
_NANO_4B = HybridArch(
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

_MODELS = (
    KnownModel(
        "pico",
        "Comes with nanorun: arithmetic at Nano's architecture, a few MB",
        None,
    ),
    KnownModel(
        "pico-mtp",
        "pico with an MTP head, which drafts tokens ahead",
        None,
    ),
    KnownModel(
        "nano",
        "Nemotron 3 Nano 30B-A3B: hybrid MoE, 3B of 30B weights active, 1M context",
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        _NANO,
    ),
    KnownModel(
        "nano-4b",
        "Nemotron 3 Nano 4B: dense hybrid, 1M context",
        "nvidia/NVIDIA-Nemotron-3-Nano-4B-BF16",
        _NANO_4B,
    ),
    KnownModel(
        "lightning",
        "Nemotron 3.5 Lightning 30B-A3B: Nano's shape with an MTP head",
        "nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16",
        replace(_NANO, n_layer_nextn=1),
    ),
    KnownModel(
        "super",
        "Nemotron 3 Super 120B-A12B: latent MoE with an MTP head",
        "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16",
        _SUPER,
    ),
    KnownModel(
        "puzzle",
        "Nemotron Labs 3 Puzzle 75B-A9B: Super, with experts of many widths",
        "nvidia/NVIDIA-Nemotron-Labs-3-Puzzle-75B-A9B-BF16",
    ),
    KnownModel(
        "ultra",
        "Nemotron 3 Ultra 550B-A55B: latent MoE with an MTP head",
        "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16",
    ),
)

CATALOG: dict[str, KnownModel] = {model.name: model for model in _MODELS}
"""By name, the smallest use first."""
