"""Texts to tokens and back, for requests that want nothing else; in any thread."""

from __future__ import annotations

from nanorun.model.chat import PromptTokens
from nanorun.runtime.engine.prompts import (
    SHORT_CHARS,
    Check,
    check_tokens,
    is_short,
    make_prompt,
)
from nanorun.runtime.llama.loaded_model import LoadedModel
from nanorun.runtime.process.frames import (
    Detokenize,
    Pieces,
    Render,
    Rendered,
    Tokenize,
    Tokens,
)

TextRequest = Tokenize | Detokenize | Render
"""What `answer_text` answers."""
_CHECKED_EVERY = 4096


def is_quick(asked: TextRequest) -> bool:
    """Whether the answer takes some milliseconds at most."""
    match asked:
        case Tokenize():
            return len(asked.text) <= SHORT_CHARS
        case Detokenize():
            return len(asked.tokens) <= SHORT_CHARS
        case Render():
            return not asked.options.tools and is_short(asked.prompt)


def answer_text(model: LoadedModel, asked: TextRequest, check: Check) -> Tokens | Pieces | Rendered:
    """Answer a request.

    Args:
        model: Whose tokens they are.
        asked: The request.
        check: Called now and then; what it raises ends the work.

    Raises:
        UsageError: If the model has no such tokens, or the messages or options make no sense.
        ModelError: If the model's template makes nothing of the messages.
    """
    match asked:
        case Tokenize():
            return _tokenize(model, asked, check)
        case Detokenize():
            return _detokenize(model, asked, check)
        case Render():
            return _render(model, asked, check)


def _tokenize(model: LoadedModel, asked: Tokenize, check: Check) -> Tokens:
    tokens: list[int] = []
    for part in model.tokenizer.parts(asked.text):
        check()
        tokens += model.tokenize(part, special=asked.special)
    return Tokens(asked.id, tuple(tokens))


def _detokenize(model: LoadedModel, asked: Detokenize, check: Check) -> Pieces:
    check_tokens(asked.tokens, model.n_vocab)
    pieces = _pieces(model, asked.tokens, check)
    if not asked.special:
        silent = model.control_tokens
        shown = zip(asked.tokens, pieces, strict=True)
        pieces = tuple(b"" if token in silent else piece for token, piece in shown)
    return Pieces(asked.id, pieces)


def _pieces(model: LoadedModel, tokens: tuple[int, ...], check: Check) -> tuple[bytes, ...]:
    """The bytes of each token."""
    pieces: list[bytes] = []
    for start in range(0, len(tokens), _CHECKED_EVERY):
        check()
        pieces += map(model.piece, tokens[start : start + _CHECKED_EVERY])
    return tuple(pieces)


def _render(model: LoadedModel, asked: Render, check: Check) -> Rendered:
    made = make_prompt(model, asked.prompt, asked.options, check)
    if asked.counts_only:
        return Rendered(asked.id, len(made.tokens), None)
    tokens = tuple(made.tokens.tolist())
    text = b"".join(_pieces(model, tokens, check)).decode("utf-8", "replace")
    return Rendered(asked.id, len(tokens), PromptTokens(text, tokens, made.boundaries, made.thinks))
