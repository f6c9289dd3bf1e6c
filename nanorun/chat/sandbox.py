"""A Jinja environment for templates that nobody vetted.

A chat template is code that arrives inside a model file. It may read what it is given and build
text, nothing else: no attributes of Python objects, no loaders, and no more work than an
`Allowance` permits, so that an endless loop or a string doubled forty times ends with an error
and not with a machine out of memory. What it may use behaves as in transformers.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
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
"""Loop passes, calls and filters of one rendering."""
MAX_CPU_S = 10.0
MAX_CHARS = 16 << 20
"""Characters built by one rendering, intermediate strings included, for an empty conversation."""
MAX_CHARS_PER_INPUT_CHAR = 32
"""Further characters for each character of the conversation; known templates need about 10."""
_MAX_INT_BITS = 4096
_MAX_INDENT = 64

_STR_METHODS = """
capitalize casefold count endswith find format index isalnum isalpha isdecimal isdigit islower
isnumeric isspace isupper join lower lstrip partition removeprefix removesuffix replace rfind
rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
"""
# Everything else that builtin types offer is refused: most of it pads or multiplies text.
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_STR_METHODS.split()),
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
    int: frozenset(),
    float: frozenset(),
}
_DROPPED_FILTERS = (
    "batch", "center", "pprint", "random", "slice", "sum", "urlize", "wordwrap", "xmlattr",
)  # fmt: skip
_CONTAINER_FILTER_NAMES = """
attr count d default dictsort first groupby items join last length list map max min reject
rejectattr reverse select selectattr sort tojson unique
"""
_CONTAINER_FILTERS = frozenset(_CONTAINER_FILTER_NAMES.split())
"""Filters that take a list or mapping for what it is; all others make text of it first."""
_WIDE_FIELD = re.compile(r"\d{4,}|\*|\{[^{}]*\{")
"""Format specifications that pad to thousands of characters, or to a computed width."""


class TemplateRefusal(jinja2.TemplateError):
    """The template called `raise_exception`: it does not take these messages."""


class TemplateLimit(jinja2.TemplateError):
    """The template asked for more work than its allowance."""


class Allowance:
    """What one rendering may still use of steps, characters and processor time."""

    def __init__(self, n_input_chars: int = 0) -> None:
        self._n_steps = MAX_STEPS + n_input_chars
        self._n_chars = MAX_CHARS + MAX_CHARS_PER_INPUT_CHAR * n_input_chars
        self._end_s = time.thread_time() + MAX_CPU_S

    def step(self) -> None:
        """Count one loop pass, call or filter."""
        self._n_steps -= 1
        if self._n_steps < 0:
            raise TemplateLimit("it loops too long")
        if time.thread_time() > self._end_s:
            raise TemplateLimit(f"it ran for more than {MAX_CPU_S:.0f} s")

    def take(self, n_chars: int) -> None:
        """Count characters (or list elements) that are built, before they are where possible."""
        self._n_chars -= n_chars
        if self._n_chars < 0:
            raise TemplateLimit("it builds too much text")


_allowance: ContextVar[Allowance | None] = ContextVar("_allowance", default=None)


@contextmanager
def allowance_for(n_input_chars: int) -> Iterator[Allowance]:
    """Bound what templates do in this block."""
    allowance = Allowance(n_input_chars)
    token = _allowance.set(allowance)
    try:
        yield allowance
    finally:
        _allowance.reset(token)


def _step() -> None:
    if (allowance := _allowance.get()) is not None:
        allowance.step()


def _take(n_chars: int) -> None:
    if (allowance := _allowance.get()) is not None:
        allowance.take(n_chars)


def _take_result(value: Any) -> None:
    if isinstance(value, (str, bytes, list, tuple, dict)):
        _take(len(value))


def _printed_size(value: Any) -> int:
    """Characters that `str(value)` has at least, nested lists included."""
    return sum(len(leaf) if isinstance(leaf, str) else 1 for leaf in _leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    """All that is nested in a value; each item counts as a step.

    Sharing makes `[s, s]` of `[s, s]` of ... exponentially large for every function that walks
    it, with little memory to show for it.
    """
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, (list, tuple)):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend(item.keys())
            stack.extend(item.values())
        _step()
        yield item


def _take_printed(value: Any) -> None:
    """Pay for `str(value)` where that builds anything."""
    if isinstance(value, (list, tuple, dict)):
        _take(_printed_size(value))


def _take_format(template: str, arguments: Iterable[Any]) -> None:
    if _WIDE_FIELD.search(template):
        raise TemplateLimit("it pads text to a great width")
    widest = max(map(_printed_size, arguments), default=0)
    _take(len(template) + (template.count("{") + template.count("%")) * widest)


def _take_replace(text: str, old: str, new: str) -> None:
    _take(len(text) + text.count(old) * len(new))


def _take_join(separator: str, items: list[Any]) -> None:
    sizes = (len(item) if isinstance(item, str) else _printed_size(item) for item in items)
    _take(sum(sizes) + len(separator) * len(items))


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The `tojson` filter: plain JSON, with none of Jinja's escapes for HTML."""
    if indent is not None and (len(indent) if isinstance(indent, str) else indent) > _MAX_INDENT:
        raise TemplateLimit("it indents JSON to a great width")
    _take_printed(value)
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


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    # A function, because the class itself would hand out its own methods.
    made = dict(*args, **kwargs)
    _walk(made)
    return made


def _walk(value: Any) -> None:
    """Pay for every item in `value`."""
    for _ in _leaves(value):
        pass


class _GenerationTag(Extension):
    """`{% generation %}`, with which templates mark the assistant's text for training."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration is not a ClassVar)

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the tag's body, which is all there is to it here."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Meter(NodeTransformer):
    """Puts the allowance into a parsed template: into loops, macros and concatenation."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, _step_node(node))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self.generic_visit(node)
        node.body.insert(0, _step_node(node))
        return node

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        return self._walk_literal(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        return self._walk_literal(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        return self._walk_literal(node) if node.ctx == "load" else node

    def _walk_literal(self, node: nodes.Literal) -> nodes.Expr:
        self.generic_visit(node)
        if next(node.find_all((nodes.Name, nodes.Call)), None) is None:
            return node
        return _environment_call("metered_literal", [node], node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _environment_call("metered_concat", node.nodes, node.lineno)


def _step_node(owner: nodes.For | nodes.Macro) -> nodes.Node:
    """A call that pays for one pass of a body and for the fixed text in it."""
    n_chars = sum(len(d.data) for n in owner.body for d in n.find_all(nodes.TemplateData))
    cost = nodes.Const(n_chars, lineno=owner.lineno)
    call = _environment_call("metered_pass", [cost], owner.lineno)
    return nodes.ExprStmt(call, lineno=owner.lineno)


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
            finalize=self._metered_output,
        )
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["dict"] = _make_dict
        del self.globals["lipsum"]
        self.filters["tojson"] = to_json
        for name in _DROPPED_FILTERS:
            del self.filters[name]
        for name, function in self.filters.items():
            self.filters[name] = _metered_filter(name, function)

    def compile_bounded(self, tree: nodes.Template) -> jinja2.Template:
        """Compile a parsed template with the allowance built in."""
        _Meter().visit(tree)
        tree.set_environment(self)
        with allowance_for(0):
            return self.from_string(tree)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may read `obj.attr`."""
        if not super().is_safe_attribute(obj, attr, value):
            return False
        for kind, methods in _METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return not isinstance(obj, bytes)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function, macro or method for a template."""
        if __obj in (__self.metered_pass, __self.metered_concat, __self.metered_literal):
            return __obj(*args)
        _step()
        args = _pay_method(__obj, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        _take_result(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply `+`, `*`, `**` or `%`, the operators that can make something large."""
        if operator == "%" and isinstance(left, str):
            _take_format(left, right if isinstance(right, tuple) else (right,))
        elif operator == "*":
            _pay_repeat(left, right)
        elif operator == "**":
            _pay_power(left, right)
        elif isinstance(left, (list, tuple)):
            _take(len(left) + len(right) if isinstance(right, (list, tuple)) else 0)
        elif isinstance(left, str) and isinstance(right, str):
            _take(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def metered_pass(self, n_chars: int) -> None:
        """Pay for one pass of a loop or macro body with `n_chars` of fixed text."""
        _step()
        _take(n_chars)

    def metered_concat(self, *parts: Any) -> str:
        """Concatenate as `~` does."""
        for part in parts:
            _take_printed(part)
        texts = [str(part) for part in parts]
        _take(sum(map(len, texts)))
        return "".join(texts)

    def metered_literal(self, value: Any) -> Any:
        """Pay for a list, tuple or mapping made of other values."""
        _walk(value)
        return value

    def _metered_output(self, value: Any) -> Any:
        _take_printed(value)
        _take_result(value)
        return value


def _metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # copies Jinja's marks: which filters get the context first
    def metered(*args: Any, **kwargs: Any) -> Any:
        _step()
        given = args
        if args and isinstance(args[0], (Context, nodes.EvalContext, jinja2.Environment)):
            given = args[1:]
        if given:
            paid = _pay_filter(name, given[0], given[1:], kwargs)
            args = (*args[: len(args) - len(given)], paid, *given[1:])
        result = function(*args, **kwargs)
        _take_result(result)
        return result

    return metered


def _pay_filter(name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pay for a filter that can enlarge its input; returns the input, made a list for `join`."""
    if name not in _CONTAINER_FILTERS:
        _take_printed(value)
    if name == "join":
        value = list(value)
        _take_join(str(args[0] if args else kwargs.get("d", "")), value)
    elif name == "replace":
        old, new = (*args, kwargs.get("old", ""), kwargs.get("new", ""))[:2]
        _take_replace(str(value), str(old), str(new))
    elif name == "format":
        _take_format(str(value), [*args, *kwargs.values()])
    elif name == "indent":
        width = args[0] if args else kwargs.get("width", 4)
        n_chars = len(width) if isinstance(width, str) else int(width)
        _take((str(value).count("\n") + 1) * n_chars)
    return value


def _pay_method(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Pay for a method of `str` that can enlarge it; returns the arguments to call it with."""
    method = getattr(method, "__wrapped__", method)  # the sandbox wraps `str.format`
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if not isinstance(owner, str) or not (args or kwargs):
        return args
    if name == "join":
        args = (list(args[0]),)
        _take_join(owner, args[0])
    elif name == "replace" and len(args) >= 2:
        _take_replace(owner, str(args[0]), str(args[1]))
    elif name == "format":
        _take_format(owner, [*args, *kwargs.values()])
    return args


def _pay_repeat(left: Any, right: Any) -> None:
    for value, count in ((left, right), (right, left)):
        if isinstance(value, (str, list, tuple)) and isinstance(count, int) and count > 0:
            _take(len(value) * count)
    if isinstance(left, int) and isinstance(right, int):
        _check_int(left.bit_length() + right.bit_length())


def _pay_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_int(left.bit_length() * max(right, 0))


def _check_int(n_bits: int) -> None:
    if n_bits > _MAX_INT_BITS:
        raise TemplateLimit("it computes with numbers of thousands of digits")
