"""What the events of tool calls promise to whoever passes them on."""

from __future__ import annotations

import json
from collections.abc import Sequence

from nanorun.model.chat import (
    Event,
    ToolArguments,
    ToolCallBegun,
    ToolCallDelta,
    arguments_text,
)


def assert_told(events: Sequence[Event]) -> None:
    """Every call begins, comes in pieces and ends; the pieces make its arguments, or no JSON."""
    begun: list[ToolCallBegun] = []
    pieces: dict[int, list[str]] = {}
    complete: list[int] = []
    for event in events:
        match event:
            case ToolCallBegun(index=index):
                assert index == len(begun) == len(complete)
                begun.append(event)
                pieces[index] = []
            case ToolArguments(index, text):
                assert text
                pieces[index].append(text)
            case ToolCallDelta(index=index) if not event.call.name:
                assert event.problem
                assert index == len(begun)
            case ToolCallDelta(index=index):
                assert (begun[index].id, begun[index].name) == (event.call.id, event.call.name)
                _assert_agrees("".join(pieces[index]), event)
                complete.append(index)
    assert len(complete) == len(begun)


def _assert_agrees(said: str, event: ToolCallDelta) -> None:
    whole = arguments_text(event.call)
    if said == whole:
        return
    assert event.problem, (said, whole)
    assert whole.startswith(said), (said, whole)
    assert not _is_json(said), said


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
