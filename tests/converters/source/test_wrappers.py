"""Names of tensors without the wrappers that a model was saved in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nanorun.errors import ModelError
from nanorun_converters.family.config import arch_from_config
from nanorun_converters.source.open import open_source
from nanorun_converters.source.wrappers import unwrapped
from nanorun_converters.tensors.names import plan_tensors
from tests.support.source_models import Tensors, write_source_model

Rename = Callable[[str], str]


def renamed(rename: Rename) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    return edit


def n_planned(folder: Path) -> int:
    source = open_source(folder)
    arch = arch_from_config(source.read_json("config.json"), "config.json")
    return len(plan_tensors(source, arch))


WRAPPED: dict[str, Rename] = {
    "module.": lambda name: f"module.{name}",
    "module.module.": lambda name: f"module.module.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "compiled part": lambda name: name.replace("backbone.", "backbone._orig_mod."),
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "everything under model.": lambda name: f"model.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "mamba's embedding": lambda name: name.replace("embeddings.", "embedding."),
    "embed_tokens": lambda name: name.replace("backbone.", "model.").replace(
        "embeddings.", "embed_tokens."
    ),
    "norm": lambda name: name.replace("norm_f.", "norm."),
    "model. and model.lm_head": lambda name: f"model.{name.removeprefix('backbone.')}",
}


@pytest.mark.parametrize("how", WRAPPED)
def test_known_spellings_of_a_name_are_understood(how: str, tmp_path: Path) -> None:
    plain = write_source_model(tmp_path / "plain")
    wrapped = write_source_model(tmp_path / "wrapped", edit=renamed(WRAPPED[how]))
    assert n_planned(wrapped) == n_planned(plain)


def test_error_calls_a_tensor_what_its_file_calls_it(tmp_path: Path) -> None:
    folder = write_source_model(tmp_path, edit=renamed(WRAPPED["module."]))
    assert open_source(folder).tensors["lm_head.weight"].name == "module.lm_head.weight"


def test_tensor_that_is_there_with_and_without_a_wrapper_is_refused(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["module.lm_head.weight"] = tensors["lm_head.weight"]

    with pytest.raises(ModelError, match=r"'module\.lm_head\.weight' are one tensor twice"):
        open_source(write_source_model(tmp_path, edit=edit))


@pytest.mark.parametrize("name", ["model.layers.0.norm.weight", "model.language_model.x", "module"])
def test_name_of_the_model_itself_stays(name: str) -> None:
    assert unwrapped(name) == name


def test_buffers_are_passed_over(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["backbone.layers.2.mixer.rotary_emb.inv_freq"] = tensors["backbone.norm_f.weight"]
        tensors["backbone.rotary_emb.inv_freq"] = tensors["backbone.norm_f.weight"]

    assert n_planned(write_source_model(tmp_path / "b", edit=edit)) == n_planned(
        write_source_model(tmp_path / "a")
    )


def test_missing_tensor_is_named_with_the_nearest_there_are(tmp_path: Path) -> None:
    rename = renamed(lambda name: name.replace("q_proj", "query_proj"))
    with pytest.raises(ModelError, match="found no such tensor") as caught:
        n_planned(write_source_model(tmp_path, edit=rename))
    assert "backbone.layers.2.mixer.query_proj.weight" in caught.value.facts[0]


def test_missing_embedding_is_named_with_the_nearest_there_are(tmp_path: Path) -> None:
    rename = renamed(lambda name: name.replace("embeddings.", "embeds."))
    with pytest.raises(ModelError, match="found no such tensor") as caught:
        n_planned(write_source_model(tmp_path, edit=rename))
    assert "backbone.embeds.weight" in caught.value.facts[0]


def test_adapter_that_is_not_merged_is_called_one(tmp_path: Path) -> None:
    rename = renamed(lambda name: name.replace("q_proj.", "q_proj.base_layer."))
    with pytest.raises(ModelError, match=r"an adapter \(LoRA\) that is not merged") as caught:
        n_planned(write_source_model(tmp_path, edit=rename))
    assert "merge_and_unload" in caught.value.tries[0]
    assert caught.value.tries[1] == f"nanorun convert {tmp_path}-merged"
