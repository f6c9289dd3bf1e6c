"""Chat templates: messages in, prompt out, and nothing a message says becomes a control token.

The template's own control tokens are what must be told from the same texts typed by somebody.
They are marked where they are born: every control token spelled in a constant of the template is
replaced, before compilation, by a lone surrogate, a character no decoded text can hold. Whatever
the template then does (search, split, trim, compare), its marks meet only its marks and typed
text meets only typed text. The rendered marks are the control tokens; all else is text.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jinja2

from nanorun.chat.marks import SURROGATE, Marks, well_formed
from nanorun.chat.markup import END_THINK, THINK
from nanorun.chat.prompt import BegunReply, BoundaryKind, RenderedPrompt
from nanorun.chat.sandbox import BoundedEnvironment, TemplateRefusal, allowance_for
from nanorun.errors import ModelError, NanorunError, UsageError
from nanorun.model.chat import Message

_TURN_MARK = "\udfff"
"""Put in front of a user's content to find where the turn came to lie."""
_MEANINGFUL_NULLS = ("default", "const")
_MAX_DEPTH = 100
"""Of tools and arguments; whoever walks them later recurses too."""


class ChatTemplate:
    """A model's chat template, compiled once.

    Args:
        source: The Jinja source.
        name: What to call it in errors: the model, the file.
        special_tokens: Texts of the vocabulary's control tokens (and of its unknown token): all
            that the engine takes for a token of its own when it parses special tokens. A control
            token that the template builds out of parts is not recognised; it becomes text.
        named_tokens: Tokens the template may use by name, such as `{"bos_token": "<s>"}`.

    Raises:
        ModelError: If the source is not a template.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str = "",
        special_tokens: Sequence[str] = (),
        named_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.source = source
        self._marks = Marks(special_tokens, [source, *(named_tokens or {}).values()])
        self._named = {k: self._marks.mark(v) for k, v in (named_tokens or {}).items()}
        environment = BoundedEnvironment()
        try:
            tree = environment.parse(well_formed(source))
            self._marks.mark_constants(tree)
            self._template = environment.compile_bounded(tree)
        except jinja2.TemplateSyntaxError as error:
            raise self._broken(f"{error.message} (line {error.lineno})") from error
        except Exception as error:  # whatever Python's own compiler says, out of memory included
            raise self._broken(str(error)) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        enable_thinking: bool,
        truncate_history_thinking: bool = True,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt:
        """Render a conversation.

        Args:
            messages: The conversation.
            tools: Tools the model may call, in OpenAI's form.
            enable_thinking: Whether the reply starts with thinking.
            truncate_history_thinking: Whether thinking before the last question is left out.
            add_generation_prompt: Whether to end with the beginning of the reply.
            extra: Further variables of the template, such as `low_effort`.

        Raises:
            UsageError: If the template refuses these messages, or they are not JSON at heart.
            ModelError: If the template fails, or takes more work than templates are allowed.
        """
        dicts = [message_dict(message) for message in messages]
        scope = self._scope(tools, enable_thinking, truncate_history_thinking, extra)
        marked = self._run(dicts, scope, add_generation_prompt)
        places = self._places(dicts, scope, marked)
        return self._marks.prompt(marked, places)

    def render_begun(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        enable_thinking: bool,
        truncate_history_thinking: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> BegunReply:
        """Render a conversation up to where the text of its last message ends.

        That is the end of the content, or of the thinking if there is nothing else. White space at
        its end is kept if the template keeps it.

        Args:
            messages: The conversation; its last message is the assistant's.
            tools: As in `render`, like the others.
            enable_thinking: Whether replies start with thinking.
            truncate_history_thinking: Whether thinking before the last question is left out.
            extra: Further variables of the template.

        Raises:
            UsageError: If the template changes the text, so that its end is not found, or refuses
                these messages.
            ModelError: If the template fails, or takes more work than templates are allowed.
        """
        opened = _opened(messages[-1])
        in_thinking = bool(opened.thinking) and not opened.content
        *before, last = [message_dict(message) for message in (*messages[:-1], opened)]
        scope = self._scope(tools, enable_thinking, truncate_history_thinking, extra)
        begun = last["thinking" if in_thinking else "content"]
        whole = self._run([*before, last], scope, False)
        marked = self._up_to_end([*before, last], scope, whole, in_thinking)
        blanks = begun[len(begun.rstrip()) :]
        lost = "" if whole.startswith(marked + blanks) else blanks
        marked += "" if lost else blanks
        prompt = self._marks.prompt(marked, self._places(before, scope, marked))
        return BegunReply(prompt, begun.removesuffix(lost), in_thinking, lost)

    def _up_to_end(
        self, messages: list[dict[str, Any]], scope: dict[str, Any], whole: str, in_thinking: bool
    ) -> str:
        """What is rendered up to the last visible character of the last message's text.

        A mark is put there. The place is trusted only if the mark changes nothing else.

        Args:
            messages: The conversation.
            scope: The template's variables.
            whole: What is rendered without the mark.
            in_thinking: Whether the text is the message's thinking, and not its content.
        """
        *before, last = messages
        names = ("thinking", "reasoning_content") if in_thinking else ("content",)
        text = last[names[0]]
        n_seen = len(text.rstrip())
        noted = dict.fromkeys(names, text[:n_seen] + _TURN_MARK + text[n_seen:])
        head, *tails = self._run([*before, {**last, **noted}], scope, False).split(_TURN_MARK)
        heads = [head] if n_seen else [head, head.rstrip()]  # of an empty answer nothing is kept
        is_same = len(tails) == 1 and whole in [start + tails[0] for start in heads]
        if not is_same or not head.endswith(text.strip()):
            what = "thinking" if in_thinking else "content"
            raise UsageError(
                f"the chat template of {self._called} changes the {what} of the last message, so "
                "it cannot be continued"
            )
        return head

    def _scope(
        self,
        tools: Sequence[Mapping[str, Any]],
        enable_thinking: bool,
        truncate_history_thinking: bool,
        extra: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """The template's variables."""
        return {
            **_plain(extra or {}, "template variables"),
            **self._named,
            "tools": [_without_nulls(_plain(tool, "tools")) for tool in tools] or None,
            "enable_thinking": enable_thinking,
            "truncate_history_thinking": truncate_history_thinking,
        }

    def _run(
        self, messages: list[dict[str, Any]], scope: dict[str, Any], add_generation_prompt: bool
    ) -> str:
        """Render to text with marks for control tokens."""
        n_chars = _n_chars(messages) + _n_chars(scope)
        pieces = []
        try:
            with allowance_for(n_chars) as allowance:
                for piece in self._template.generate(
                    scope, messages=messages, add_generation_prompt=add_generation_prompt
                ):
                    pieces.append(allowance.print(piece))
        except TemplateRefusal as error:
            raise UsageError(
                f"the chat template of {self._called} refuses these messages: "
                f"{self._marks.unmark(str(error))}"
            ) from error
        except RecursionError as error:
            raise self._broken("it calls itself too deeply") from error
        except MemoryError as error:
            raise self._broken("it needs more memory than there is") from error
        except Exception as error:  # filters raise whatever their code raises, asserts included
            raise self._broken(str(error)) from error
        return "".join(pieces)

    def _places(
        self, messages: list[dict[str, Any]], scope: dict[str, Any], marked: str
    ) -> list[tuple[int, BoundaryKind, int]]:
        """Offsets in `marked` of the boundaries, found by rendering once more with turn marks.

        The second rendering ends before the reply, and is trusted only if without its turn marks
        it is what `marked` begins with. A template that trims or inspects what users say can
        spoil that; then only the beginning of the reply is looked for.
        """
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        noted = [
            {**m, "content": _TURN_MARK + m["content"]} if m["role"] == "user" else m
            for m in messages
        ]
        for attempt, turns in ((noted, users), (messages, [])):
            try:
                body = self._run(attempt, scope, False)
            except NanorunError:
                continue
            starts = _offsets(body, _TURN_MARK)
            body = body.replace(_TURN_MARK, "")
            if marked.startswith(body) and len(starts) == len(turns):
                return self._edges(marked, len(body), starts, turns, messages)
        return []

    def _edges(
        self,
        marked: str,
        n_body: int,
        starts: list[int],
        turns: list[int],
        messages: list[dict[str, Any]],
    ) -> list[tuple[int, BoundaryKind, int]]:
        """Move each turn's start back to the control token that opens it."""
        controls = [match.start() for match in SURROGATE.finditer(marked)]
        edges: list[tuple[int, BoundaryKind, int]] = []
        last = 0
        for n_before, (start, i_message) in enumerate(zip(starts, turns, strict=True)):
            i = bisect_right(controls, start - n_before) - 1  # earlier turn marks are gone
            if i < 0 or controls[i] <= last:
                continue
            last = controls[i]
            opens = all(message["role"] == "system" for message in messages[:i_message])
            edges.append((last, "system" if opens else "user", i_message))
        at_control = n_body in controls or n_body - 1 in controls
        if last < n_body < len(marked) and at_control:
            edges.append((n_body, "generation", len(messages)))
        return edges

    @property
    def _called(self) -> str:
        return self.name or "this model"

    def _broken(self, why: str) -> ModelError:
        return ModelError(f"the chat template of {self._called} fails: {self._marks.unmark(why)}")


def message_dict(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it."""
    thinking, content = message.thinking, message.content
    if message.role == "assistant" and not thinking:
        thinking, content = _inline_thinking(content)
    plain: dict[str, Any] = {"role": message.role, "content": well_formed(content)}
    if thinking is not None:
        # transformers offers it under both names.
        plain["reasoning_content"] = plain["thinking"] = well_formed(thinking)
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": well_formed(call.name),
                    "arguments": _plain(call.arguments, f"the arguments of {call.name}"),
                },
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        plain["tool_call_id"] = well_formed(message.tool_call_id)
    return plain


def _inline_thinking(content: str) -> tuple[str | None, str]:
    """Thinking that a client left in an assistant's text, and the text without it."""
    match = re.match(rf"\s*{THINK}(.*?){END_THINK}(.*)", content, re.DOTALL)
    return (match[1].strip("\n"), match[2].lstrip("\n")) if match else (None, content)


def _opened(message: Message) -> Message:
    """A message with the thinking that its text opens and does not close told apart."""
    match = re.match(rf"\s*{THINK}\n?(?!.*{END_THINK})(.*)", message.content, re.DOTALL)
    if message.thinking or match is None:
        return message
    return replace(message, thinking=match[1], content="")


def _plain(value: Any, what: str) -> Any:
    """A copy made of JSON types only, so that a template can reach nothing else."""
    try:
        return _copy(value, 0)
    except TypeError as error:
        raise UsageError(f"{what}: {error}") from error


def _copy(value: Any, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise TypeError("nested too deeply")
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, Mapping):
        return {well_formed(str(key)): _copy(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(item, depth + 1) for item in value]
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _without_nulls(value: Any) -> Any:
    """A tool without its null fields: clients send `"description": null` for none at all."""
    if isinstance(value, dict):
        return {
            key: _without_nulls(item)
            for key, item in value.items()
            if item is not None or key in _MEANINGFUL_NULLS
        }
    return value


def _n_chars(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + _n_chars(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(map(_n_chars, value))
    return 1


def _offsets(text: str, mark: str) -> list[int]:
    return [match.start() for match in re.finditer(mark, text)]
