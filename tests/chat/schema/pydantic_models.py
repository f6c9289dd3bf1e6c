"""Forty types that people give to pydantic."""

from __future__ import annotations

import datetime as dt
import enum
import ipaddress
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

from pydantic import (
    AnyUrl,
    AwareDatetime,
    Base64Bytes,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    HttpUrl,
    Json,
    PositiveInt,
    RootModel,
    SecretStr,
    StringConstraints,
    TypeAdapter,
    conlist,
)
from typing_extensions import TypedDict


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Point(BaseModel):
    x: int
    y: Annotated[float, Field(ge=-1, lt=1)] = 0.5


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    a: Optional[int] = None  # noqa: UP045
    b: Colour = Field(default=Colour.RED, description="a colour")


class Node(BaseModel):
    value: int
    next: Node | None = None


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, Field(le=9)]


class Dog(BaseModel):
    kind: Literal["dog"]


class Pet(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]


class Names(RootModel[list[str]]):
    pass


class Movie(TypedDict, total=False):
    title: str
    year: int


TYPES: dict[str, Any] = {
    "int": int, "float": float, "str": str, "bool": bool, "none": None, "bytes": bytes,
    "base64": Base64Bytes, "decimal": Decimal,
    "digits": Annotated[Decimal, Field(max_digits=5, decimal_places=2)],
    "date": dt.date, "time": dt.time, "datetime": dt.datetime, "aware": AwareDatetime,
    "timedelta": dt.timedelta, "uuid": uuid.UUID, "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address, "network": ipaddress.IPv4Network, "url": AnyUrl,
    "http": HttpUrl, "path": Path, "secret": SecretStr, "size": ByteSize, "json": Json[list[int]],
    "set": set[int], "frozenset": frozenset[Colour], "dict": dict[str, int],
    "int_keys": dict[int, str], "enum_keys": dict[Colour, int],
    "tuple": tuple[int, str], "tuple_rest": tuple[int, ...],
    "constrained": conlist(PositiveInt, min_length=1, max_length=3),
    "pattern": Annotated[str, StringConstraints(pattern=r"^\d{3}-\w+$", max_length=9)],
    "int_enum": Level, "point": Point, "open": Open, "closed": Closed, "node": Node, "pet": Pet,
    "names_and_movies": tuple[Names, Movie, int | str | None],
}  # fmt: skip


def schemas() -> dict[str, Any]:
    return {name: TypeAdapter(kind).json_schema() for name, kind in TYPES.items()}
