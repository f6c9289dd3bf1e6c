"""Error feedback against a slow reference, and what it is worth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nanorun.errors import ModelError
from nanorun.model.ggml_type import GgmlType
from nanorun_quant.encode import Encoder, powers
from nanorun_quant.feedback import DAMPING, Feedback, Feedbacks
from nanorun_quant.ggml import load_ggml
from nanorun_quant.imatrix import Entry, Imatrix, gram_name
from nanorun_quant.imatrix_file import read_imatrix, write_imatrix

ENCODER = Encoder(load_ggml())
UP = "blk.1.ffn_up_shexp.weight"


def inputs_that_go_together(n: int, n_inputs: int = 4000) -> np.ndarray:
    rng = np.random.default_rng(1)
    mixed = rng.normal(size=(n_inputs, n // 4)) @ rng.normal(size=(n // 4, n))
    return (mixed + rng.normal(size=(n_inputs, n))).astype(np.float32)


def gram_of(inputs: np.ndarray) -> np.ndarray:
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


def weights(n_rows: int, n: int) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(n_rows, n)).astype(np.float32)


def optimal_brain_quantization(rows: np.ndarray, gram: np.ndarray, type_: GgmlType) -> np.ndarray:
    """Encode a block, spread its error over all columns after it as is best for the output, go on:
    equation 3 of the GPTQ paper, the inverse Hessian made anew for every block."""
    n, size = len(gram), type_.block_size
    hessian = gram.astype(np.float64)
    hessian[np.diag_indices(n)] += DAMPING * np.trace(hessian) / n
    left = rows.astype(np.float64)
    found = np.empty_like(left)
    for start in range(0, n, size):
        inverse = np.linalg.inv(hessian[start:, start:])
        block = np.ascontiguousarray(left[:, start : start + size], np.float32)
        raw = ENCODER.encode(block, type_)
        found[:, start : start + size] = load_ggml().dequantize(raw, type_, size)
        error = left[:, start : start + size] - found[:, start : start + size]
        left[:, start:] -= error @ np.linalg.inv(inverse[:size, :size]) @ inverse[:size]
    return found


@pytest.mark.parametrize("type_", [GgmlType.Q4_0, GgmlType.Q8_0, GgmlType.Q2_0])
def test_it_is_optimal_brain_quantization_block_by_block(type_: GgmlType) -> None:
    gram, rows = gram_of(inputs_that_go_together(192)), weights(6, 192)
    raw = ENCODER.encode(rows, type_, None, Feedback(gram, 192))
    found = load_ggml().dequantize(raw, type_, 192)
    expected = optimal_brain_quantization(rows, gram, type_)
    # A number that lies between two levels may fall to the other one.
    assert np.mean(np.abs(found - expected) < 1e-3) > 0.98


@pytest.mark.parametrize(
    "type_",
    [GgmlType.Q2_0, GgmlType.IQ4_NL, GgmlType.Q4_0, GgmlType.Q5_1, GgmlType.MXFP4, GgmlType.Q4_K,
     GgmlType.IQ2_XXS, GgmlType.IQ3_S],
    ids=lambda type_: type_.label,
)  # fmt: skip
def test_the_output_of_inputs_that_go_together_is_nearer(type_: GgmlType) -> None:
    inputs, rows = inputs_that_go_together(768), weights(16, 768)
    feedback = Feedback(gram_of(inputs[:3000]), 768)
    column_weights = np.square(inputs[:3000]).mean(0)
    noise = []
    for given_feedback in (None, feedback):
        raw = ENCODER.encode(rows, type_, column_weights, given_feedback)
        assert raw.shape == (16, type_.row_bytes(768))
        errors = load_ggml().dequantize(raw, type_, 768) - rows
        noise.append(float(np.square(inputs[3000:] @ errors.T).mean()))
    assert noise[1] < 0.75 * noise[0]


@settings(max_examples=30, deadline=None)
@given(
    hnp.arrays(np.float32, (3, 128), elements=st.floats(-100, 100, width=32)),
    hnp.arrays(np.float32, 128, elements=st.floats(0, 10, width=32)),
)
def test_where_nothing_goes_together_nothing_changes(rows: np.ndarray, squares: np.ndarray) -> None:
    feedback = Feedback(np.diag(squares), 128)
    plain = ENCODER.encode(rows, GgmlType.Q5_0)
    np.testing.assert_array_equal(ENCODER.encode(rows, GgmlType.Q5_0, None, feedback), plain)


def test_power_of_rows_is_that_of_their_outputs() -> None:
    inputs, rows = inputs_that_go_together(64), weights(5, 64)
    expected = np.square(inputs @ rows.T).mean(0)
    found = powers(rows, np.ones(64, np.float32), Feedback(gram_of(inputs), 64))
    np.testing.assert_allclose(found, expected, rtol=2 * DAMPING)


def test_padded_columns_take_part_in_nothing() -> None:
    gram, rows = gram_of(inputs_that_go_together(192)), weights(4, 192)
    padded = np.zeros((4, 256), np.float32)
    padded[:, :192] = rows
    narrow = ENCODER.encode(rows, GgmlType.Q4_0, None, Feedback(gram, 192))
    wide = ENCODER.encode(padded, GgmlType.Q4_0, None, Feedback(gram, 256))
    np.testing.assert_array_equal(wide[:, : narrow.shape[1]], narrow)
    zeros = load_ggml().dequantize(wide, GgmlType.Q4_0, 256)[:, 192:]
    assert np.abs(zeros).max() == 0


def test_unquantized_types_have_no_errors_to_make_up_for() -> None:
    rows = weights(4, 64)
    feedback = Feedback(gram_of(inputs_that_go_together(64)), 64)
    raw = ENCODER.encode(rows, GgmlType.F16, None, feedback)
    np.testing.assert_array_equal(raw, ENCODER.encode(rows, GgmlType.F16))


@pytest.mark.parametrize("is_latent", [False, True])
def test_tensors_of_one_input_share_a_gram_matrix(is_latent: bool) -> None:
    def shared(role: str) -> str | None:
        return gram_name(f"blk.7.{role}.weight", is_latent=is_latent)

    assert {shared(role) for role in ("attn_q", "attn_k", "attn_v")} == {"blk.7.attn_q.weight"}
    assert shared("attn_output") == "blk.7.attn_output.weight"
    assert shared("ffn_latent_down") == "blk.7.ffn_up_shexp.weight"
    experts = "ffn_up_exps" if is_latent else "ffn_up_shexp"
    assert shared("ffn_up_exps") == f"blk.7.{experts}.weight"
    assert shared("ffn_down_exps") is None
    assert gram_name("output.weight", is_latent=is_latent) == "output.weight"
    assert gram_name("blk.9.nextn.eh_proj.weight", is_latent=is_latent) is None


def imatrix_with(gram: np.ndarray) -> Imatrix:
    sums = np.ones((1, len(gram)), np.float32)
    return Imatrix({UP: Entry(sums, np.array([2]))}, name="i.gguf", grams={UP: gram})


def test_gram_matrices_come_back_from_a_file_and_can_be_added_to(tmp_path: Path) -> None:
    inputs = inputs_that_go_together(64, 100)
    imatrix = imatrix_with(inputs.T @ inputs)
    write_imatrix(tmp_path / "i.gguf", imatrix)
    found = read_imatrix(tmp_path / "i.gguf")
    np.testing.assert_array_equal(found.grams[UP], imatrix.grams[UP])
    np.testing.assert_array_equal(found.gram(UP, 64), imatrix.grams[UP] / 2)
    for _ in range(2):
        found.add_gram(UP, inputs)
    np.testing.assert_allclose(found.grams[UP], 3 * imatrix.grams[UP], rtol=1e-4, atol=1e-2)
    np.testing.assert_array_equal(read_imatrix(tmp_path / "i.gguf").grams[UP], imatrix.grams[UP])


def test_feedbacks_are_found_by_what_a_tensor_reads() -> None:
    feedbacks = Feedbacks(imatrix_with(np.eye(64, dtype=np.float32)), is_latent=False)
    first = feedbacks.of(UP, 64)
    assert first is not None
    assert feedbacks.of("blk.1.ffn_up_exps.weight", 64) is first
    assert feedbacks.of("blk.1.ffn_down_exps.weight", 64) is None
    assert feedbacks.of("blk.2.ffn_up_exps.weight", 64) is None


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (np.full((64, 64), np.nan, np.float32), "expected finite numbers"),
        (-np.eye(64, dtype=np.float32), "expected a positive definite matrix"),
        (np.eye(32, dtype=np.float32), "expected 64 columns, found 32"),
    ],
)
def test_damaged_gram_matrix_is_refused(gram: np.ndarray, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Feedbacks(imatrix_with(gram), is_latent=False).of(UP, 64)


def test_gram_matrix_that_is_not_square_is_refused(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", imatrix_with(np.ones((64, 32), np.float32)))
    with pytest.raises(ModelError, match="expected a square matrix of f32, found f32 of shape"):
        read_imatrix(tmp_path / "i.gguf")
