"""The HTTP endpoint over a client: a thin dialect per API around one service.

Read in this order: `app` (what there is) -> `openai/chat` (a dialect: its routes) ->
`openai/chat_body` (from its words to an `Asked`) -> `service` (to the engine and back) ->
`openai/chat_writer` (from events to its words). `policy` says what becomes of fields, `history`
what of past messages; `gate` and `admission` decide who is let in.
"""
