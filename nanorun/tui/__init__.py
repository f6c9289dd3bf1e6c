"""The terminal chat. It knows the client's protocol and nothing of the engine behind it."""
