from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nanorun.errors import UsageError
from nanorun.server.tls import check_pair
from tests.support.certificates import certificate

needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="makes certificates")


def test_no_files_need_no_check() -> None:
    check_pair(None, None)


def test_one_file_alone_names_the_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--tls-cert needs --tls-key"):
        check_pair(tmp_path, None)
    with pytest.raises(UsageError, match="--tls-key needs --tls-cert"):
        check_pair(None, tmp_path)


def test_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*no\.pem: no such file"):
        check_pair(tmp_path / "no.pem", tmp_path / "no.key")


def test_file_that_is_no_certificate_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pem").write_text("hello")
    with pytest.raises(UsageError, match=r"cannot use .*a\.pem"):
        check_pair(tmp_path / "a.pem", tmp_path / "a.pem")


@needs_openssl
def test_pair_that_belongs_together_is_taken_and_another_is_not(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "one")
    _, other = certificate(tmp_path, "two")
    check_pair(cert, key)
    with pytest.raises(UsageError, match=r"cannot use .*one\.pem with the key .*two\.key"):
        check_pair(cert, other)
