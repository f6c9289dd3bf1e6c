"""The tools that a request to /v1/responses offers, and what their calls are there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanorun.server.errors import ApiError
from nanorun.server.openai.responses.items import CUSTOM_ARGUMENT, namespaced
from nanorun.server.tools import function_tool


@dataclass(slots=True)
class OfferedTools:
    """What the model may call, by the names it knows them by."""

    functions: list[dict[str, Any]] = field(default_factory=list)
    """In the form of chat completions."""
    custom: set[str] = field(default_factory=set)
    """Those that take free text."""
    namespaces: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Namespace and name there of those that are in one."""
    listed: list[str] = field(default_factory=list)
    """Tools that only their vendor can run: never called."""

    def notices(self) -> Iterator[str]:
        """What the person should know of them."""
        for name in self.listed:
            yield f"the tool {name} is the vendor's own and is never called"

    def identity(self, name: str) -> dict[str, str]:
        """The name of a called tool as the client knows it."""
        if name not in self.namespaces:
            return {"name": name}
        namespace, inner = self.namespaces[name]
        return {"name": inner, "namespace": namespace}


def read_tools(tools: Sequence[Mapping[str, Any]]) -> OfferedTools:
    """The tools of a request.

    Raises:
        ApiError: If a function's name or parameters cannot be offered to the model.
    """
    offered = OfferedTools()
    for tool in tools:
        _offer(offered, tool, None)
    return offered


def _offer(offered: OfferedTools, tool: Mapping[str, Any], namespace: str | None) -> None:
    kind = str(tool.get("type") or "function")
    if kind == "namespace" and namespace is None:
        _offer_namespace(offered, tool)
    elif kind in ("function", "custom"):
        inner = tool.get("function", tool)  # as chat completions nest it
        if not isinstance(inner, Mapping):
            raise ApiError(400, "tools: a function must be an object", param="tools")
        name = namespaced(namespace, inner.get("name") or "")
        if namespace:
            offered.namespaces[name] = (namespace, str(inner.get("name")))
        parameters = _TEXT_ONLY if kind == "custom" else inner.get("parameters")
        if kind == "custom":
            offered.custom.add(name)
        offered.functions.append(
            function_tool(name, inner.get("description"), parameters, strict=inner.get("strict"))
        )
    else:
        offered.listed.append(str(tool.get("name") or kind))


def _offer_namespace(offered: OfferedTools, tool: Mapping[str, Any]) -> None:
    nested = tool.get("tools")
    for inner in nested if isinstance(nested, list) else []:
        if isinstance(inner, Mapping):
            _offer(offered, inner, str(tool.get("name") or "tools"))


_TEXT_ONLY = {
    "type": "object",
    "properties": {CUSTOM_ARGUMENT: {"type": "string"}},
    "required": [CUSTOM_ARGUMENT],
    "additionalProperties": False,
}
