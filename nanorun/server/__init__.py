"""The OpenAI-style endpoint over a client.

Read in this order: `app` (routes) -> `schema` (what a request means) -> `chat` (from request to
engine and back) -> `replies`, `sse` (what goes out). `gate` and `admission` decide who is let in.
"""
