"""Drawing a token from logits: truncation and choice, in numpy, without sorting the vocabulary.

The filters come in llama.cpp's order (top-k, top-p, min-p, temperature) and keep what its samplers
keep. They cost less because only the likeliest few hundred of 131,072 logits are ever sorted:
`bench/sampling.py` compares the two.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Ids = NDArray[np.intp]

_BLOCK = 256
# Most tokens that are sorted in the search for a nucleus.
_N_LIKELY = 1024
# Larger ones are found by bins of logits: 256 in each factor of e, down to e^-32 of the likeliest.
_BINS_A_NAT = 256
_N_BINS = 32 * _BINS_A_NAT


def likeliest(logits: Logits, n: int) -> Ids:
    """Ids of the `n` highest logits, highest first; ties by id.

    The n-th highest of the blocks' maxima is a lower bound for the n-th highest logit, so only
    what reaches it has to be sorted.

    Args:
        logits: One a token, `(n_vocab,)`.
        n: How many; `n_vocab` at most are found.

    Returns:
        The ids, `(n,)`.
    """
    block = min(_BLOCK, len(logits) // (2 * n))
    if block > 1:
        n_blocks = len(logits) // block
        maxima = logits[: n_blocks * block].reshape(n_blocks, block).max(axis=1)
        bound = np.partition(maxima, n_blocks - n)[n_blocks - n]
        ids = np.flatnonzero(logits >= bound)
    else:
        ids = np.arange(len(logits))
    order = np.argsort(-logits[ids], kind="stable")
    return ids[order[:n]]


def truncate(logits: Logits, *, top_k: int, top_p: float, min_p: float) -> Ids | None:
    """Ids that the filters leave, None if they leave all.

    Args:
        logits: One a token, `(n_vocab,)`.
        top_k: Keep that many of the likeliest; 0 for all.
        top_p: Keep the likeliest until their probabilities sum up to it.
        min_p: Keep what is at least that share of the likeliest's probability.

    Returns:
        The ids, `(n_left,)`, in no order.
    """
    ids: Ids | None = None
    if 0 < top_k < len(logits):
        ids = likeliest(logits, top_k)
    if top_p < 1:
        ids = _nucleus(logits, top_p) if ids is None else ids[: _n_nucleus(logits[ids], top_p)]
    if min_p > 0:
        bound = logits.max() + np.log(min_p)
        ids = np.flatnonzero(logits >= bound) if ids is None else ids[logits[ids] >= bound]
    return ids


def _nucleus(logits: Logits, top_p: float) -> Ids:
    """The likeliest tokens of all that sum up to `top_p`; in no order if they are many."""
    top = logits.max()
    weights = np.exp(logits - top)
    wanted = top_p * float(weights.sum(dtype=np.float64))
    ids = likeliest(logits, _N_LIKELY)
    sums = np.cumsum(weights[ids], dtype=np.float64)
    if sums[-1] >= wanted or len(ids) == len(logits):
        return ids[: int(np.searchsorted(sums, wanted)) + 1]
    return _large_nucleus((top - logits) * np.float32(_BINS_A_NAT), weights, wanted)


def _large_nucleus(depth: Logits, weights: Logits, wanted: float) -> Ids:
    """The nucleus where it is too large to be sorted: only the bin at its edge is.

    Args:
        depth: How far each logit lies below the highest, in bins.
        weights: What each token weighs.
        wanted: What the nucleus weighs.
    """
    bins = np.minimum(depth, _N_BINS - 1).astype(np.intp)
    sums = np.cumsum(np.bincount(bins, weights, _N_BINS))
    edge = min(int(np.searchsorted(sums, wanted)), _N_BINS - 1)
    inside = np.flatnonzero(bins < edge)
    at_edge = np.flatnonzero(bins == edge)
    at_edge = at_edge[np.argsort(depth[at_edge], kind="stable")]
    missing = wanted - (float(sums[edge - 1]) if edge else 0.0)
    n_more = int(np.searchsorted(np.cumsum(weights[at_edge], dtype=np.float64), missing)) + 1
    return np.concatenate([inside, at_edge[:n_more]])


def _n_nucleus(sorted_logits: Logits, top_p: float) -> int:
    weights = np.exp(sorted_logits - sorted_logits[0])
    sums = np.cumsum(weights, dtype=np.float64)
    return int(np.searchsorted(sums, top_p * sums[-1])) + 1


class Noise:
    """Random numbers for one draw after the other, each tied to a seed, a step and a token.

    A token's number does not depend on which others are considered. So a draw that is repeated with
    logits that differ in their last digits, as those of another batch do, almost always comes out
    the same; a single number for all tokens would fall on another one far more often.

    Args:
        seed: Decides them all.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.next_step(0)

    def next_step(self, step: int) -> None:
        """Go to the numbers of a step."""
        state = (self._seed + step * int(_STRIDE)) % 2**64
        self._key = _mix(np.array([state], np.uint64))[0]

    def uniform(self, ids: Ids) -> NDArray[np.float64]:
        """Numbers strictly between 0 and 1, one a token: `(n,)` in, the same out."""
        mixed = _mix(self._key ^ (ids.astype(np.uint64) * _STRIDE))
        return ((mixed >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def gumbel(self, ids: Ids) -> NDArray[np.float64]:
        """Numbers of the standard Gumbel distribution: `(n,)` in, the same out."""
        gumbel: NDArray[np.float64] = -np.log(-np.log(self.uniform(ids)))
        return gumbel


_STRIDE = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every bit depends on every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(logits: Logits, ids: Ids | None, temperature: float, noise: Noise) -> int:
    """The index of a token drawn from `softmax(logits / temperature)`.

    The largest of logit and Gumbel noise is a draw from the softmax (Gumbel 1954). What is
    unlikely by a factor of e^8 is left aside at first: a coin decides whether the draw is from
    there.

    Args:
        logits: One a token that may be drawn, `(n,)`.
        ids: The tokens' ids, `(n,)`; None if they are 0, 1, 2, ...
        temperature: More than 0.
        noise: At the step of this draw.
    """
    scaled = (logits - logits.max()) / np.float32(temperature)
    is_likely = scaled > -_LIKELY_NATS
    places = np.flatnonzero(is_likely)
    if len(places) < len(logits):
        total = float(np.exp(scaled).sum(dtype=np.float64))
        likely = float(np.exp(scaled[places]).sum(dtype=np.float64))
        coin = float(noise.uniform(np.array([_COIN]))[0])
        if coin * total > likely and np.isfinite(scaled[~is_likely]).any():
            places = np.flatnonzero(~is_likely)
    chosen = places if ids is None else ids[places]
    return int(places[(scaled[places] + noise.gumbel(chosen)).argmax()])


# Few tokens come this close to the likeliest, and they make up most of the whole.
_LIKELY_NATS = 8.0
# No token has this id.
_COIN = 2**40


def log_softmax_at(logits: Logits, ids: Ids) -> NDArray[np.float64]:
    """Natural logarithms of the probabilities of some tokens, before any filter.

    Args:
        logits: One a token, `(n_vocab,)`.
        ids: Of whom, `(n,)`.

    Returns:
        The logarithms, `(n,)`.
    """
    top = float(logits.max())
    log_sum = np.log(np.exp(logits - np.float32(top)).sum(dtype=np.float64))
    logprobs: NDArray[np.float64] = logits[ids].astype(np.float64) - top - log_sum
    return logprobs
