"""Ollama's API, which many desktop programs speak alone: `routes`, `bodies` (what a request means),
`writer` (what goes back: a line of JSON each).
"""
