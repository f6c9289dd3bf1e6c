from __future__ import annotations

import pytest

from nanorun.errors import UsageError
from nanorun.model.units import format_gib, parse_count, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("1000", 1000),
        ("0", 0),
        ("16GiB", 16 * 2**30),
        ("14.6GB", 14_600_000_000),
        ("512MiB", 512 * 2**20),
        ("512mb", 512_000_000),
        ("24G", 24 * 2**30),
        (" 1.5 KiB ", 1536),
        ("2TiB", 2 * 2**40),
        ("9007199254740993", 9007199254740993),
        ("10B", 10),
    ],
)
def test_parse_size_reads_units(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "nan", "16 GiBs", "1,5GB", "१GB", "0x10"])
def test_parse_size_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "n_tokens"), [("8192", 8192), ("256k", 262144), ("1M", 1048576), ("0.5m", 524288)]
)
def test_parse_count_is_binary(text: str, n_tokens: int) -> None:
    assert parse_count(text) == n_tokens


@pytest.mark.parametrize("text", ["0", "max", "1.5", "-4k", "1G", "k", ""])
def test_parse_count_refuses_what_is_no_count(text: str) -> None:
    with pytest.raises(UsageError, match="not a number of tokens"):
        parse_count(text)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (6144, "6.0 KiB"),
        (49_930_240, "47.6 MiB"),
        (24_507_000_000, "22.8 GiB"),
        (2**30 - 1, "1.0 GiB"),
        (3 * 2**40, "3.0 TiB"),
    ],
)
def test_format_gib_picks_the_unit(n_bytes: int, text: str) -> None:
    assert format_gib(n_bytes) == text


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("30s", 30), ("5m", 300), ("1.5h", 5400), ("1d", 86400)]
)
def test_parse_duration_reads_units(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5m", "5 years"])
def test_parse_duration_refuses_what_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="not a duration"):
        parse_duration(text)
