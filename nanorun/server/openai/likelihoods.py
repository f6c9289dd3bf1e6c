"""Log-probabilities of tokens, in the words of chat completions and of /v1/responses."""

from __future__ import annotations

from typing import Any

from nanorun.model.chat import TokenLogprobs


def token_object(token: TokenLogprobs) -> dict[str, Any]:
    """How likely a token was, with those that were likeliest in its place."""
    best = [_piece_object(piece, logprob) for piece, logprob in token.alternatives]
    return {**_piece_object(token.piece, token.logprob), "top_logprobs": best}


def _piece_object(piece: bytes, logprob: float) -> dict[str, Any]:
    return {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)}
