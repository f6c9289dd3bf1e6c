"""What a folder is that holds no source model, and what makes one of it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection

from nanorun.errors import ModelError
from nanorun_converters.source.files import Files

ADAPTER_FILE = "adapter_config.json"
SUFFIX = ".safetensors"
_PICKLES = re.compile(r"(pytorch_model.*|consolidated.*|model.*)\.(bin|pt|pth)")


def refuse_other_kinds(files: Files, names: Collection[str]) -> None:
    """Refuse a folder whose weights are of another kind than a source model's.

    Args:
        files: The folder.
        names: Of its files.

    Raises:
        ModelError: Saying what it is and what makes a source model of it.
    """
    folder = str(files.where)
    weights = {name for name in names if name.endswith(SUFFIX)} - {"adapter_model.safetensors"}
    if ADAPTER_FILE in names and not weights:
        raise _adapter(folder)
    pickles = sorted(name for name in names if _PICKLES.fullmatch(name))
    if pickles and not weights:
        raise ModelError(
            f"{files.where / pickles[0]}: weights in PyTorch's own format, expected safetensors",
            facts=["reading that format runs code that is in the file"],
            tries=[*_saved_anew(folder, "AutoModelForCausalLM", "")],
        )


def _adapter(folder: str) -> ModelError:
    return ModelError(
        f"{folder}: an adapter (LoRA), not a model: expected the weights of a whole model",
        facts=["merged into the model that it was trained on, it can be converted"],
        tries=_saved_anew(folder, "AutoPeftModelForCausalLM", ".merge_and_unload()"),
    )


def unmerged_adapter(where: str, folder: str, name: str) -> ModelError:
    """The error for a whole model that still carries an adapter beside its weights."""
    return ModelError(
        f"{where}: tensor {name!r}: an adapter (LoRA) that is not merged into the weights",
        facts=["peft saved the model with the adapter's layers around its own"],
        tries=_saved_anew(folder, "AutoPeftModelForCausalLM", ".merge_and_unload()"),
    )


def _saved_anew(folder: str, loader: str, then: str) -> list[str]:
    library = "peft" if "Peft" in loader else "transformers"
    out = f"{folder}-merged" if then else f"{folder}-safetensors"
    load = f"m.from_pretrained({folder!r}, dtype='auto')"
    code = f"from {library} import {loader} as m; {load}{then}.save_pretrained({out!r})"
    return [f"python -c {shlex.quote(code)}", f"nanorun convert {shlex.quote(out)}"]
