from __future__ import annotations

import shutil
import ssl
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Live
from tests.support.certificates import certificate


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes certificates")
def test_endpoint_answers_over_tls(live: Callable[..., Live], tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "one")
    url = live(tls_cert=cert, tls_key=key).url.replace("http://127.0.0.1", "https://localhost")
    trust = ssl.create_default_context(cafile=str(cert))
    trust.check_hostname = False
    assert httpx.get(f"{url}/models", verify=trust).status_code == 200
