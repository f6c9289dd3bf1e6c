"""What `nanorun run` makes of a reply: text while it is written, or one JSON object."""

from __future__ import annotations

import sys
from typing import Any

from nanorun.cli.diagnostics import (
    StatusLine,
    dim,
    is_terminal,
    note,
    printable,
    talk,
    write_data,
    write_json,
)
from nanorun.model import chat
from nanorun.model.reply_so_far import ReplySoFar

# Shorter prompts are read before a line about it could be.
_N_TOKENS_WORTH_PROGRESS = 512


class TextOutput:
    """The answer to stdout while it is written, everything else to stderr."""

    def __init__(self) -> None:
        self._status = StatusLine()
        self._stream = ""
        self._tail = "\n"
        self._so_far = ReplySoFar()

    def loading(self) -> None:
        """Say that the model is being opened."""
        self._status.show("loading ...")

    def receive(self, event: chat.Event) -> None:
        """Show one event of the reply."""
        self._so_far.take(event)
        match event:
            case chat.PrefillProgress():
                self._show_progress(event)
            case chat.ThinkingDelta(text):
                self._switch_to("thinking")
                talk(dim(printable(text)))
                self._tail = text or self._tail
            case chat.TextDelta(text):
                self._switch_to("answer")
                write_data(text)
                self._tail = text or self._tail
            case chat.Notice(text):
                self._remark(text)
            case chat.ToolCallBegun(name=name):
                self._end_line()
                self._status.show(f"the model writes a call of {printable(name)} ...")
            case chat.ToolCallDelta(call=call):
                self._remark(f"the model asked for a tool: {call.name} {call.arguments}")

    def _remark(self, text: str) -> None:
        self._status.clear()
        self._end_line()
        note(printable(text))

    def _show_progress(self, event: chat.PrefillProgress) -> None:
        if event.n_total - event.n_cached >= _N_TOKENS_WORTH_PROGRESS:
            self._status.show(f"reading the prompt: {event.n_done} of {event.n_total} tokens")

    def _switch_to(self, stream: str) -> None:
        """Start the part of the reply that comes now on a line of its own."""
        self._status.clear()
        if self._stream == "thinking" and stream == "answer":
            talk("\n" if self._tail.endswith("\n") else "\n\n")
            self._tail = "\n"
        self._stream = stream

    def finish(self, info: chat.ModelInfo) -> None:
        """Say what the reply cost, to a person."""
        if is_terminal(sys.stderr) and self._so_far.finished is not None:
            self._end_line()
            talk(dim(f"\n{_summary(self._so_far.finished)}\n"))

    def close(self) -> None:
        """Leave the cursor on a line of its own, whatever happened."""
        self._status.clear()
        self._end_line()

    def _end_line(self) -> None:
        if self._tail.endswith("\n"):
            return
        self._tail = "\n"
        if self._stream == "answer":
            write_data("\n")
        else:
            talk("\n")


def _summary(finished: chat.Finished) -> str:
    """One line about the cost of a reply: `12 thinking + 30 answer tokens, 45.2 t/s`."""
    usage, timings = finished.usage, finished.timings
    n_answer = usage.completion_tokens - usage.thinking_tokens
    parts = [
        f"{usage.thinking_tokens} thinking + {n_answer} answer tokens",
        f"{timings.decode_tps:.1f} t/s",
        f"prompt {usage.prompt_tokens} tokens in {timings.prefill_s:.2f} s",
    ]
    if usage.drafted_tokens:
        parts.append(f"{usage.accepted_tokens} of {usage.drafted_tokens} guesses right")
    ends = {"length": "cut at the token limit", "cancelled": "stopped"}
    if finished.reason in ends:
        parts.append(ends[finished.reason])
    return ", ".join(parts)


class JsonOutput:
    """Collects the reply and prints it as one object."""

    def __init__(self) -> None:
        self._status = StatusLine()
        self._so_far = ReplySoFar()

    def loading(self) -> None:
        """Say that the model is being opened."""
        self._status.show("loading ...")

    def receive(self, event: chat.Event) -> None:
        """Keep one event of the reply."""
        self._so_far.take(event)
        if isinstance(event, chat.Notice):
            note(event.text)

    def finish(self, info: chat.ModelInfo) -> None:
        """Print the object."""
        self._status.clear()
        if self._so_far.finished is not None:
            write_json(self._to_dict(self._so_far.finished, info))

    def _to_dict(self, finished: chat.Finished, info: chat.ModelInfo) -> dict[str, Any]:
        usage, timings = finished.usage, finished.timings
        return {
            "thinking": self._so_far.thinking,
            "answer": self._so_far.answer,
            "tool_calls": [
                {"name": call.name, "arguments": call.arguments} for call in self._so_far.tool_calls
            ],
            "finish_reason": finished.reason,
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": usage.cached_tokens,
                "thinking_tokens": usage.thinking_tokens,
                "completion_tokens": usage.completion_tokens,
                "drafted_tokens": usage.drafted_tokens,
                "accepted_tokens": usage.accepted_tokens,
            },
            "timings": {
                "load_s": info.load_s,
                "prefill_s": timings.prefill_s,
                "decode_s": timings.decode_s,
                "prefill_tps": timings.prefill_tps,
                "decode_tps": timings.decode_tps,
            },
        }

    def close(self) -> None:
        """Take away what was shown meanwhile."""
        self._status.clear()
