"""Regular expressions as ECMA 262 means them, which is what JSON Schema's `pattern` asks for.

`nodes` says what an expression consists of, `parsing` reads one, `translating` writes it in Rust's
syntax for the grammar as far as that goes, and `matching` finds it in a text, in full.
"""
