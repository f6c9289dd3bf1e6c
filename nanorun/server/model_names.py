"""Which names a client may call the model by."""

from __future__ import annotations

from nanorun.server.errors import ApiError

_ANY = ("", "default", "auto")
"""What clients send that have nothing set."""


class ModelNames:
    """The names that mean the one model there is.

    Args:
        name: Its name towards clients.
        others: Further names: the file's own, aliases that were given.
        any_name: Whether every name means it.
    """

    def __init__(self, name: str, others: tuple[str, ...] = (), *, any_name: bool = False) -> None:
        self.name = name
        self.any_name = any_name
        self._known = {_plain(known) for known in (name, *others)}

    def add(self, name: str) -> None:
        """Let another name mean it."""
        self._known.add(_plain(name))

    def has(self, asked: str | None) -> bool:
        """Whether a name means the model: as it is, or but for case, owner, tag and ending."""
        return self.any_name or asked is None or asked in _ANY or _plain(asked) in self._known

    def check(self, asked: str | None) -> None:
        """Refuse a name that means another model.

        Raises:
            ApiError: 404, naming the one there is.
        """
        if self.has(asked):
            return
        raise ApiError(
            404,
            f"there is no model {asked!r} here; this endpoint serves {self.name!r}"
            " (nanorun serve --any-model answers to every name)",
            code="model_not_found",
            param="model",
        )


def _plain(name: str) -> str:
    """`openai/Pico:latest` and `pico.gguf` as `pico`."""
    return name.strip().rpartition("/")[2].partition(":")[0].lower().removesuffix(".gguf")
