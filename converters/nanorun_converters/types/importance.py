"""How much noise in one tensor's output matters to the model's answers.

Every layer adds its output to the residual stream, so noise counts by its power against the
stream's there: a layer that writes little can be coarse. Noise then does two things. It stays in
the stream to the end, and everything written later is computed from it; the second weighs
`AMPLIFICATION` times as much.

`AMPLIFICATION` was fitted on pico, the only model it was tried on. There the KL divergence that
encoding one tensor causes is predicted within a factor of 4 for all 40 measurements outside
attention, and for 8 of 16 in attention, whose share is tiny (`bench/quant.py --part sensitivity`).

Powers come from the imatrix: the output of `W` on inputs of mean squares `w` has the power
`sum(w * W²)`, if inputs are uncorrelated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from nanorun.model.arch import HybridArch, LayerKind

AMPLIFICATION = 16.0
"""Weight of what later layers make of noise, against the noise itself."""
_LEAST = 1e-6
"""Of the largest measured factor: less is not told apart from none."""
_MTP = 0.1
"""A draft head changes no answer, only how many drafts are right."""


def importance(arch: HybridArch, powers: Mapping[str, float]) -> dict[str, float]:
    """The factor of each tensor's relative noise, 1 for the output's.

    Args:
        arch: The model.
        powers: Mean power of each tensor's output, of an expert's for one use.
    """
    stream = powers["token_embd.weight"] / arch.n_vocab
    written: dict[str, tuple[float, float]] = {"token_embd.weight": (stream, stream)}
    for i, kind in enumerate(arch.layers):
        outputs = _outputs(arch, kind, f"blk.{i}.", powers)
        stream += sum({names[-1]: power for names, power in outputs}.values())
        for names, power in outputs:
            written |= dict.fromkeys(names, (power, stream))
    factors = dict.fromkeys(powers, _MTP)
    factors["output.weight"] = 1.0
    for name, (power, then) in written.items():
        later = (stream - then) / stream
        factors[name] = power / then * (then / stream + AMPLIFICATION * later)
    return factors


def with_measured(
    factors: Mapping[str, float], sensitivity: Mapping[str, float]
) -> Mapping[str, float]:
    """The factors, corrected by measured ones where there are any.

    The geometric mean of both: the model is wrong about single tensors, and a measurement, of one
    tensor's noise in an otherwise exact model, about what noise does beside other noise. On pico
    files searched with the mean were nearer to F32 than with either.
    """
    known = {name: sensitivity[name] for name in factors if name in sensitivity}
    if not any(known.values()):
        return factors
    scale = median(found / factors[name] for name, found in known.items())
    least = _LEAST * max(known.values())
    measured = {n: max(known.get(n, f * scale), least) for n, f in factors.items()}
    return {name: math.sqrt(f * scale * measured[name]) for name, f in factors.items()}


Outputs = list[tuple[tuple[str, ...], float]]


def _outputs(arch: HybridArch, kind: LayerKind, block: str, powers: Mapping[str, float]) -> Outputs:
    """What a layer writes: the tensors that make each output, the last of them writing it."""

    def output(*suffixes: str, factor: float = 1.0) -> tuple[tuple[str, ...], float]:
        names = tuple(f"{block}{suffix}.weight" for suffix in suffixes)
        return names, powers[names[-1]] * factor

    match kind:
        case LayerKind.SSM:
            return [output("ssm_in", "ssm_out")]
        case LayerKind.ATTENTION:
            return [output("attn_q", "attn_k", "attn_v", "attn_output")]
        case LayerKind.MLP:
            return [output("ffn_up", "ffn_down")]
        case LayerKind.MOE:
            shared = output("ffn_up_shexp", "ffn_down_shexp")
            if arch.n_latent:
                routed = ("ffn_latent_down", "ffn_up_exps", "ffn_down_exps", "ffn_latent_up")
                return [output(*routed), shared]
            # Each of the experts used has this share of the weight.
            factor = arch.expert_weights_scale**2 / arch.n_expert_used
            return [output("ffn_up_exps", "ffn_down_exps", factor=factor), shared]
