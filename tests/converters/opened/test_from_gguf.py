"""A GGUF as the source: the tensors of the model it was made of, and metadata carried over."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanorun.errors import ModelError
from nanorun.model.gguf import GgufFile, read_gguf
from nanorun.model.gguf_arch import arch_from_gguf
from nanorun.model.tensor_roles import check_tensors
from nanorun_converters.convert import ConvertOptions, convert
from tests.converters.transformers_reference import engine_logits
from tests.model.known_archs import TINY_DENSE, TINY_LATENT_MTP, TINY_MOE
from tests.support.builders import Tensor, arch_tensors, gguf_metadata, write_gguf
from tests.support.source_models import write_source_model


def converted(source: Path, out: Path, **options: object) -> GgufFile:
    convert(source, ConvertOptions(out=out, **options))  # type: ignore[arg-type]
    return read_gguf(out)


def data_of(gguf: GgufFile) -> bytes:
    return gguf.path.read_bytes()[gguf.data_offset :]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source_model(tmp_path / "source", mtp=True)


@pytest.mark.parametrize("recipe", ["q8_0", "q4_0", "mxfp4", "f32"])
@pytest.mark.parametrize("between", ["bf16", "f32"])
def test_two_steps_give_the_tensors_of_one(
    recipe: str, between: str, source: Path, tmp_path: Path
) -> None:
    converted(source, tmp_path / "between.gguf", recipe=between)
    two = converted(tmp_path / "between.gguf", tmp_path / "two.gguf", recipe=recipe)
    one = converted(source, tmp_path / "one.gguf", recipe=recipe)
    assert data_of(two) == data_of(one)
    engine_logits(two.path, [40, 41])


def test_metadata_is_carried_over_but_for_what_changed(source: Path, tmp_path: Path) -> None:
    before = converted(source, tmp_path / "before.gguf", recipe="bf16").metadata
    after = converted(tmp_path / "before.gguf", tmp_path / "after.gguf", recipe="q4_0").metadata
    changed = {key for key in before if after.get(key) != before[key]}
    assert changed == {
        "general.file_type", "nanorun.recipe", "nanorun.source.files", "nanorun.source.sha256",
        "nanorun.bytes_by_role",
    }  # fmt: skip
    assert after["nanorun.source.files"] == ["before.gguf"]
    assert after.keys() == before.keys()


def test_padding_is_not_forgotten(tmp_path: Path) -> None:
    source = write_source_model(tmp_path / "source")
    before = converted(source, tmp_path / "before.gguf", recipe="bf16", pad="always").metadata
    after = converted(tmp_path / "before.gguf", tmp_path / "after.gguf", recipe="q8_0").metadata
    assert before["nanorun.padding"]
    assert after["nanorun.padding"] == before["nanorun.padding"]


@pytest.mark.parametrize("arch", [TINY_MOE, TINY_LATENT_MTP, TINY_DENSE])
def test_file_of_another_converter_is_taken(arch: object, tmp_path: Path) -> None:
    kv = gguf_metadata(arch) | {"general.name": "other", "general.author": "someone"}  # type: ignore[arg-type]
    write_gguf(tmp_path / "other.gguf", kv, arch_tensors(arch))  # type: ignore[arg-type]
    gguf = converted(tmp_path / "other.gguf", tmp_path / "out.gguf")
    assert arch_from_gguf(gguf) == arch
    check_tensors(gguf, arch)  # type: ignore[arg-type]
    assert gguf.metadata["general.author"] == "someone"
    assert gguf.metadata["nanorun.source.repository"] == "other"


def test_biases_come_along(tmp_path: Path) -> None:
    tensors = arch_tensors(TINY_DENSE)
    bias = Tensor("blk.1.ffn_up.bias", 0, (TINY_DENSE.n_ff,))
    write_gguf(tmp_path / "a.gguf", gguf_metadata(TINY_DENSE), [*tensors, bias])
    gguf = converted(tmp_path / "a.gguf", tmp_path / "out.gguf")
    assert "blk.1.ffn_up.bias" in gguf.tensors
    check_tensors(gguf, TINY_DENSE)


def test_split_file_is_read_whole(source: Path, tmp_path: Path) -> None:
    converted_whole = converted(source, tmp_path / "whole.gguf", recipe="bf16")
    convert(source, ConvertOptions(out=tmp_path / "m.gguf", recipe="bf16", split_max_bytes=200_000))
    first = next(tmp_path.glob("m-00001-of-*.gguf"))
    gguf = converted(first, tmp_path / "out.gguf", recipe="q8_0")
    assert list(gguf.tensors) == list(converted_whole.tensors)
    assert not [key for key in gguf.metadata if key.startswith("split.")]
    assert data_of(gguf) == data_of(converted(source, tmp_path / "one.gguf", recipe="q8_0"))
    second = next(tmp_path.glob("m-00002-of-*.gguf"))
    with pytest.raises(ModelError, match="is file 2 of the"):
        convert(second, ConvertOptions(out=tmp_path / "no.gguf"))


def test_no_mtp_works_on_a_gguf_too(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "between.gguf", recipe="bf16")
    two = converted(tmp_path / "between.gguf", tmp_path / "two.gguf", keep_mtp=False)
    one = converted(source, tmp_path / "one.gguf", keep_mtp=False)
    assert data_of(two) == data_of(one)
    assert arch_from_gguf(two).n_layer_nextn == 0


def test_quantized_file_is_refused_by_tensor(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "q.gguf", recipe="q8_0")
    with pytest.raises(ModelError, match=r"token_embd\.weight': expected f32, .* found q8_0"):
        convert(tmp_path / "q.gguf", ConvertOptions(out=tmp_path / "out.gguf"))


def test_resumed_conversion_of_a_gguf_is_that_of_the_same_file(
    source: Path, tmp_path: Path
) -> None:
    converted(source, tmp_path / "between.gguf", recipe="bf16")
    out = tmp_path / "out.gguf"

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "between.gguf", ConvertOptions(out=out), stop)
    assert convert(tmp_path / "between.gguf", ConvertOptions(out=out)).resumed
