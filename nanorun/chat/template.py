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
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes

from nanorun.chat.markup import END_THINK, THINK
from nanorun.chat.prompt import Boundary, BoundaryKind, RenderedPrompt, Segment
from nanorun.chat.sandbox import BoundedEnvironment, TemplateRefusal, allowance_for
from nanorun.errors import ModelError, NanorunError, UsageError
from nanorun.model.chat import Message

_SURROGATE = re.compile("[\ud800-\udfff]")
_FIRST_MARK = 0xD800
_TURN_MARK = "\udfff"
"""Put in front of a user's content to find where the turn came to lie."""
_N_MARKS = 0xDFFF - 0xD800
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
        self._marks = _Marks(special_tokens, [source, *(named_tokens or {}).values()])
        self._named = {k: self._marks.mark(v) for k, v in (named_tokens or {}).items()}
        environment = BoundedEnvironment()
        try:
            tree = environment.parse(_well_formed(source))
            self._marks.mark_constants(tree)
            self._template = environment.compile_bounded(tree)
        except jinja2.TemplateSyntaxError as error:
            raise self._broken(f"{error.message} (line {error.lineno})") from error
        except Exception as error:  # whatever Python's own compiler says, out of memory included
            raise self._broken(str(error)) from error

    @classmethod
    def from_file(cls, path: Path, *, special_tokens: Sequence[str] = ()) -> ChatTemplate:
        """Read a template from a `.jinja` file."""
        source = path.read_text(encoding="utf-8-sig")
        return cls(source, name=path.name, special_tokens=special_tokens)

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
        scope = {
            **_plain(extra or {}, "template variables"),
            **self._named,
            "tools": [_without_nulls(_plain(tool, "tools")) for tool in tools] or None,
            "enable_thinking": enable_thinking,
            "truncate_history_thinking": truncate_history_thinking,
        }
        marked = self._run(dicts, scope, add_generation_prompt)
        places = self._places(dicts, scope, marked)
        return self._marks.prompt(marked, places)

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
        controls = [match.start() for match in _SURROGATE.finditer(marked)]
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


class _Marks:
    """One lone surrogate for each control token that a template spells."""

    def __init__(self, special_tokens: Iterable[str], spelled_in: Sequence[str]) -> None:
        tokens = sorted({token for token in special_tokens if token})
        self._special = re.compile(_any_of(tokens)) if tokens else None
        used = [token for token in tokens if any(token in source for source in spelled_in)]
        if len(used) > _N_MARKS:
            raise ModelError(f"the chat template spells {len(used)} different control tokens")
        self._mark_of = {token: chr(_FIRST_MARK + i) for i, token in enumerate(used)}
        self._token_of = {mark: token for token, mark in self._mark_of.items()}

    def mark(self, text: str) -> str:
        """`text` with marks for the control tokens in it."""
        if self._special is None:
            return text
        return self._special.sub(lambda match: self._mark_of.get(match[0], match[0]), text)

    def unmark(self, text: str) -> str:
        """`text` with the control tokens that its marks stand for."""
        return _SURROGATE.sub(lambda match: self._token_of.get(match[0], ""), text)

    def mark_constants(self, tree: nodes.Template) -> None:
        """Mark the control tokens in the texts of a parsed template."""
        for data in tree.find_all(nodes.TemplateData):
            data.data = self.mark(data.data)
        for const in tree.find_all(nodes.Const):
            if isinstance(const.value, str):
                const.value = self.mark(_well_formed(const.value))

    def prompt(
        self, marked: str, places: Sequence[tuple[int, BoundaryKind, int]]
    ) -> RenderedPrompt:
        """Turn marks back into tokens, and runs of text with typed tokens into plain segments."""
        joined: list[tuple[list[str], bool]] = []
        offset_of: dict[int, int] = {}
        at = n_chars = 0
        for piece in re.split("([\ud800-\udfff])", marked):
            offset_of[at] = n_chars
            text = self._token_of.get(piece, piece)
            if text:
                special = text is not piece or self._is_harmless(text)
                if not joined or joined[-1][1] is not special:
                    joined.append(([], special))
                joined[-1][0].append(text)
            at += len(piece)
            n_chars += len(text)
        segments = tuple(Segment("".join(texts), special) for texts, special in joined)
        boundaries = (Boundary(offset_of[place], kind, i) for place, kind, i in places)
        return RenderedPrompt(segments, tuple(boundaries))

    def _is_harmless(self, text: str) -> bool:
        return self._special is None or self._special.search(text) is None


def _any_of(tokens: Sequence[str]) -> str:
    """A pattern for any of the sorted `tokens`, the longest that fits, as tokenizers match them.

    It branches letter by letter: a vocabulary has a thousand control tokens that all begin alike,
    and trying each at every `<` of a long prompt takes seconds.
    """
    first, last = tokens[0], tokens[-1]
    pairs = zip(first, last, strict=False)
    n_common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    prefix = first[:n_common]
    rests = [token[len(prefix) :] for token in tokens]
    branches = [list(group) for _, group in groupby(filter(None, rests), key=itemgetter(0))]
    if not branches:
        return re.escape(prefix)
    inner = "|".join(map(_any_of, branches))
    return f"{re.escape(prefix)}(?:{inner}){'?' if '' in rests else ''}"


def message_dict(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it."""
    thinking, content = message.thinking, message.content
    if message.role == "assistant" and not thinking:
        thinking, content = _inline_thinking(content)
    plain: dict[str, Any] = {"role": message.role, "content": _well_formed(content)}
    if thinking is not None:
        # transformers offers it under both names.
        plain["reasoning_content"] = plain["thinking"] = _well_formed(thinking)
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": _well_formed(call.name),
                    "arguments": _plain(call.arguments, f"the arguments of {call.name}"),
                },
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        plain["tool_call_id"] = _well_formed(message.tool_call_id)
    return plain


def _inline_thinking(content: str) -> tuple[str | None, str]:
    """Thinking that a client left in an assistant's text, and the text without it."""
    match = re.match(rf"\s*{THINK}(.*?){END_THINK}(.*)", content, re.DOTALL)
    return (match[1].strip("\n"), match[2].lstrip("\n")) if match else (None, content)


def _well_formed(text: str) -> str:
    """`text` with lone surrogates replaced: no tokenizer takes them, and marks are made of them."""
    return _SURROGATE.sub("\ufffd", text)


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
        return _well_formed(value)
    if isinstance(value, Mapping):
        return {_well_formed(str(key)): _copy(item, depth + 1) for key, item in value.items()}
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
