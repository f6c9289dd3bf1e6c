"""Frames of the engine's process: every one comes out as it went in, and nothing else does."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorun import errors
from nanorun.errors import EngineDied, EngineError, NanorunError, UsageError
from nanorun.model.chat import (
    Event,
    Finished,
    GenerateOptions,
    RawPrompt,
    TextDelta,
    TokenLogprobs,
    ToolCall,
)
from nanorun.model.engine_options import EngineOptions
from nanorun.runtime.process import wire
from nanorun.runtime.process.frames import (
    ANSWERS,
    CALLS,
    JOB_ANSWERS,
    REQUESTS,
    Answer,
    Call,
    Cancel,
    Failed,
    Generate,
    JobAnswer,
    Open,
    Progress,
    Request,
    Result,
    Said,
    SetBudget,
)
from nanorun.runtime.process.wire import Codec, MalformedFrame

floats = st.floats(allow_nan=False)
objects = st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=8), max_size=3)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
error_kinds = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, NanorunError)
]
lines = st.lists(st.text(max_size=8), max_size=2)

st.register_type_strategy(float, floats)
st.register_type_strategy(ToolCall, st.builds(ToolCall, arguments=objects))
st.register_type_strategy(
    GenerateOptions, st.builds(GenerateOptions, tools=st.lists(objects, max_size=2).map(tuple))
)
st.register_type_strategy(
    RawPrompt,
    st.builds(RawPrompt, text=st.text())
    | st.builds(RawPrompt, text=st.none(), tokens=st.lists(st.integers(), max_size=3).map(tuple)),
)
st.register_type_strategy(
    NanorunError,
    st.builds(
        lambda kind, *args: kind(args[0], facts=args[1], tries=args[2]),
        st.sampled_from(error_kinds), st.text(), lines, lines,
    ),
)  # fmt: skip
several = st.lists(json_values, max_size=3)
progress = st.builds(Progress, values=several.map(tuple))


class Kind(IntEnum):
    GOOD = 3


@dataclass(frozen=True)
class Opened:
    kind: Kind


def frames_of(kinds: Any) -> st.SearchStrategy[Any]:
    """Frames of all classes of a union, the same number of each."""
    return st.one_of([progress if kind is Progress else st.from_type(kind) for kind in kinds])


def carried(codec: Codec[Any], frame: Any) -> Any:
    """A frame as it comes out at the other end, beside another."""
    stream = io.BytesIO(codec.encode(frame) * 2)
    first, second, nothing = (wire.read(stream) for _ in range(3))
    assert first is not None and first == second
    assert nothing is None
    return codec.decode(first)


def assert_same(frame: Any, other: Any) -> None:
    """Errors are told apart by identity, so what they say is compared."""
    if not isinstance(frame, Failed):
        assert frame == other
        return
    mine, theirs = ((type(f.error), f.id, f.error.render()) for f in (frame, other))
    assert mine == theirs


@given(frames_of(get_args(Request)))
@settings(max_examples=300, deadline=None)
def test_every_request_arrives_as_it_was_sent(request: Any) -> None:
    assert carried(REQUESTS, request) == request


@given(frames_of(get_args(Answer)))
@settings(max_examples=300, deadline=None)
def test_every_answer_arrives_as_it_was_sent(answer: Any) -> None:
    assert_same(answer, carried(ANSWERS, answer))


@given(frames_of(get_args(Event)))
@settings(max_examples=300, deadline=None)
def test_every_event_arrives_as_it_was_said(event: Any) -> None:
    said = carried(ANSWERS, Said("r1", event))
    assert said == Said("r1", event)
    assert type(said.event) is type(event)


@given(st.builds(Call, arguments=objects), several)
def test_jobs_are_called_and_answered(call: Call, values: list[Any]) -> None:
    assert carried(CALLS, call) == call
    for answer in (Progress("job", tuple(values)), Result("job", values)):
        assert carried(JOB_ANSWERS, answer) == answer


def test_every_class_of_frames_has_a_name_of_its_own() -> None:
    for kinds in (Request, Answer, JobAnswer, Event):
        names = [kind.__name__ for kind in get_args(kinds)]
        assert len(set(names)) == len(names)


def test_bytes_of_a_token_need_not_be_a_character() -> None:
    event = TokenLogprobs(b"\xe2\x82", -0.5, ((b"\xff", -1.0),))
    assert carried(ANSWERS, Said("r1", event)).event == event


def test_text_that_is_no_unicode_becomes_question_marks() -> None:
    assert carried(ANSWERS, Said("r1", TextDelta("a\ud800"))).event == TextDelta("a?")


@given(st.binary())
def test_paths_arrive_whatever_their_bytes_are(name: bytes) -> None:
    path = name.decode("utf-8", "surrogateescape")
    options = EngineOptions(state_dir=f"/states/{path}")
    assert carried(REQUESTS, Open("open", path, options)) == Open("open", path, options)
    call = Call("module:job", {"path": path})
    assert carried(CALLS, call) == call


def test_error_that_is_not_nanoruns_own_becomes_an_engine_error() -> None:
    class OddError(UsageError):
        pass

    error = carried(ANSWERS, Failed("r1", OddError("odd", facts=["a"]))).error
    assert (type(error), error.message, error.facts) == (EngineError, "odd", ("a",))
    # A name of the module that is no error must not be called.
    body = json.dumps(["Failed", "r1", ["Signals", "x", [], []]]).encode()
    answer = ANSWERS.decode(body)
    assert isinstance(answer, Failed) and type(answer.error) is EngineError


@pytest.mark.parametrize(
    ("payload", "request_id", "says"),
    [
        (["Dance", "r7"], "r7", "begins with none of Open, Ping"),
        (["Cancel"], "", "Cancel has 1 fields"),
        (["Cancel", 5], "", "Cancel: '5' is no str"),
        (["SetBudget", "r7", "many"], "r7", "SetBudget: 'many' is no int"),
        (["SetBudget", "r7", True], "r7", "'True' is no int"),
        (["SetBudget", "r7", 1, 2], "r7", "SetBudget has 2 fields"),
        (["Generate", "r7", ["tuple", ["robot"]], []], "r7", "Message has 5 fields"),
        (["Generate", "r7", {}, []], "r7", "begins with none of tuple, RawPrompt"),
        (["Generate", "r7", ["RawPrompt", "a", [1], True, None], []], "r7", "a text or tokens"),
        ({"verb": "cancel", "id": "r7"}, "", "begins with none of"),
        ([], "", "begins with none of"),
        (None, "", "begins with none of"),
    ],
)  # fmt: skip
def test_request_that_nobody_knows_is_said_so(payload: Any, request_id: str, says: str) -> None:
    with pytest.raises(MalformedFrame, match=r"a message between the engine's process") as caught:
        REQUESTS.decode(json.dumps(payload).encode())
    assert says in caught.value.message
    assert caught.value.request_id == request_id


@given(st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_frame_or_refused(body: bytes) -> None:
    for codec in (REQUESTS, ANSWERS, CALLS, JOB_ANSWERS):
        try:
            codec.decode(body)
        except EngineError:
            continue


def test_nested_beyond_reason_is_refused() -> None:
    with pytest.raises(MalformedFrame):
        REQUESTS.decode(b"[" * 200_000)


def test_frame_that_is_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 20)
    assert REQUESTS.encode(Cancel("r1"))
    with pytest.raises(EngineError, match=r"a message of \d+ bytes .* is too large"):
        REQUESTS.encode(Generate("r1", (), GenerateOptions()))
    with pytest.raises(EngineError, match="is not plausible"):
        wire.frame_bytes((21).to_bytes(wire.HEADER_BYTES, "big"))


def test_frame_that_breaks_off_is_the_end() -> None:
    frame = ANSWERS.encode(Said("r1", Finished("stop")))
    for n_bytes in range(len(frame)):
        assert wire.read(io.BytesIO(frame[:n_bytes])) is None


@given(st.lists(st.text(max_size=30), max_size=8), st.data())
def test_frames_are_cut_out_of_pieces_of_any_size(texts: list[str], data: st.DataObject) -> None:
    frames = [ANSWERS.encode(Said("r1", TextDelta(text))) for text in texts]
    stream = b"".join(frames)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12).map(sorted))
    cutter, bodies = wire.FrameCutter(), []
    for start, end in pairwise([0, *cuts, len(stream)]):
        bodies += cutter.feed(stream[start:end])
    assert bodies == [frame[wire.HEADER_BYTES :] for frame in frames]


def test_frames_before_an_absurd_length_are_cut_out() -> None:
    good = REQUESTS.encode(Cancel("r1"))
    bodies = wire.FrameCutter().feed(good + b"\xff\xff\xff\xff")
    assert REQUESTS.decode(next(bodies)) == Cancel("r1")
    with pytest.raises(EngineError, match="is not plausible"):
        next(bodies)


def test_fields_may_be_enums() -> None:
    codec: Codec[Opened] = Codec(Opened)
    assert carried(codec, Opened(Kind.GOOD)) == Opened(Kind.GOOD)
    with pytest.raises(MalformedFrame, match="7 is not a valid Kind"):
        codec.decode(b"[7]")


def test_numbers_may_be_whole_where_fractions_are_allowed() -> None:
    request = Generate("r1", (), GenerateOptions(temperature=0))
    temperature = carried(REQUESTS, request).options.temperature
    assert (temperature, type(temperature)) == (0.0, float)
    assert carried(REQUESTS, SetBudget("r1", None)) == SetBudget("r1", None)
    assert isinstance(carried(ANSWERS, Failed("r1", EngineDied("gone"))).error, EngineDied)
