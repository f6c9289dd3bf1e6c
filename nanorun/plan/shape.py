"""A model as the plan sees it: its shape, and the bytes of every tensor."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nanorun.model.arch import HybridArch
from nanorun.model.footprint import tensor_bytes
from nanorun.model.ggml_type import GgmlType
from nanorun.model.gguf import GgufFile
from nanorun.model.gguf_arch import arch_from_gguf
from nanorun.model.tensor_roles import Role, role_of

_BLOCK = re.compile(r"blk\.([0-9]+)\.")
# Recipes for a number format or a machine of their own; they are taken when asked for.
_NOT_CHOSEN = ("nvfp4_moe", "mxfp4_moe", "spark")
EXPERT_ROLES = (Role.EXPERT_UP, Role.EXPERT_DOWN)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor: where the engine puts it, and what it takes."""

    name: str
    role: Role
    type: GgmlType
    i_layer: int | None
    """Its layer; None for the embedding and the output."""
    n_bytes: int


@dataclass(slots=True)
class LayerBytes:
    """What a block of the file holds."""

    experts: int = 0
    """Routed experts, which may stay in main memory."""
    rest: int = 0
    experts_read: int = 0
    """Of the experts, what one token reads."""


@dataclass(frozen=True)
class ModelShape:
    """Everything about a model that its memory and speed depend on."""

    name: str
    """What a person wrote as MODEL, for commands that are suggested."""
    arch: HybridArch
    tensors: tuple[PlannedTensor, ...]
    n_params: int
    """Numbers in the model before padding."""
    recipe: str | None = None
    """The recipe that is to make the file; None where there is a file."""
    path: Path | None = None
    """The file, where there is one."""
    repository: str | None = None
    """Where the model is published, for suggestions."""

    @cached_property
    def weights_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.weights_bytes / max(1, self.n_params)

    @property
    def fewest_bits(self) -> float:
        """Bits per weight of the type that has the fewest."""
        return min(tensor.type.bpw for tensor in self.tensors)

    @cached_property
    def layers(self) -> tuple[LayerBytes, ...]:
        """What each block holds, those of the MTP head included."""
        arch = self.arch
        layers = [LayerBytes() for _ in range(arch.n_layer_all)]
        for tensor in self.tensors:
            if tensor.i_layer is None:
                continue
            layer = layers[tensor.i_layer]
            if tensor.role in EXPERT_ROLES:
                n_used = arch.n_expert_used_at(tensor.i_layer)
                layer.experts += tensor.n_bytes
                layer.experts_read += tensor.n_bytes * n_used // arch.n_expert
            else:
                layer.rest += tensor.n_bytes
        return tuple(layers)

    @cached_property
    def embedding_bytes(self) -> int:
        """Bytes of the embedding, which stays in main memory."""
        return sum(t.n_bytes for t in self.tensors if t.role is Role.EMBEDDING)

    @cached_property
    def output_bytes(self) -> int:
        """Bytes of the output and its norm; those of the embedding where both are one."""
        blocks = sum(layer.experts + layer.rest for layer in self.layers)
        return self.weights_bytes - blocks - self.embedding_bytes

    @cached_property
    def largest_expert_bytes(self) -> int:
        """Bytes of the largest stack of experts: what is copied to evaluate it elsewhere."""
        return max((t.n_bytes for t in self.tensors if t.role in EXPERT_ROLES), default=0)


def shape_of_gguf(name: str, gguf: GgufFile) -> ModelShape:
    """The shape of a file, or of a header without its data."""
    tensors = [(t.name, t.type, t.n_bytes) for t in gguf.tensors.values()]
    source = gguf.find("nanorun.source.repository", str) or ""
    return ModelShape(
        name, arch_from_gguf(gguf), _planned(tensors), gguf.n_params, path=gguf.path,
        repository=source if "/" in source else None,
    )  # fmt: skip


def shape_of_recipe(
    name: str, arch: HybridArch, recipe: str, repository: str | None = None
) -> ModelShape:
    """The shape that a recipe would give a model of `arch`, padding included.

    Raises:
        UsageError: If there is no such recipe, or it does not fit the model's rows.
    """
    # For a file none of it is needed, and answers to `run` should not wait for numpy.
    from nanorun_quant.fit import fit_recipe
    from nanorun_quant.recipe_names import recipe_by_name

    def again(recipe: str, **_: object) -> str:
        return shlex.join(["nanorun", "plan", name, "--recipe", recipe])

    fit = fit_recipe(recipe_by_name(recipe), arch, again=again)
    types = {name: given.type for name, given in fit.assignments.items()}
    tensors = [(s.name, types[s.name], tensor_bytes(s, types[s.name])) for s in fit.specs]
    return ModelShape(
        name, fit.arch, _planned(tensors), fit.n_params, recipe=recipe, repository=repository
    )


def shapes_of_recipes(
    name: str, arch: HybridArch, repository: str | None = None
) -> list[ModelShape]:
    """The shapes that nanorun's own recipes give, the largest first."""
    from nanorun_quant.recipes import RECIPES

    shapes = [shape_of_recipe(name, arch, r, repository) for r in RECIPES if r not in _NOT_CHOSEN]
    shapes.sort(key=lambda shape: -shape.weights_bytes)
    return shapes


def _planned(tensors: Iterable[tuple[str, GgmlType, int]]) -> tuple[PlannedTensor, ...]:
    planned: list[PlannedTensor] = []
    for name, type_, n_bytes in tensors:
        block = _BLOCK.match(name)
        i_layer = int(block[1]) if block else None
        planned.append(PlannedTensor(name, role_of(name), type_, i_layer, n_bytes))
    return tuple(planned)
