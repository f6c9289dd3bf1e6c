from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nanorun.model.arch import HybridArch
from nanorun.model.footprint import (
    kv_bytes,
    kv_bytes_per_token,
    mtp_kv_bytes,
    state_bytes,
    tensor_bytes,
    weights_bytes,
)
from nanorun.model.ggml_type import GgmlType
from nanorun.model.gguf import read_gguf
from nanorun.model.tensor_roles import expected_tensors
from tests.model.known_archs import LIGHTNING, NANO, NANO_4B, SUPER, SUPER_TRUNK, TINY_MOE
from tests.support.builders import arch_tensors, gguf_metadata, write_gguf

MIB = 2**20
F16, Q8_0, Q4_0 = GgmlType.F16, GgmlType.Q8_0, GgmlType.Q4_0


# What llama.cpp reports for the released models (reference: engine.md section 5).
@pytest.mark.parametrize(
    ("arch", "n"),
    [(NANO, 31_577_940_288), (SUPER_TRUNK, 120_668_707_840), (NANO_4B, 3_973_556_832)],
)
def test_parameters_of_released_models(arch: HybridArch, n: int) -> None:
    assert sum(s.n_elements for s in expected_tensors(arch).values()) == n


@pytest.mark.parametrize(
    ("arch", "type_", "n_bytes"),
    [
        (NANO, F16, 6144),
        (NANO, Q8_0, 3264),
        (NANO, Q4_0, 1728),
        (SUPER, F16, 8192),
        (SUPER, Q8_0, 4352),
        (SUPER, Q4_0, 2304),
        (NANO_4B, F16, 16384),
    ],
)
def test_kv_bytes_per_token(arch: HybridArch, type_: GgmlType, n_bytes: int) -> None:
    assert kv_bytes_per_token(arch, type_, type_) == n_bytes


def test_k_and_v_may_have_types_of_their_own() -> None:
    assert kv_bytes_per_token(NANO, F16, Q4_0) == (6144 + 1728) // 2


def test_kv_cache_of_a_million_tokens() -> None:
    assert kv_bytes(NANO, 1048576) == 6144 * MIB
    assert kv_bytes(NANO, 1048576, Q4_0, Q4_0) == 1728 * MIB


def test_kv_cache_is_padded_to_256_tokens() -> None:
    assert kv_bytes(NANO, 1) == kv_bytes(NANO, 256) == 256 * 6144
    assert kv_bytes(NANO, 257) == 512 * 6144


@pytest.mark.parametrize(("type_", "n_bytes"), [(F16, 1024), (Q8_0, 544), (Q4_0, 288)])
def test_mtp_context_keeps_one_layer(type_: GgmlType, n_bytes: int) -> None:
    assert mtp_kv_bytes(LIGHTNING, 131072, type_, type_) == 131072 * n_bytes
    assert mtp_kv_bytes(NANO, 131072, type_, type_) == 0


def test_state_is_per_sequence_and_per_rollback_plane() -> None:
    assert state_bytes(NANO) == 49_930_240
    assert state_bytes(NANO, n_seq_max=16) == 16 * 49_930_240
    assert state_bytes(NANO, n_rs_seq=3) == 4 * 49_930_240
    assert state_bytes(NANO, n_seq_max=2, n_rs_seq=1) == 4 * 49_930_240


@pytest.mark.parametrize(
    ("arch", "mib"),
    [
        (SUPER, 164.69),
        (NANO_4B, 81.09),
        (replace(SUPER, ssm_d_state=96), 124.45),
    ],
)
def test_state_of_other_models(arch: HybridArch, mib: float) -> None:
    assert state_bytes(arch) / MIB == pytest.approx(mib, abs=0.005)


def test_weights_of_a_file_and_of_a_plan_agree(tmp_path: Path) -> None:
    tensors = arch_tensors(TINY_MOE, Q8_0)
    path = write_gguf(tmp_path / "m.gguf", gguf_metadata(TINY_MOE), tensors)
    types = {str(t.name): GgmlType(t.type) for t in tensors}
    specs = expected_tensors(TINY_MOE).values()
    planned = sum(tensor_bytes(s, types[s.name]) for s in specs)
    assert weights_bytes(read_gguf(path)) == planned
    # 8.5 bits of everything that may be quantized, 32 of the rest
    n_q8 = sum(s.n_elements for s in specs if s.quantizable)
    assert planned == n_q8 * 34 // 32 + 4 * (sum(s.n_elements for s in specs) - n_q8)


def test_nano_in_q8_0_has_the_published_size() -> None:
    specs = expected_tensors(NANO).values()
    n_bytes = sum(tensor_bytes(s, Q8_0 if s.quantizable else GgmlType.F32) for s in specs)
    assert n_bytes / 1e9 == pytest.approx(33.578, abs=0.001)


def test_types_that_do_not_divide_a_row_have_no_size() -> None:
    spec = expected_tensors(NANO)["token_embd.weight"]
    with pytest.raises(ValueError, match="which do not divide a row of 2688"):
        tensor_bytes(spec, GgmlType.Q4_K)
