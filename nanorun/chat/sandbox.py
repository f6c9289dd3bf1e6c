"""A Jinja environment for templates that nobody vetted.

A chat template is code that arrives inside a model file that a person chose. It is rendered in the
engine's process only, which may die: the client tells of it and starts another. Jinja's immutable
sandbox keeps it from Python's objects. What is bounded here is what would otherwise never end or
grow step by step: passes of loops, calls, processor time, the size of each value and of the text
that comes out. One operation may still ask for more memory than there is; that ends as Python's
MemoryError or with the process, no limit of the process's own is set (the engine shares it).
What templates use behaves as in transformers.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 300_000
"""Loop passes and calls of one rendering, for an empty conversation."""
MAX_CPU_S = 10.0
MAX_CHARS = 16 << 20
"""Characters of the prompt, and of any value on the way, for an empty conversation."""
MAX_CHARS_PER_INPUT_CHAR = 16
"""Further characters for each character of the conversation."""
_MAX_INT_BITS, _MAX_POWER = 4096, 256


class TemplateRefusal(jinja2.TemplateError):
    """The template called `raise_exception`: it does not take these messages."""


class TemplateLimit(jinja2.TemplateError):
    """The template asked for more work than its allowance."""


class Allowance:
    """What one rendering may still use of steps, characters and processor time."""

    def __init__(self, n_input_chars: int) -> None:
        self._n_steps = MAX_STEPS + n_input_chars
        self._max_chars = MAX_CHARS + MAX_CHARS_PER_INPUT_CHAR * n_input_chars
        self._n_chars_left = self._max_chars
        self._end_s = time.thread_time() + MAX_CPU_S

    def step(self) -> None:
        """Count one loop pass or call."""
        self._n_steps -= 1
        if self._n_steps < 0:
            raise TemplateLimit("it loops too long")
        if self._n_steps % 32 == 0 and time.thread_time() > self._end_s:
            raise TemplateLimit(f"it ran for more than {MAX_CPU_S:.0f} s")

    def check(self, value: Any) -> Any:
        """`value`, if it is of a size that the next operation may work on."""
        if isinstance(value, int):
            if value.bit_length() > _MAX_INT_BITS:
                raise TemplateLimit("it computes with numbers of thousands of digits")
        elif isinstance(value, (str, bytes, list, tuple, dict)):
            self.check_size(len(value))
        return value

    def check_size(self, n_chars: int) -> None:
        """Refuse a value of so many characters or items."""
        if n_chars > self._max_chars:
            raise TemplateLimit("it builds too much text")

    def print(self, value: Any) -> Any:
        """`value`, its characters counted: where it is printed, and once more as it comes out."""
        self.walk(value)
        self._n_chars_left -= len(value) if isinstance(value, str) else 1
        if self._n_chars_left < 0:
            raise TemplateLimit("it builds too much text")
        return value

    def walk(self, value: Any) -> None:
        """Count each item of a list or mapping as a step.

        Sharing makes `[s, s]` of `[s, s]` of ... exponentially large for whoever writes it out.
        """
        stack = [value] if isinstance(value, (list, tuple, dict)) else []
        while stack:
            item = stack.pop()
            self.step()
            if isinstance(item, (list, tuple)):
                stack.extend(item)
            elif isinstance(item, dict):
                stack.extend(item.values())


_allowance: ContextVar[Allowance] = ContextVar("_allowance")


@contextmanager
def allowance_for(n_input_chars: int) -> Iterator[Allowance]:
    """Bound what templates do in this block; none may be compiled or rendered outside of one."""
    allowance = Allowance(n_input_chars)
    token = _allowance.set(allowance)
    try:
        yield allowance
    finally:
        _allowance.reset(token)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The `tojson` filter: plain JSON, with none of Jinja's escapes for HTML."""
    _allowance.get().walk(value)
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: object) -> None:
    raise TemplateRefusal(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class _GenerationTag(Extension):
    """`{% generation %}`, with which templates mark the assistant's text for training."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration is not a ClassVar)

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the tag's body, which is all there is to it here."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Meter(NodeTransformer):
    """Puts what the sandbox has no hook for into a parsed template: loops and `~`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        call = _environment_call("count_pass", [], node.lineno)
        node.body.insert(0, nodes.ExprStmt(call, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _environment_call("checked", [node], node.lineno)


def _environment_call(name: str, args: list[nodes.Expr], line: int) -> nodes.Call:
    # An attribute of the environment has no name a template could assign to.
    target = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(target, args, [], None, None, lineno=line)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox; `compile_bounded` makes templates whose work is counted."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            finalize=lambda value: _allowance.get().print(value),
        )
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]  # writes as many paragraphs as it is told to
        self.filters["tojson"] = to_json
        for name, function in self.filters.items():
            self.filters[name] = _checked_filter(function)

    def compile_bounded(self, tree: nodes.Template) -> jinja2.Template:
        """Compile a parsed template with the allowance built in."""
        _Meter().visit(tree)
        tree.set_environment(self)
        with allowance_for(0):
            return self.from_string(tree)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function, macro or method for a template."""
        allowance = _allowance.get()
        allowance.step()
        if __obj == __self.count_pass:
            return None
        return allowance.check(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply `+`, `*`, `**` or `%`, the operators that can make something large."""
        if operator == "**" and right > _MAX_POWER:
            raise TemplateLimit("it computes with numbers of thousands of digits")
        for value, count in ((left, right), (right, left)):
            if operator == "*" and isinstance(value, (str, list, tuple)) and isinstance(count, int):
                _allowance.get().check_size(len(value) * count)
        return _allowance.get().check(super().call_binop(context, operator, left, right))

    def count_pass(self) -> None:
        """Count one pass of a loop."""

    def checked(self, value: Any) -> Any:
        """`value`; that it is not too large is checked as for every call."""
        return value


def _checked_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # copies Jinja's marks: which filters get the context first
    def checked(*args: Any, **kwargs: Any) -> Any:
        _allowance.get().step()
        return _allowance.get().check(function(*args, **kwargs))

    return checked
