"""From an endpoint's chunks to events: the differences in how replies come are settled here."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nanorun.chat.call_events import CallEvents, unread
from nanorun.chat.call_parsing import calls_from_json
from nanorun.chat.json_arguments import JsonArguments
from nanorun.chat.markup import THINK
from nanorun.chat.parser import ReplyParser
from nanorun.chat.plain_text import PlainParser
from nanorun.chat.tool_values import ToolSet
from nanorun.errors import EngineError
from nanorun.model.chat import (
    Event,
    Finished,
    FinishReason,
    GenerateOptions,
    Notice,
    PrefillProgress,
    RawPrompt,
    TextDelta,
    ThinkingDelta,
    Timings,
    ToolArguments,
    ToolCallBegun,
    ToolCallDelta,
    Usage,
)
from nanorun.runtime.remote.dialect import Dialect
from nanorun.runtime.remote.errors import error_from_body
from nanorun.runtime.remote.sse import DONE, SseComment, SseItem
from nanorun.runtime.remote.usage import (
    logprob_events,
    progress_events,
    settle_timings,
    settle_usage,
    sum_usage,
)

THINKING_FIELDS = ("reasoning_content", "reasoning")
"""Where endpoints put thinking; some fill both with the same text."""

_THINKING_PARTS = ("thinking", "reasoning")
"""Types of the parts of a content that are thinking (Mistral's are `thinking`)."""
_PROGRESS = re.compile(r"prompt (\d+) of (\d+) tokens")
_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}


@dataclass(slots=True)
class _CallDraft:
    """A tool call whose pieces are still coming."""

    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)
    events: CallEvents | None = None
    """Tells of it, once it is known to call a tool that was offered."""
    json: JsonArguments | None = None


class RemoteReply:
    """Reads one reply, from its first chunk to its end.

    Args:
        dialect: What the endpoint says.
        options: What it was asked.
        url: The endpoint, for errors.
        continues: Whether the prompt held thinking that is closed already, so that whatever
            comes is the answer.
        raw: The raw prompt that is gone on from, if it was one.
    """

    def __init__(
        self,
        dialect: Dialect,
        options: GenerateOptions,
        url: str,
        *,
        continues: bool = False,
        raw: RawPrompt | None = None,
    ) -> None:
        self.completion_id: str | None = None
        self.thinking_field: str | None = None
        self.thinking: list[str] = []
        self.n_thinking = 0
        """Pieces of thinking so far; nearly every endpoint sends one a token."""
        self.n_text = 0
        """Pieces of anything else that was generated."""
        self.is_complete = False
        """Whether the endpoint has said that it is done."""
        self.in_thinking = False
        self.last_thinking = ""
        """The latest piece of thinking, with its line breaks."""
        self.has_begun = False
        """Whether anything that was generated has come."""
        self.is_cut = False
        """Whether it was ended from here, to be continued after its thinking."""
        self._dialect = dialect
        self._url = url
        self._continues = continues
        self._wants_logprobs = options.logprobs is not None
        self._tools = ToolSet(options.tools)
        self._parser = _parser_for(options, raw)
        self._drafts: dict[int, _CallDraft] = {}
        self._n_calls = 0
        self._n_begun = 0
        self._index_in_text = 0
        """Of the call in the text that began last."""
        self._thinking_tail = ""
        self._reason: str | None = None
        self._stop_text: str | None = None
        self._usage: Mapping[str, Any] | None = None
        self._timings: Mapping[str, Any] | None = None
        self._began_at = time.monotonic()
        self._first_at: float | None = None
        self._last_at = self._began_at

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the answer here, while the endpoint went on."""
        return self._parser.stopped_by

    def take(self, item: SseItem) -> list[Event]:
        """The events of one item of the stream.

        Raises:
            NanorunError: If the item is an error, or nothing that belongs into such a stream.
        """
        if isinstance(item, SseComment):
            return self._take_comment(item.text)
        if item.text.strip() == DONE:
            self.is_complete = True
            return []
        try:
            chunk = json.loads(item.text)
        except (ValueError, RecursionError) as error:
            raise EngineError(
                f"{self._url} sent a chunk that is not JSON", facts=[item.text[:200]]
            ) from error
        if not isinstance(chunk, dict):
            raise EngineError(
                f"{self._url} sent a chunk that is no object", facts=[item.text[:200]]
            )
        return self.take_chunk(chunk)

    def take_chunk(self, chunk: Mapping[str, Any]) -> list[Event]:
        """The events of one chunk, or of a whole completion.

        Raises:
            NanorunError: If it is an error.
        """
        if chunk.get("error"):
            raise error_from_body(self._url, None, chunk)
        if isinstance(chunk.get("id"), str):
            self.completion_id = self.completion_id or chunk["id"]
        if isinstance(chunk.get("usage"), Mapping):
            self._usage = chunk["usage"]
        if isinstance(chunk.get("timings"), Mapping):
            self._timings = chunk["timings"]
        events = progress_events(chunk.get("prompt_progress"))
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, Mapping) and not choice.get("index"):
                events += self._take_choice(choice)
        return events

    def take_whole(self, body: Any) -> list[Event]:
        """The events of a completion that came in one piece, though a stream was asked for.

        Raises:
            NanorunError: If it is an error, or no completion.
        """
        if not isinstance(body, dict) or not (body.get("choices") or body.get("error")):
            raise EngineError(f"{self._url} does not answer as an OpenAI-style endpoint")
        self.is_complete = True
        return self.take_chunk(body)

    def _take_comment(self, text: str) -> list[Event]:
        """What nanorun's endpoint tells beside the chunks: progress and notices."""
        if match := _PROGRESS.fullmatch(text):
            return [PrefillProgress(int(match[1]), int(match[2]), 0)]
        if self._dialect.counts_thinking and text.startswith("notice: "):
            return [Notice(text.removeprefix("notice: "))]
        return []

    def _take_choice(self, choice: Mapping[str, Any]) -> list[Event]:
        delta = choice.get("delta", choice.get("message"))
        if not isinstance(delta, Mapping):
            delta = {"content": choice.get("text")}  # of the older completions
        events: list[Event] = []
        thinking, texts = self._texts_of(delta)
        if self._wants_logprobs:
            events += logprob_events(choice.get("logprobs"), in_thinking=bool(thinking))
        for text in thinking:
            events += self._take_thinking(text)
        for text in texts:
            events += self._take_content(text)
        calls = delta.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            if isinstance(call, Mapping):
                events += self._take_call(call)
        if isinstance(choice.get("stop_reason"), str):
            self._stop_text = choice["stop_reason"]
        if isinstance(choice.get("finish_reason"), str):
            self._reason = choice["finish_reason"]
        return events

    # --- thinking and answer ----------------------------------------------------------------

    def _texts_of(self, delta: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """The pieces of thinking and of the answer; a content may be a list of typed parts."""
        fields = [name for name in THINKING_FIELDS if _texts(delta.get(name))]
        self.thinking_field = fields[0] if fields else self.thinking_field
        thinking = _texts(delta.get(fields[0])) if fields else []
        content, texts = delta.get("content"), []
        for part in content if isinstance(content, list) else [content]:
            if isinstance(part, Mapping) and part.get("type") in _THINKING_PARTS:
                thinking += _texts(part.get("thinking") or part.get("text"))
            else:
                texts += _texts(part)
        return thinking, texts

    def _take_thinking(self, text: str) -> list[Event]:
        """Thinking without the line breaks around it, as the local engine gives it."""
        if self._continues:
            # The endpoint's parser waits for the end of thinking, which is in the prompt.
            return self._take_content(text)
        self._count("thinking")
        self.last_thinking = text
        text = self._thinking_tail + text
        if not self.thinking:
            text = text.lstrip("\n")
        body = text.rstrip()
        self._thinking_tail = text[len(body) :]
        if not body:
            return []
        self.thinking.append(body)
        return [ThinkingDelta(body)]

    def _take_content(self, text: str) -> list[Event]:
        if self._dialect.counts_thinking:
            self._count("text")
            return [TextDelta(text)]
        was_thinking = self._parser.in_thinking
        events = self._parser.feed(text.encode("utf-8", "replace"))
        self._count("thinking" if was_thinking else "text")
        if self._parser.in_thinking:
            self.in_thinking, self.last_thinking = True, text
        return self._renumbered(events)

    def _renumbered(self, events: Sequence[Event]) -> list[Event]:
        """Events of the parser, its tool calls numbered after those that came as such."""
        out: list[Event] = []
        for event in events:
            match event:
                case ToolCallBegun():
                    self._index_in_text = self._next_index()
                    event = replace(event, index=self._index_in_text)
                case ToolArguments():
                    event = replace(event, index=self._index_in_text)
                case ToolCallDelta():
                    index = self._index_in_text if event.call.name else self._n_begun
                    event = replace(event, index=index)
                    self._n_calls += 1
                case ThinkingDelta(text):
                    self.thinking.append(text)
            out.append(event)
        return out

    def _next_index(self) -> int:
        self._n_begun += 1
        return self._n_begun - 1

    def _count(self, kind: str) -> None:
        self._last_at = time.monotonic()
        self._first_at = self._first_at or self._last_at
        self.has_begun = True
        self.in_thinking = kind == "thinking"
        if self.in_thinking:
            self.n_thinking += 1
        else:
            self.n_text += 1

    # --- tool calls -------------------------------------------------------------------------

    def _take_call(self, piece: Mapping[str, Any]) -> list[Event]:
        """One piece of a call; the calls before it are complete."""
        self._count("text")
        function = piece.get("function")
        function = function if isinstance(function, Mapping) else {}
        index = self._index_of(piece, function)
        events = self._complete_calls(before=index)
        draft = self._drafts.setdefault(index, _CallDraft())
        draft.id = draft.id or str(piece.get("id") or "")
        draft.name = draft.name or str(function.get("name") or "")
        events += self._begin_call(draft)
        arguments = function.get("arguments")
        if isinstance(arguments, Mapping):
            arguments = json.dumps(arguments)
            draft.arguments.clear()
        if isinstance(arguments, str):
            events += _add_arguments(draft, arguments)
        return events

    def _begin_call(self, draft: _CallDraft) -> list[Event]:
        """Say that a call begins, once, if it is one of a tool that was offered."""
        spec = self._tools.find(draft.name.strip())
        if draft.events is not None or spec is None:
            return []
        draft.events = CallEvents(self._next_index(), self._id_of(draft), spec.name)
        draft.json = JsonArguments(spec)
        return [draft.events.begun()]

    def _id_of(self, draft: _CallDraft) -> str:
        return draft.id or f"call_{secrets.token_hex(6)}_{self._n_calls}"

    def _index_of(self, piece: Mapping[str, Any], function: Mapping[str, Any]) -> int:
        """Which call a piece belongs to. Without a number, an id or a name begins the next."""
        index = piece.get("index")
        if isinstance(index, int):
            return index
        last = max(self._drafts, default=-1)
        begins = bool(piece.get("id") or function.get("name"))
        return last + 1 if begins or last < 0 else last

    def _complete_calls(self, *, before: int | None = None) -> list[Event]:
        """Calls whose pieces have all come."""
        done = sorted(i for i in self._drafts if before is None or i < before)
        return [event for i in done for event in self._call_events(self._drafts.pop(i))]

    def _call_events(self, draft: _CallDraft) -> list[Event]:
        entry = {"name": draft.name, "arguments": "".join(draft.arguments)}
        (parsed,) = calls_from_json(json.dumps(entry), self._tools)
        self._n_calls += 1
        if not parsed.name:
            return [unread(self._n_begun, self._id_of(draft), parsed)]
        if draft.events is not None:
            return draft.events.complete(parsed)
        call = CallEvents(self._next_index(), self._id_of(draft), parsed.name)
        return [call.begun(), *call.complete(parsed)]

    # --- the end ----------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be read."""
        return self.is_complete or self.is_cut or self.stopped_by is not None

    @property
    def has_ended(self) -> bool:
        """Whether the reply may end here: it is over, or the endpoint gave its reason to end."""
        return self.is_over or self._reason is not None

    @property
    def lacks_usage(self) -> bool:
        """Whether the endpoint let the reply end without a word on its tokens."""
        return self._usage is None and self.stopped_by is None

    def finish(self, *, before: Usage | None = None) -> list[Event]:
        """What was held back, and the end.

        Args:
            before: What a call before this one used for the same reply.
        """
        events: list[Event] = [*self._renumbered(self._parser.finish()), *self._complete_calls()]
        reason = self._finish_reason(events)
        usage = sum_usage(before, self.usage())
        stop_text = self.stopped_by or self._stop_text
        return [*events, Finished(reason, usage, self._settled_timings(usage), stop_text)]

    def _finish_reason(self, events: list[Event]) -> FinishReason:
        if self.stopped_by is not None:
            return "stop"
        reason = _REASONS.get(self._reason or "stop")
        if reason is None:
            events.append(Notice(f"the endpoint ended the reply with reason {self._reason!r}"))
            reason = "stop"
        return "tool_calls" if self._n_calls and reason == "stop" else reason

    def cancelled(self, *, before: Usage | None = None) -> Finished:
        """The end of a reply that was stopped from here; its tokens are counted by pieces."""
        usage = sum_usage(before, self.usage())
        return Finished("cancelled", usage, self._settled_timings(usage))

    def usage(self) -> Usage:
        """What the reply used, as the endpoint says or, where it does not, by its pieces."""
        return settle_usage(self._usage, self.n_thinking, self.n_text)

    def _settled_timings(self, usage: Usage) -> Timings:
        """The endpoint's own times, or those seen from here."""
        first = self._first_at or self._last_at
        seen = Timings(prefill_s=first - self._began_at, decode_s=self._last_at - first)
        return settle_timings(self._timings or {}, seen, usage.completion_tokens)


def _parser_for(options: GenerateOptions, raw: RawPrompt | None) -> ReplyParser | PlainParser:
    if raw is not None:
        thinks = (raw.text or "").rstrip("\n").endswith(THINK)
        return PlainParser(starts_in_thinking=thinks, stop=options.stop)
    # An endpoint may leave tags in the text: a parser was not configured for its model.
    return ReplyParser(starts_in_thinking=False, tools=options.tools, stop=options.stop)


def _texts(value: Any) -> list[str]:
    """The texts of a string, of a part, or of a list of parts."""
    parts = value if isinstance(value, list) else [value]
    texts = (part.get("text") if isinstance(part, Mapping) else part for part in parts)
    return [text for text in texts if isinstance(text, str) and text]


def _add_arguments(draft: _CallDraft, text: str) -> list[Event]:
    """Take more of the text of a call's arguments."""
    draft.arguments.append(text)
    told = draft.json.add(text) if draft.json is not None else ""
    return [draft.events.add(told)] if told and draft.events is not None else []
