#!/usr/bin/env bash
# llguidance holds a JSON Schema's integer beyond 2^53 to another integer.
#
# One would expect: {"const": 9007199254740993} allows the text 9007199254740993 and nothing else; JSON
# Schema compares numbers by value, JSON has no limit, and the schema is given as text.
# What happens: the number is read as a double, so the only text that is allowed is 9007199254740992,
# which the schema refuses. `enum` behaves alike. No error or warning says so.
# Versions: llguidance 1.9.1, Python 3.11. Seen on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check llguidance==1.9.1 2>/dev/null
"$folder/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import json

from llguidance import LLMatcher, LLTokenizer

print("llguidance", importlib.metadata.version("llguidance"))
tokenizer = LLTokenizer("byte")
wanted, neighbour = 2**53 + 1, 2**53


def allows(schema: dict, text: str) -> bool:
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    matcher = LLMatcher(tokenizer, grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(text)
    return matcher.validate_tokens(tokens) == len(tokens)


for schema in ({"const": wanted}, {"enum": [wanted]}):
    seen = allows(schema, str(wanted)), allows(schema, str(neighbour))
    print(json.dumps(schema), f"allows {wanted}: {seen[0]}, allows {neighbour}: {seen[1]}")
    assert seen == (False, True), "the behaviour has changed"
assert allows({"const": neighbour - 1}, str(neighbour - 1)), "below 2^53 it is exact"
PYTHON
