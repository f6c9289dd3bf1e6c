"""The same client verbs and events over any OpenAI-style endpoint.

`client.py` is the client, `generation.py` one reply; `dialect.py` knows what each family of
endpoints takes, `reply.py` what they say, `learned.py` holds what this one was seen to do.
"""

from nanorun.runtime.remote.client import RemoteClient

__all__ = ["RemoteClient"]
