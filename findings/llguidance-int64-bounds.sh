#!/usr/bin/env bash
# llguidance refuses a JSON Schema that bounds an integer below by the least int64.
#
# One would expect: {"type": "integer", "minimum": -2^63, "maximum": 2^63 - 1}, which OpenAPI generators
# write for `format: int64`, becomes a grammar, as it does with a minimum that is a little larger.
# What happens: "Failed to generate regex for integer range", with and without the maximum, for every
# minimum that a double rounds to -2^63.
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


def refusal(**bounds: int) -> str:
    schema = json.dumps({"type": "integer", **bounds})
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(schema), log_level=0)
    error = matcher.get_error() if matcher.is_error() else ""
    print(schema, "->", error.splitlines()[0] if error else "taken")
    return error


lowest, highest = -(2**63), 2**63 - 1
assert "integer range" in refusal(minimum=lowest, maximum=highest), "the behaviour has changed"
assert "integer range" in refusal(minimum=lowest), "the behaviour has changed"
assert not refusal(minimum=lowest + 2048, maximum=highest)
PYTHON
