"""Templates from strangers: what they may not reach, and how much they may not do."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from nanorun.chat.template import ChatTemplate
from nanorun.errors import ModelError
from nanorun.model.chat import Message

GROW = "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = GROWN %}{% endfor %}"
NEST = (
    "{% set ns = namespace(s=['x' * 1000]) %}"
    "{% for i in range(40) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}"
)
LOOP = "{% for i in range(90000) %}BODY{% endfor %}"
HOSTILE = {
    "nested loops": LOOP.replace("BODY", LOOP),
    "long range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "endless recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "repeated text": "{{ 'x' * 10 ** 9 }}",
    "repeated list": "{{ ['x' * 1000] * 10 ** 9 }}",
    "power": "{{ 10 ** 10 ** 4 }}{{ 10 ** 10000000 }}",
    "squares": GROW.replace("'xx'", "3").replace("GROWN", "ns.s * ns.s"),
    "doubled by ~": GROW.replace("GROWN", "ns.s ~ ns.s"),
    "doubled by +": GROW.replace("GROWN", "ns.s + ns.s"),
    "doubled list": GROW.replace("'xx'", "['x']").replace("GROWN", "ns.s + ns.s"),
    "replace method": GROW.replace("GROWN", "ns.s.replace('x', 'xxxx')"),
    "replace filter": GROW.replace("GROWN", "ns.s | replace('x', 'xxxx')"),
    "join method": GROW.replace("GROWN", "ns.s.join([ns.s, ns.s, ns.s])"),
    "join filter": GROW.replace("GROWN", "[ns.s, ns.s, ns.s] | join(ns.s)"),
    "format method": GROW.replace("GROWN", "'{0}{0}{0}'.format(ns.s)"),
    "format filter": GROW.replace("GROWN", "'%s%s%s' | format(ns.s, ns.s, ns.s)"),
    "percent": GROW.replace("GROWN", "'%s%s%s' % (ns.s, ns.s, ns.s)"),
    "nested lists": NEST,
    "nested lists as JSON": NEST.replace("{{ ns.s }}", "{{ ns.s | tojson }}"),
    "nested dicts": NEST.replace("[ns.s, ns.s]", "{'a': ns.s, 'b': ns.s}"),
    "nested by dict()": NEST.replace("[ns.s, ns.s]", "dict(a=ns.s, b=ns.s)"),
    "fixed text in a loop": LOOP.replace("BODY", "z" * 9999),
    "output in a loop": LOOP.replace(
        "BODY", "{% set x %}{{ messages[0].content * 9999 }}{% endset %}"
    ),
    "wide number": "{{ '%99999999d' % 1 }}",
    "wide format": "{{ '{:99999999}'.format(1) }}",
    "computed width": "{{ '{:{}}'.format(1, 99999999) }}",
    "wide indent": "{{ 'x' | indent(99999999, true) }}",
    "wide JSON": "{{ [1] | tojson(indent=99999999) }}",
    "padding": "{{ 'x'.center(99999999) }}",
    "padding filter": "{{ 'x' | center(99999999) }}",
    "bytes": "{{ (1).to_bytes(99999999) }}",
    "lipsum": "{{ lipsum(n=99999999) }}",
}
CURIOUS = {
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "macro": "{% macro f() %}{% endmacro %}{{ f.__class__.__base__ }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "append": "{{ messages.append(1) }}",
    "pop": "{{ messages[0].pop('role') }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "attr filter": "{{ ('' | attr('__class__')).x }}",
}


def render(source: str) -> str:
    return ChatTemplate(source).render([Message("user", "hi")], enable_thinking=True).text


# What each does to a process that may have 2 GiB: its error and the processor's seconds.
IN_CHILD = """
import json, resource, sys, time
from nanorun.chat.template import ChatTemplate
from nanorun.model.chat import Message

resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
for name, source in json.load(sys.stdin).items():
    started = time.thread_time()
    try:
        ChatTemplate(source).render([Message("user", "hi")], enable_thinking=True)
        error = ""
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    print(json.dumps([name, error, time.thread_time() - started]), flush=True)
"""


@pytest.fixture(scope="module")
def endings() -> dict[str, tuple[str, float]]:
    """How each hostile template ended: its error, and the seconds it took."""
    child = [sys.executable, "-c", IN_CHILD]
    done = subprocess.run(child, input=json.dumps(HOSTILE), stdout=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: (error, took_s) for name, error, took_s in lines}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_ends_with_an_error(
    name: str, endings: dict[str, tuple[str, float]]
) -> None:
    error, took_s = endings[name]
    assert error.startswith("ModelError: the chat template of this model fails: ")
    assert took_s < 6


@pytest.mark.parametrize("name", CURIOUS)
def test_template_reaches_nothing_but_its_values(name: str) -> None:
    with pytest.raises(ModelError):
        render(CURIOUS[name])


def test_long_conversation_is_not_taken_for_a_hostile_one(template: ChatTemplate) -> None:
    messages = [
        Message(role, text)  # type: ignore[arg-type]
        for i in range(3000)
        for role, text in (("user", f"q{i} <b>" * 20), ("assistant", f"a{i}\n" * 20))
    ]
    prompt = template.render([*messages, Message("user", "x" * 2_000_000)], enable_thinking=True)
    assert len(prompt.boundaries) == 3002


USED = [
    ("{{ {'é': '<'} | tojson }}", '{"é": "<"}'),
    ("{{ [1, {'a': 2}] | tojson(indent=1) }}", '[\n 1,\n {\n  "a": 2\n }\n]'),
    ("{{ {'a': 1, 'b': 2} | tojson(separators=(',', ':')) }}", '{"a":1,"b":2}'),
    ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}", '{"a": 2, "b": 1}'),
    ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
    ("{% for i in 'abc' %}{% if i == 'b' %}{% continue %}{% endif %}{{ i }}{% endfor %}", "ac"),
    ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
    ("{% generation %}x{{ messages[0].role }}{% endgeneration %}", "xuser"),
    ("{{ strftime_now('%Y') | length }}", "4"),
    ("  {% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
    ("{{ 'a' ~ 1 ~ none ~ [1, 'b'] ~ ('<' | safe) }}", "a1None[1, 'b']<"),
    ("{{ ['a', 'b'] | map('upper') | join('-') }}", "A-B"),
    ("{{ '-'.join(['c', 'd']) }}", "c-d"),
    ("{{ '%s and %s' | format('a', 1) }}", "a and 1"),
    ("{{ '{} {x}'.format('b', x=2) }}{{ '%d' % 3 }}", "b 23"),
    ("{{ 'a\nb' | indent(2) }}", "a\n  b"),
    ("{{ 'aXa' | replace('a', 'b') }}{{ 'aXa'.replace('a', '', 1) }}", "bXbXa"),
    ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 2 %}{{ ns.n * 3 }}", "9"),
    ("{{ 2 ** 3 }}{{ 7 % 4 }}{{ [1] + [2] }}{{ 'ab' * 2 }}", "83[1, 2]abab"),
    ("{{ dict(a=1).get('a') }}", "1"),
    ("{% for k, v in {'x': messages[0].role}.items() %}{{ k }}{{ v }}{% endfor %}", "xuser"),
    ("{% macro f(x) %}{{ x }}{{ caller() }}{% endmacro %}{% call f(1) %}c{% endcall %}", "1c"),
    ("{% for m in messages recursive %}{{ m.content }}{% endfor %}", "hi"),
]


@pytest.mark.parametrize(("source", "expected"), USED)
def test_what_templates_use_works_as_in_transformers(source: str, expected: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    assert render(source) == expected
    messages = [[{"role": "user", "content": "hi"}]]
    assert render_jinja_template(messages, chat_template=source)[0] == [expected]
