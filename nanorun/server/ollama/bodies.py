"""What /api/chat and /api/generate take, and what it means to the engine."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import ConfigDict, Field, StrictBool, ValidationError

from nanorun.model.chat import GenerateOptions, Grammar, Message, Prompt, RawPrompt
from nanorun.model.think import Think
from nanorun.server.asked import Asked
from nanorun.server.depth import read_depth
from nanorun.server.errors import invalid
from nanorun.server.history import History, read_messages, to_continue
from nanorun.server.limits import LimitedBody
from nanorun.server.sampling_body import SamplingBody, asked_numbers
from nanorun.server.tools import ToolIn

_NUMBERS = {"repeat_penalty": "repetition_penalty", "repeat_last_n": "penalty_last_n"}
"""Ollama's names of sampling values that differ."""
_LOADING = frozenset({
    "f16_kv", "logits_all", "low_vram", "main_gpu", "num_batch", "num_gpu", "num_keep",
    "num_thread", "numa", "penalize_newline", "use_mlock", "use_mmap", "vocab_only",
})  # fmt: skip
"""Options of how Ollama loads a model or keeps its context; `nanorun serve` plans that itself."""
_NEUTRAL = {"mirostat": (0,), "tfs_z": (1,), "typical_p": (1,)}
_IGNORED_BESIDE = frozenset({"mirostat_eta", "mirostat_tau"})


class _Options(SamplingBody):
    """The sampling values among a request's options."""

    model_config = ConfigDict(extra="forbid")

    num_predict: Annotated[int, Field(ge=-2)] | None = None
    num_ctx: Annotated[int, Field(ge=1)] | None = None
    stop: list[str] | str | None = None


class OllamaRequest(LimitedBody):
    """What both have in common."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    stream: StrictBool | None = None
    """True unless it says false."""
    format: Any = None
    options: dict[str, Any] | None = None
    keep_alive: Any = None
    think: Any = None

    @property
    def streams(self) -> bool:
        """Whether the answer comes bit by bit."""
        return self.stream is not False

    @property
    def unloads(self) -> bool:
        """Whether it is sent to free memory, where it asks nothing."""
        return self.keep_alive in (0, "0", "0s", "0m")

    def _asked(
        self, prompt: Prompt, default: Think, notices: tuple[str, ...], **more: Any
    ) -> Asked:
        values, told = self._values()
        limit = values.num_predict
        stop = [values.stop] if isinstance(values.stop, str) else values.stop or []
        options = GenerateOptions(
            **asked_numbers(values),
            think=read_depth(self.think, "think") or default,
            max_tokens=None if limit is None or limit < 1 else limit,
            stop=tuple(text for text in stop if text),
            grammar=self._grammar(),
            **more,
        )
        return Asked(prompt, options, notices=(*notices, *told))

    def _values(self) -> tuple[_Options, tuple[str, ...]]:
        """The options, by nanorun's names, and what was left out of them.

        Raises:
            ApiError: Naming one that would change the answer and cannot be served.
        """
        kept: dict[str, Any] = {}
        left_out: list[str] = []
        for name, value in (self.options or {}).items():
            if value is None or name in _IGNORED_BESIDE or value in _NEUTRAL.get(name, ()):
                continue
            if name in _LOADING:
                left_out.append(name)
            elif name == "top_k" and value == -1:
                kept[name] = 0
            elif name == "seed" and value == -1:
                continue
            else:
                kept[_NUMBERS.get(name, name)] = value
        try:
            values = _Options.model_validate(kept)
        except ValidationError as error:
            first = error.errors()[0]
            field = f"options.{first['loc'][0]}"
            raise invalid(
                field, "it is not served" if first["type"] == "extra_forbidden" else first["msg"]
            ) from error
        told = (f"options {', '.join(left_out)}: nanorun serve decides",) if left_out else ()
        return values, told

    def _grammar(self) -> Grammar | None:
        match self.format:
            case None | "":
                return None
            case "json":
                return Grammar("json_schema", '{"type": "object"}')
            case dict():
                return Grammar("json_schema", json.dumps(self.format))
        raise invalid("format", 'it is neither "json" nor a JSON Schema')


class OllamaChat(OllamaRequest):
    """The body of /api/chat."""

    messages: list[dict[str, Any]] | None = None
    tools: list[ToolIn] | None = None

    def to_asked(self, *, default_think: Think) -> Asked:
        """What it asks of the engine.

        Raises:
            ApiError: Naming the field that cannot be meant.
        """
        raw = [self._plain(i, message) for i, message in enumerate(self.messages or ())]
        messages, notices = read_messages(raw)
        messages, is_begun = to_continue(messages)
        return self._asked(
            messages, default_think, notices,
            tools=tuple(tool.to_tool() for tool in self.tools or ()),
            echo_thinking=self._echoes(raw),
            continue_final=is_begun,
        )  # fmt: skip

    def _plain(self, i: int, message: dict[str, Any]) -> dict[str, Any]:
        """A message of Ollama's as one of OpenAI's: pictures lie beside the text, not in it."""
        made = {**message, "reasoning": message.get("thinking")}
        if message.get("images"):
            made["content"] = [message.get("content") or "", {"type": "image"}]
        return made

    @staticmethod
    def _echoes(raw: list[dict[str, Any]]) -> bool | None:
        replies = [message for message in raw if message.get("role") == "assistant"]
        return any(reply.get("thinking") for reply in replies) if replies else None


class OllamaGenerate(OllamaRequest):
    """The body of /api/generate."""

    prompt: str | None = None
    system: str | None = None
    raw: StrictBool | None = None
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None
    images: list[Any] | None = None

    def to_asked(self, *, default_think: Think) -> Asked:
        """What it asks of the engine.

        Raises:
            ApiError: Naming the field that cannot be meant.
        """
        for name, instead in (
            ("suffix", "the model fills no gaps"),
            ("template", "serve --chat-template FILE"),
            ("context", "send the conversation to /api/chat"),
            ("images", "the model reads text only"),
        ):
            if getattr(self, name):
                raise invalid(name, f"it is not served: {instead}")
        if self.raw:
            return self._asked(RawPrompt(text=self.prompt or ""), default_think, ())
        history = History()
        said = [("user", self.prompt or "")]
        if self.system:
            said.insert(0, ("system", self.system))
        messages: tuple[Message, ...] = tuple(
            history.read(i, {"role": role, "content": text}) for i, (role, text) in enumerate(said)
        )
        return self._asked(messages, default_think, history.notices)
