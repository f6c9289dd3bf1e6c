"""What an endpoint was seen to do, kept from one reply to the next."""

from __future__ import annotations

from dataclasses import dataclass

from nanorun.runtime.remote.dialect import Dialect


@dataclass(slots=True)
class Learned:
    """What is known of an endpoint; the client and its replies share one and write into it."""

    dialect: Dialect | None = None
    """None until its models were listed."""
    thinking_field: str | None = None
    """The field of a message in which it sends thinking; None until it has sent some."""
    takes_effort: bool = True
    """False once it has answered a request only without `reasoning_effort`."""
    told_no_usage: bool = False
    """Whether people were told that it counts no tokens."""
