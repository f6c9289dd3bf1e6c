"""What /v1/messages takes, and what it means to the engine."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, StrictBool

from nanorun.model.chat import GenerateOptions, Grammar
from nanorun.model.think import Think
from nanorun.server.anthropic.blocks import read_conversation
from nanorun.server.asked import Asked
from nanorun.server.depth import read_depth
from nanorun.server.errors import invalid
from nanorun.server.history import to_continue
from nanorun.server.limits import LimitedBody
from nanorun.server.openai.formats import ResponseFormat
from nanorun.server.tools import ToolChoice, function_tool

_LABELS = frozenset({
    "anthropic_beta", "betas", "cache_control", "container", "context_management", "inference_geo",
    "metadata", "service_tier", "speed", "user_profile_id",
})  # fmt: skip
"""Fields that say nothing about the answer."""


class MessagesRequest(LimitedBody):
    """The body of a message, and of a count of its tokens."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    system: Any = None
    max_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None
    """Anthropic demands it; without it the reply may be as long as the context holds."""
    stream: StrictBool | None = None
    stop_sequences: list[Annotated[str, Field(min_length=1)]] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Any = None
    output_config: dict[str, Any] | None = None
    output_format: Any = None
    mcp_servers: list[Any] | None = None

    def to_asked(self, *, default_think: Think) -> Asked:
        """What it asks of the engine.

        Raises:
            ApiError: Naming the field that cannot be meant.
        """
        if self.mcp_servers:
            raise invalid("mcp_servers", "this server calls no others; offer their tools as tools")
        messages, notices = read_conversation(self.system, self.messages)
        messages, is_begun = to_continue(messages)
        offered, listed = self._tools()
        choice = ToolChoice.read(self.tool_choice)
        tools = choice.offered(offered)
        unknown = sorted((self.model_extra or {}).keys() - _LABELS)
        options = GenerateOptions(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=0 if self.top_k == -1 else self.top_k,
            think=self._think(default_think),
            max_tokens=self.max_tokens,
            stop=tuple(self.stop_sequences or ()),
            tools=tools,
            tool_choice=choice.must_call(tools),
            parallel_tool_calls=(self.tool_choice or {}).get("disable_parallel_tool_use")
            is not True,
            grammar=self._grammar(),
            echo_thinking=self._echoes_thinking,
            continue_final=is_begun,
        )
        told = (
            *notices,
            *(f"the tool {name} is the vendor's own and is never called" for name in listed),
            *(f"the field {name} is not known and was left out" for name in unknown),
        )
        return Asked(messages, options, notices=told)

    @property
    def shows_thinking(self) -> bool:
        """Whether the reply is to carry its thinking."""
        return not (isinstance(self.thinking, dict) and self.thinking.get("display") == "omitted")

    def _tools(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The tools in OpenAI's form, and the names of those that only the vendor can run."""
        offered, listed = [], []
        for tool in self.tools or ():
            name = str(tool.get("name") or tool.get("type"))
            if tool.get("type") not in (None, "custom"):
                listed.append(name)
                continue
            offered.append(
                function_tool(
                    name, tool.get("description"), tool.get("input_schema"),
                    strict=tool.get("strict"),
                )
            )  # fmt: skip
        return offered, listed

    def _think(self, default: Think) -> Think:
        """The depth: `thinking` says it most exactly, then the effort.

        Anthropic's models do not think unless asked; this one does as the server is set up.
        """
        effort = read_depth((self.output_config or {}).get("effort"), "output_config.effort")
        return read_depth(self.thinking, "thinking") or effort or default

    def _grammar(self) -> Grammar | None:
        given = (self.output_config or {}).get("format") or self.output_format
        if given is None:
            return None
        try:
            schema = ResponseFormat.model_validate(given).schema_text("output_config.format")
        except ValueError as error:
            raise invalid("output_config.format", str(error)) from error
        return None if schema is None else Grammar("json_schema", schema)

    @property
    def _echoes_thinking(self) -> bool | None:
        """Whether this client gives thinking back; None before it had a chance to."""
        replies = [m.get("content") for m in self.messages if m.get("role") == "assistant"]
        blocks = [block for content in replies if isinstance(content, list) for block in content]
        thinks = any(isinstance(b, dict) and b.get("type") == "thinking" for b in blocks)
        return thinks if replies else None
