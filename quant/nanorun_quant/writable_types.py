"""The types that nanorun can write, and which of them look at an imatrix; as data, without ggml."""

from __future__ import annotations

from nanorun.model.ggml_type import GgmlType

QUANTIZERS = (
    GgmlType.F32,
    GgmlType.F16,
    GgmlType.BF16,
    GgmlType.Q8_0,
    GgmlType.Q6_K,
    GgmlType.Q5_1,
    GgmlType.Q5_K,
    GgmlType.Q5_0,
    GgmlType.Q4_1,
    GgmlType.Q4_K,
    GgmlType.Q4_0,
    GgmlType.IQ4_NL,
    GgmlType.NVFP4,
    GgmlType.IQ4_XS,
    GgmlType.MXFP4,
    GgmlType.IQ3_S,
    GgmlType.Q3_K,
    GgmlType.IQ3_XXS,
    GgmlType.Q2_K,
    GgmlType.IQ2_S,
    GgmlType.IQ2_XS,
    GgmlType.Q2_0,
    GgmlType.IQ2_XXS,
)
"""Types that can be written, from most bits to fewest. Those below two bits are left out: they are
under every role's floor."""

NEED_IMATRIX = frozenset(
    (
        GgmlType.IQ3_XXS,
        GgmlType.IQ2_S,
        GgmlType.IQ2_XS,
        GgmlType.IQ2_XXS,
    )
)
"""Types that give nothing useful without an imatrix: llama.cpp's `tensor_requires_imatrix`. For
some of them ggml aborts the process."""

USE_NO_IMATRIX = frozenset(
    (GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0, GgmlType.MXFP4, GgmlType.NVFP4)
)
"""Types whose quantizers do not look at one."""
