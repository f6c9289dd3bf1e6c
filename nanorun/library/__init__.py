"""Which models there are, and which file on this machine a name stands for."""

from __future__ import annotations

from nanorun.library.catalog import CATALOG, KnownModel
from nanorun.library.local import BUNDLED_MODEL, models_folder, resolve_model

__all__ = ["BUNDLED_MODEL", "CATALOG", "KnownModel", "models_folder", "resolve_model"]
