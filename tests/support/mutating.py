"""Documents, texts and bytes, changed at random: what every fuzz test is made of."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**48, 2**63, 2**64, 10**30, -(2**63),
    0.5, 1e308, float("inf"), float("nan"), "", "x", "é\u0000", "\ud800", "../x.safetensors",
    "/etc/passwd", "a" * 5000, [], [[]], [0, 1], [1, 0], [-1, 5], [2**40, 2**41], ["a"], {},
    {"a": 1}, {"dtype": "F32", "shape": [2**20] * 8, "data_offsets": [0, 2**47]}, "F32", "U8",
    "F8_E4M3", "BF16", "I64", [4] * 100,
]  # fmt: skip
"""Values that somebody did not expect."""
_HOSTILE_JSON = (
    b"9" * 5000, b"1e999", b"-0", b"NaN", b"Infinity", b'"\\ud800"', b'"\\u0000"', b"\xff\xfe",
    b"\xed\xa0\x80", b'{"a": 1, "a": 2}', b"[" * 400, b'{"a":' * 400, b"\xef\xbb\xbf", b",", b"//",
)  # fmt: skip
"""Spellings that a JSON document may hold and `json.dumps` does not write."""


def paths_in(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*prefix, key)
        if isinstance(inner, (dict, list)):
            yield from paths_in(inner, (*prefix, key))


def mutated(value: Any, rng: random.Random) -> Any:
    """A document with a few of its values replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        ways = list(paths_in(value))
        if not ways:
            return rng.choice(JUNK)
        *way, key = rng.choice(ways)
        holder = value
        for step in way:
            holder = holder[step]
        action = rng.randrange(5)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[rng.choice([*map(str, ways[0]), "x", "__metadata__"])] = holder.pop(key)
        elif action == 2 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += rng.choice([-1, 1, 8, -8, 2**20, -(2**20)])
        else:
            holder[key] = copy.deepcopy(rng.choice(JUNK))
    return value


def damaged(raw: bytes, rng: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """Bytes with a few of them changed, cut off, doubled, or with a part of others between them."""
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(raw) + 1)
        end = min(len(raw), at + rng.choice([0, 1, 4, 64]))
        match rng.randrange(5):
            case 0:
                raw = raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
            case 1:
                raw = raw[:at]
            case 2:
                raw = raw[:at] + raw[end:]
            case 3:
                raw = raw[:end] + raw[at:]
            case _:
                part = rng.choice(others) if others else b"\x00"
                start = rng.randrange(len(part) + 1)
                raw = raw[:at] + part[start : start + rng.choice([1, 8, 200])] + raw[at:]
    return raw


def json_bytes(value: Any, rng: random.Random) -> bytes:
    """A document as JSON, most often; sometimes in spellings that nobody writes."""
    raw = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.8:
        return raw
    places = [i for i, byte in enumerate(raw) if byte in b":,["]
    at = rng.choice(places) + 1 if places else 0
    return raw[:at] + rng.choice(_HOSTILE_JSON) + raw[at:]
