"""What a person may choose about a conversion."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from nanorun_quant.recipe import DEFAULT_RECIPE, Again


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What a person may choose about a conversion."""

    out: Path | None = None
    """The file to write; None for one named after source and recipe, in the working folder."""
    recipe: str = DEFAULT_RECIPE
    type_map: Mapping[str, str] = field(default_factory=dict)
    """Role, or `*`, to type; stronger than the recipe."""
    pad: str = "auto"
    """Whether sizes are padded to whole blocks: auto, never, always."""
    imatrix: Path | None = None
    """The importance matrix; types of few bits need one."""
    feedback: str = "auto"
    """Whether columns make up for each other's errors: auto, where the imatrix knows how inputs go
    together; never."""
    target_bytes: int | None = None
    """Search the types of least error within this size of the file, instead of a recipe."""
    target_bpw: float | None = None
    """The same, in bits per weight."""
    quantizer: str = "auto"
    """Whose code makes the bytes: auto, ggml, torch."""
    n_threads: int | None = None
    """Threads that read and quantize; None for one a core."""
    force: bool = False
    """Replace an existing file."""
    dry_run: bool = False
    """Plan and predict, write nothing; the files of weights need not be there."""
    split_max_bytes: int | None = None
    """Size that no file may exceed; None for one file."""
    keep_mtp: bool = True
    """Whether a multi-token prediction head comes along."""
    ignored_fields: tuple[str, ...] = ()
    """Fields of config.json to leave out of account, though nobody knows what they do."""

    chat_template: str | None = None
    """A file with the chat template to write, or `family`; None for the source's own."""

    def command(self, source: str, **changes: Any) -> str:
        """The command line that asks for the same of `source`.

        Args:
            source: What a person types as SRC.
            changes: Options that are to be others, by the names of these fields.
        """
        asked, default = replace(self, **changes), ConvertOptions()
        words = ["nanorun", "convert", source]
        for flag, name in _FLAGS.items():
            value = getattr(asked, name)
            if value != getattr(default, name):
                words += [flag] if isinstance(value, bool) else [flag, str(value)]
        for role, type_ in asked.type_map.items():
            words += ["--type-map", f"{role}={type_}"]
        for name in asked.ignored_fields:
            words += ["--ignore-field", name]
        return shlex.join(words)

    def again(self, source: str) -> Again:
        """`command` of this source, for errors that know which option would help."""
        return partial(self.command, source)


_FLAGS = {
    "--recipe": "recipe",
    "--target-size": "target_bytes",
    "--target-bpw": "target_bpw",
    "--pad": "pad",
    "--imatrix": "imatrix",
    "--feedback": "feedback",
    "--quantizer": "quantizer",
    "--threads": "n_threads",
    "--split-max-size": "split_max_bytes",
    "--no-mtp": "keep_mtp",
    "--chat-template": "chat_template",
    "--out": "out",
    "--force": "force",
    "--dry-run": "dry_run",
}
