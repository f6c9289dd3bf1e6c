"""Names of tensors without what wrapped the model when it was saved."""

from __future__ import annotations

import re
from collections.abc import Mapping

from nanorun.errors import ModelError
from nanorun_converters.source.source_model import SourceTensor

# DataParallel, DeepSpeed and PEFT wrap the whole model; torch.compile, FSDP and activation
# checkpoints any part of it.
_OUTER = re.compile(r"(?:(?:module|base_model\.model|_forward_module)\.)+")
_ANYWHERE = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# A model inside one more module of the name `model`.
_INNER = re.compile(r"model\.(?=(?:backbone|model|lm_head|mtp)\.)")


def unwrapped(name: str) -> str:
    """`name` as the model itself calls the tensor."""
    name = _ANYWHERE.sub("", name)
    name = _OUTER.sub("", name, count=1) if _OUTER.match(name) else name
    return name[len("model.") :] if _INNER.match(name) else name


def without_wrappers(tensors: Mapping[str, SourceTensor], where: str) -> dict[str, SourceTensor]:
    """The tensors by their own names; each still knows what its file calls it.

    Raises:
        ModelError: If two are the same tensor then.
    """
    found: dict[str, SourceTensor] = {}
    for name, tensor in tensors.items():
        other = found.setdefault(unwrapped(name), tensor)
        if other is not tensor:
            raise ModelError(f"{where}: tensors {other.name!r} and {name!r} are one tensor twice")
    return found
