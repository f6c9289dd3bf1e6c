"""How a child process and its parent talk: dataclasses as length-prefixed JSON.

A frame is a 4-byte big-endian length and that many bytes of UTF-8 JSON. A dataclass is the array of
its fields, in their order; where one of several classes may stand, its name comes first. Both ends
are the same installation, so no field has to be named. `frames.py` has the frames themselves.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from operator import attrgetter
from types import NoneType, UnionType
from typing import (
    Any,
    BinaryIO,
    Generic,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from nanorun import errors
from nanorun.errors import EngineError, NanorunError

HEADER_BYTES = 4
MAX_FRAME_BYTES = 256 * 2**20

Convert = Callable[[Any], Any]
T = TypeVar("T")

_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_from_json = json.JSONDecoder().decode


class MalformedFrame(EngineError):
    """A frame that is no JSON, or does not hold what its class holds.

    Args:
        message: What is wrong with it.
        request_id: The request it is about, as far as that can be told; "" if not.
    """

    def __init__(self, message: str, request_id: str = "") -> None:
        super().__init__(
            f"a message between the engine's process and its client is wrong: {message}"
        )
        self.request_id = request_id


# -- bytes of file names --------------------------------------------------------------------------


def _keep_names(error: UnicodeError) -> tuple[bytes, int]:
    """What stands for characters that UTF-8 has not: halves of surrogate pairs.

    Bytes of file names (PEP 383) stay what they are, since the other side has to find the file;
    what else there is comes from broken texts.
    """
    assert isinstance(error, UnicodeEncodeError)
    broken = error.object[error.start : error.end]
    kept = [
        c.encode("utf-8", "surrogatepass") if "\udc80" <= c <= "\udcff" else b"?" for c in broken
    ]
    return b"".join(kept), error.end


_KEEPS_NAMES = "nanorun.keeps_names"
codecs.register_error(_KEEPS_NAMES, _keep_names)


# -- bytes --------------------------------------------------------------------------------------


class Codec(Generic[T]):
    """Writes and reads the frames of one direction.

    Args:
        kinds: The union of their classes.
    """

    def __init__(self, kinds: Any) -> None:
        self._encode = _encoder(kinds)
        self._decode = _decoder(kinds)

    def encode(self, frame: T) -> bytes:
        """A frame, its header included.

        Raises:
            EngineError: If it is larger than the other side takes.
        """
        body = _to_json(self._encode(frame)).encode("utf-8", _KEEPS_NAMES)
        if len(body) > MAX_FRAME_BYTES:
            raise EngineError(
                f"a message of {len(body)} bytes to or from the engine's process is too large",
                facts=[f"at most {MAX_FRAME_BYTES} bytes are taken"],
            )
        return len(body).to_bytes(HEADER_BYTES, "big") + body

    def decode(self, body: bytes) -> T:
        """The frame of the bytes after a header.

        Raises:
            MalformedFrame: If they are none.
        """
        payload = None
        try:
            # `json.loads` of bytes would first guess their encoding.
            payload = _from_json(body.decode("utf-8", "surrogatepass"))
            frame: T = self._decode(payload)
        except (ValueError, RecursionError) as error:
            raise MalformedFrame(str(error), _id_in(payload)) from error
        return frame


def _id_in(payload: Any) -> str:
    """The request that a frame is about, where its first field looks like an id."""
    has_id = isinstance(payload, list) and len(payload) > 1 and isinstance(payload[1], str)
    return payload[1] if has_id else ""


def frame_bytes(header: bytes | bytearray) -> int:
    """Bytes that follow a header.

    Raises:
        EngineError: If the length is absurd, so the stream is not ours.
    """
    n = int.from_bytes(header, "big")
    if n > MAX_FRAME_BYTES:
        raise EngineError(f"a frame of {n} bytes from the engine's process is not plausible")
    return n


def read(stream: BinaryIO) -> bytes | None:
    """The next frame's body; None at the end of the stream, also of one that ends in a frame."""
    header = stream.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    n_bytes = frame_bytes(header)
    body = stream.read(n_bytes)
    return body if len(body) == n_bytes else None


class FrameCutter:
    """Cuts what arrives in pieces of any size into frames."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies of the frames that are complete with this piece.

        Raises:
            EngineError: If a length is absurd, after the frames before it.
        """
        self._rest += data
        start = 0
        try:
            while (header_end := start + HEADER_BYTES) <= len(self._rest):
                end = header_end + frame_bytes(self._rest[start:header_end])
                if end > len(self._rest):
                    break
                start, body = end, bytes(self._rest[header_end:end])
                yield body
        finally:
            del self._rest[:start]


# -- values, by the types of fields ---------------------------------------------------------------


@cache
def _encoder(hint: Any) -> Convert:
    """What turns a value of this type into JSON."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is bytes:  # a token's bytes may be part of a character; as Latin-1 every byte is one
        return lambda value: value.decode("latin-1")
    if isinstance(hint, type) and issubclass(hint, Enum):
        return attrgetter("value")
    if isinstance(hint, type) and issubclass(hint, NanorunError):
        return lambda e: [type(e).__name__, e.message, e.facts, e.tries]
    if is_dataclass(hint):
        return _fields_encoder(hint)
    if origin is tuple and not all(map(_is_plain, args)):
        if args[-1] is ...:
            item = _encoder(args[0])
            return lambda values: [item(value) for value in values]
        items = [_encoder(arg) for arg in args]
        return lambda values: [item(v) for item, v in zip(items, values, strict=True)]
    if origin in (Union, UnionType) and not all(map(_is_plain, args)):
        return _union_encoder([arg for arg in args if arg is not NoneType])
    return lambda value: value


def _is_plain(hint: Any) -> bool:
    """Whether JSON holds values of this type as they are."""
    if hint is ... or hint in (str, int, float, bool, NoneType, Any):
        return True
    if get_origin(hint) in (Literal, dict):
        return True
    args = get_args(hint)
    return bool(args) and all(map(_is_plain, args))


def _fields_encoder(cls: Any) -> Convert:
    hints = get_type_hints(cls)
    names = [field.name for field in fields(cls)]
    if all(_is_plain(hints[name]) for name in names):
        if len(names) == 1:  # one a token
            get = attrgetter(names[0])
            return lambda value: [get(value)]
        return attrgetter(*names)
    parts = [(name, _encoder(hints[name])) for name in names]
    return lambda value: [encode_part(getattr(value, name)) for name, encode_part in parts]


def _union_encoder(kinds: list[Any]) -> Convert:
    if len(kinds) == 1:
        one = _encoder(kinds[0])
        return lambda value: None if value is None else one(value)
    encoders = {_class_of(kind): _encoder(kind) for kind in kinds}

    def encode_tagged(value: Any) -> Any:
        kind = type(value)
        return [kind.__name__, *encoders[kind](value)]

    return encode_tagged


def _class_of(hint: Any) -> type:
    """The class of the values of a type: `tuple` of `tuple[Message, ...]`."""
    kind: type = get_origin(hint) or hint
    return kind


@cache
def _decoder(hint: Any) -> Convert:
    """What turns JSON into a value of this type, or raises ValueError."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value: value
    if hint is bytes:
        text = _decoder(str)
        return lambda value: text(value).encode("latin-1")
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint  # a value that it does not have is a ValueError
    if isinstance(hint, type) and issubclass(hint, NanorunError):
        return _decode_error
    if is_dataclass(hint):
        return _fields_decoder(hint)
    if origin is Literal:
        return _checked(lambda value: value in args, str(hint))
    if origin in (dict, Mapping):
        return _decoder(dict)
    if origin is tuple:
        return _tuple_decoder(args)
    if origin in (Union, UnionType):
        return _union_decoder(args)
    if hint is float:
        is_number = _checked(lambda value: type(value) in (float, int), "float")
        return lambda value: float(is_number(value))
    return _scalar_decoder(hint)


def _scalar_decoder(kind: type) -> Convert:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(f"{str(value)[:80]!r} is no {kind.__name__}")
        return value

    return check


def _checked(holds: Callable[[Any], bool], name: str) -> Convert:
    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(f"{str(value)[:80]!r} is no {name}")
        return value

    return check


def _fields_decoder(cls: Any) -> Convert:
    hints = get_type_hints(cls)
    parts = [_decoder(hints[field.name]) for field in fields(cls)]

    def decode_fields(values: Any) -> Any:
        if type(values) is not list or len(values) != len(parts):
            raise ValueError(f"{cls.__name__} has {len(parts)} fields, not {str(values)[:80]}")
        try:
            return cls(*[part(value) for part, value in zip(parts, values, strict=True)])
        except ValueError as error:
            raise ValueError(f"{cls.__name__}: {error}") from error

    return decode_fields


def _tuple_decoder(args: tuple[Any, ...]) -> Convert:
    as_list = _decoder(list)
    if args[-1] is ...:
        item = _decoder(args[0])
        return lambda values: tuple([item(value) for value in as_list(values)])
    items = [_decoder(arg) for arg in args]
    return lambda values: tuple(
        item(value) for item, value in zip(items, as_list(values), strict=True)
    )


def _union_decoder(args: tuple[Any, ...]) -> Convert:
    kinds = [arg for arg in args if arg is not NoneType]
    if len(kinds) == 1:
        one = _decoder(kinds[0])
        return lambda value: None if value is None else one(value)
    if all(map(_is_plain, args)):
        return _checked(lambda value: type(value) in args, " or ".join(a.__name__ for a in args))
    decoders = {_class_of(kind).__name__: _decoder(kind) for kind in kinds}

    def decode_tagged(values: Any) -> Any:
        name = values[0] if type(values) is list and values else None
        if type(name) is not str or name not in decoders:
            raise ValueError(f"{str(values)[:80]} begins with none of {', '.join(decoders)}")
        return decoders[name](values[1:])

    return decode_tagged


def _decode_error(values: Any) -> NanorunError:
    """An expected error; a class that is not nanorun's own becomes an `EngineError`."""
    name, message, facts, tries = _decoder(tuple[str, str, tuple[str, ...], tuple[str, ...]])(
        values
    )
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, NanorunError)):
        kind = EngineError
    return kind(message, facts=facts, tries=tries)
