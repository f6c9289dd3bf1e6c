"""OpenAI's API: `chat` (routes and what a request means), `chat_writer` (what goes back)."""
