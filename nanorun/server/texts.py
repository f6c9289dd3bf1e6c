"""What texts are in tokens and what prompts are as texts: /tokenize, /detokenize, /apply-template.

The first two take and answer what both llama.cpp's server and vLLM do.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, StrictBool, StrictInt, ValidationError

from nanorun.model.chat import GenerateOptions, RawPrompt
from nanorun.model.think import OFF
from nanorun.server.errors import invalid
from nanorun.server.openai.chat_body import ChatRequest
from nanorun.server.service import Service


class TokenizeRequest(BaseModel):
    """The body of /tokenize: a text, or the messages of a chat and what else shapes its prompt."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    content: str | None = None
    """llama.cpp's name of the text."""
    prompt: str | None = None
    """vLLM's."""
    messages: list[dict[str, Any]] | None = None
    add_special: StrictBool | None = None
    """Whether BOS is put before the text; llama.cpp's name."""
    add_special_tokens: StrictBool | None = None
    """vLLM's."""
    parse_special: StrictBool = True
    """Whether control tokens spelled in the text are control tokens."""
    with_pieces: StrictBool = False
    """llama.cpp's: give each token with what it stands for."""
    return_token_strs: StrictBool = False
    """vLLM's: give what the tokens stand for beside them."""

    @property
    def text(self) -> str | None:
        """The text, under either name."""
        return self.content if self.prompt is None else self.prompt

    @property
    def adds_bos(self) -> bool:
        """Whether BOS is put before the text, where the model's file says so."""
        return bool(self.add_special or self.add_special_tokens)

    def chat(self) -> ChatRequest:
        """The request whose prompt is meant.

        Raises:
            ApiError: If it is none.
        """
        try:
            return ChatRequest.model_validate(
                {"messages": self.messages, **(self.model_extra or {})}
            )
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise invalid(field or "messages", first["msg"]) from error


class DetokenizeRequest(BaseModel):
    """The body of /detokenize."""

    model: str | None = None
    tokens: list[StrictInt]
    skip_special_tokens: StrictBool = False


def text_routes(service: Service) -> APIRouter:
    """The routes about texts and tokens."""
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The tokens of a text, or of the prompt that messages make."""
        service.check_model(body.model)
        tokens = await _tokens(service, body)
        answer: dict[str, Any] = {
            "tokens": tokens,
            "count": len(tokens),
            "max_model_len": service.info().n_ctx,
        }
        if body.with_pieces or body.return_token_strs:
            pieces = await service.client.pieces(tokens)
            if body.return_token_strs:
                answer["token_strs"] = [piece.decode("utf-8", "replace") for piece in pieces]
            if body.with_pieces:
                named = zip(tokens, pieces, strict=True)
                answer["tokens"] = [{"id": token, "piece": _piece(p)} for token, p in named]
        return answer

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """The text that tokens stand for, under llama.cpp's name and vLLM's."""
        service.check_model(body.model)
        special = not body.skip_special_tokens
        text = await service.client.detokenize(body.tokens, special=special) if body.tokens else ""
        return {"content": text, "prompt": text}

    @router.post("/apply-template")
    async def apply_template(body: ChatRequest) -> dict[str, str]:
        """The prompt that a chat request makes, as the model reads it."""
        service.check_model(body.model)
        asked = body.to_asked(default_think=service.settings.think)
        return {"prompt": (await service.client.render(asked.prompt, asked.options)).text}

    return router


async def _tokens(service: Service, body: TokenizeRequest) -> list[int]:
    if (body.text is None) == (body.messages is None):
        raise invalid("content", "give a text (content, prompt) or messages, one of the two")
    unknown = sorted(body.model_extra or ())
    if body.text is not None and unknown:
        raise invalid(unknown[0], "a text is tokenized without it")
    if body.messages is not None:
        asked = body.chat().to_asked(default_think=service.settings.think)
        return list((await service.client.render(asked.prompt, asked.options)).tokens)
    text = body.text or ""
    if not (body.adds_bos and text):
        return await service.client.tokenize(text, special=body.parse_special)
    prompt = RawPrompt(text=text, special=body.parse_special)
    return list((await service.client.render(prompt, GenerateOptions(think=OFF))).tokens)


def _piece(piece: bytes) -> str | list[int]:
    """A token's text, or its bytes where they are only a part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
