"""Which models there are, and which file on this machine a name stands for."""

from __future__ import annotations

from nanorun.library.bundled import BUNDLED_MODELS
from nanorun.library.catalog import CATALOG, KnownModel
from nanorun.library.local import models_folder, resolve_model

__all__ = ["BUNDLED_MODELS", "CATALOG", "KnownModel", "models_folder", "resolve_model"]
