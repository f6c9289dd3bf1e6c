"""Anthropic's API: `messages` (routes), `messages_body` (what a request means), `blocks` (past
messages), `messages_writer` (what goes back).
"""
