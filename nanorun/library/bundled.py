"""The models that come with nanorun, as the source models that they are converted from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanorun import __version__

if TYPE_CHECKING:
    from nanorun_converters.source.files import LocalFile

_DATA = Path(__file__).parents[1] / "data"


@dataclass(frozen=True, slots=True)
class BundledFiles:
    """The files of one bundled model; what converts a source model takes them as such."""

    name: str
    folders: tuple[Path, ...]
    """A file is that of the first folder that has it: a variant keeps only what differs."""
    n_reads_ahead: int = 0
    revision: str = ""

    @property
    def where(self) -> Path:
        """What to call the whole in errors."""
        return self.folders[0]

    @property
    def repository(self) -> str:
        """The model's name; it is on no Hub."""
        return self.name

    @property
    def argument(self) -> str:
        """What a person types as SRC for it."""
        return self.name

    def names(self) -> list[str]:
        """The names of all files, sorted."""
        return sorted({path.name for folder in self.folders for path in folder.iterdir()})

    def find(self, name: str) -> LocalFile | None:
        """The file of this plain name, or None where there is none."""
        from nanorun_converters.source.files import local_file

        found = (local_file(folder / name) for folder in self.folders)
        return next((file for file in found if file is not None), None)

    def modified(self, name: str) -> int | None:
        """None: when a file was written says nothing here."""
        return None

    def give_up(self) -> None:
        """Nothing to do: a disk answers soon."""

    def fingerprint(self) -> str:
        """Twelve hex digits that change with the model and with the converter's version."""
        digest = hashlib.sha256(__version__.encode())
        for name in self.names():
            file = None if name.endswith(".md") else self.find(name)
            if file is not None:
                content = hashlib.sha256(file.path.read_bytes()).digest()
                digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()[:12]


BUNDLED_MODELS = {
    files.name: files
    for files in (
        BundledFiles("pico", (_DATA / "pico",)),
        BundledFiles("pico-mtp", (_DATA / "pico_mtp", _DATA / "pico")),
    )
}
