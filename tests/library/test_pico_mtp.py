"""pico with its multi-token prediction head: whole, as trained in the engine, and useful."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanorun.library.bundled import BUNDLED_MODELS
from nanorun_converters.convert import ConvertOptions, convert
from tests.converters.mtp_reference import EngineHead
from tests.converters.transformers_reference import mean_kl

SCRIPTS = Path(__file__).parents[2] / "scripts"
PICO, PICO_MTP = (BUNDLED_MODELS[name].folders[0] for name in ("pico", "pico-mtp"))


@pytest.fixture(scope="module")
def trainer() -> Any:
    """The script that trained the head."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import train_pico_mtp
    finally:
        sys.path.remove(str(SCRIPTS))
    return train_pico_mtp


@pytest.fixture(scope="module")
def pico(trainer: Any) -> Any:
    return trainer.Pico.load(PICO)


@pytest.fixture(scope="module")
def conversations(trainer: Any, pico: Any) -> list[tuple[list[int], list[bool]]]:
    """Tokens of conversations drawn for these tests, and which of them the assistant says."""
    import train_pico

    rng = random.Random("tests of the head")
    drawn = [trainer.tool_use(rng, i % 2 == 0) for i in range(4)]
    drawn += [trainer.draw(rng, trainer.EVERYTHING) for _ in range(10)]
    return [
        train_pico.encode(pico.tokenizer, pico.renderer, conversation) for conversation in drawn
    ]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pico-mtp") / "pico-mtp-f32.gguf"
    convert(BUNDLED_MODELS["pico-mtp"], ConvertOptions(out=path, recipe="f32"))
    return path


def test_only_the_head_differs_from_pico() -> None:
    config, of_pico = (
        json.loads((folder / "config.json").read_text()) for folder in (PICO_MTP, PICO)
    )
    assert config == of_pico | {
        "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": "*E",
    }
    index = json.loads((PICO_MTP / "model.safetensors.index.json").read_text())["weight_map"]
    of_head = {name for name, file in index.items() if file == "mtp.safetensors"}
    assert of_head == {name for name in index if name.startswith("mtp.")}
    assert sum(path.stat().st_size for path in PICO_MTP.iterdir()) < 4e6


def test_head_in_the_engine_computes_what_was_trained(
    trainer: Any, pico: Any, conversations: list[tuple[list[int], list[bool]]], gguf: Path
) -> None:
    import torch

    head = trainer.load_head(PICO_MTP)
    tokens, _ = conversations[0]
    drafts = [100, 200]
    with torch.no_grad():
        outputs = head(*pico.states(torch.tensor([tokens + drafts])), n_draft=3)
        logits = [np.asarray(pico.model.lm_head(output)[0]) for output in outputs]
    n = len(tokens)
    with EngineHead(gguf, n + 2) as engine:
        assert mean_kl(logits[0][:n], engine.logits(tokens)[1]) < 1e-6
        expected = np.stack([logits[depth][n - 1 + depth] for depth in range(3)])
        assert mean_kl(expected, engine.draft_logits(tokens, drafts)) < 1e-6


def test_head_agrees_with_the_trunk(
    conversations: list[tuple[list[int], list[bool]]], gguf: Path
) -> None:
    n_said = n_agreed = 0
    with EngineHead(gguf, max(len(tokens) for tokens, _ in conversations)) as engine:
        for tokens, said in conversations:
            of_trunk, of_head = engine.logits(tokens)
            # Row k foretells token k + 1.
            agreed = (of_trunk.argmax(-1) == of_head.argmax(-1))[:-1][said[1:]]
            n_said += agreed.size
            n_agreed += agreed.sum()
    assert n_said > 300
    assert n_agreed / n_said > 0.65
