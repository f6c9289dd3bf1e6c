"""Tools that a request offers, and which of them must be called, in OpenAI's words and others'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from nanorun.server.errors import ApiError, invalid

_WORDS = {"none": "none", "auto": "auto", "required": "required", "any": "required"}


class FunctionIn(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(pattern=r"^[^\s<>\"'{}]+$")]
    """Nemotron's form of a call has no escapes, so nothing in a name may look like markup."""
    description: str | None = None
    parameters: dict[str, Any] | None = None

    @field_validator("parameters")
    @classmethod
    def _check_shape(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        schema = value or {}
        if not isinstance(schema.get("properties"), dict | None):
            raise ValueError("its properties must be an object")
        required = schema.get("required") or []
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise ValueError("its required must be an array of names")
        return value


class ToolIn(BaseModel):
    """A tool that the model may use."""

    type: Literal["function"] = "function"
    function: FunctionIn

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, value: Any) -> Any:
        """Take the flat form of /v1/responses, too."""
        if isinstance(value, dict) and "function" not in value and "name" in value:
            flat = {key: item for key, item in value.items() if key != "type"}
            return {"type": value.get("type", "function"), "function": flat}
        return value

    def to_tool(self) -> dict[str, Any]:
        """The tool without its nulls: templates take an absent description, not a null one."""
        return {"type": self.type, "function": self.function.model_dump(exclude_none=True)}


def function_tool(
    name: str, description: Any, parameters: Any, *, strict: Any = None
) -> dict[str, Any]:
    """A tool in OpenAI's form, made of another API's.

    Raises:
        ApiError: If it cannot be offered.
    """
    fields = {"name": name, "description": description, "parameters": parameters, "strict": strict}
    try:
        function = FunctionIn.model_validate(fields)
    except ValueError as error:
        raise invalid("tools", f"tool {name!r} cannot be offered: {error}") from error
    return {"type": "function", "function": function.model_dump(exclude_none=True)}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which of the tools may or must be called."""

    mode: Literal["none", "auto", "required"] = "auto"
    names: tuple[str, ...] | None = None
    """Only these; None for all."""

    @classmethod
    def read(cls, value: Any) -> ToolChoice:
        """What OpenAI's two APIs, Anthropic's and llama.cpp's clients say.

        Raises:
            ApiError: If it is none of that.
        """
        if value is None:
            return cls()
        if isinstance(value, str) and value in _WORDS:
            return cls(_WORDS[value])  # type: ignore[arg-type]  # one of the three
        if isinstance(value, Mapping):
            return cls._from_object(value)
        raise _refused(f"{value!r} is none of {', '.join(_WORDS)}, nor names a tool")

    @classmethod
    def _from_object(cls, value: Mapping[str, Any]) -> ToolChoice:
        kind = value.get("type")
        if isinstance(kind, str) and kind in _WORDS:
            return cls(_WORDS[kind])  # type: ignore[arg-type]
        if kind == "allowed_tools":
            allowed = value.get("allowed_tools", value)
            tools = allowed.get("tools") if isinstance(allowed, Mapping) else None
            if not isinstance(tools, list):
                raise _refused("allowed_tools must have a list of tools")
            return cls(
                cls.read(allowed.get("mode", "auto")).mode, tuple(_name_of(tool) for tool in tools)
            )
        if kind in ("function", "tool", "custom", None):
            return cls("required", (_name_of(value),))
        raise _refused(f"type {kind!r} is not served; function, auto, any and allowed_tools are")

    def offered(self, tools: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
        """Those of the tools, in OpenAI's form, that may be called.

        Raises:
            ApiError: If one that is named is not among them.
        """
        if self.mode == "none":
            return ()
        if self.names is None:
            return tuple(tools)
        by_name = {tool["function"]["name"]: tool for tool in tools}
        missing = [name for name in self.names if name not in by_name]
        if missing:
            raise _refused(f"it names {missing[0]!r}, which is none of the tools")
        return tuple(by_name[name] for name in self.names)

    def must_call(self, tools: Sequence[dict[str, Any]]) -> Literal["auto", "required"]:
        """Whether one of the tools, those offered, must be called."""
        return "required" if self.mode == "required" and tools else "auto"


def _name_of(value: Any) -> str:
    if isinstance(value, Mapping):
        function = value.get("function", value)
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and name:
            return name
    raise _refused("it must name a function")


def _refused(why: str) -> ApiError:
    return invalid("tool_choice", why)
