"""Pages in a real browser: which of them can ask the endpoint, and which can read its answers.

Needs Chromium (Debian: `apt-get install chromium`), on PATH or named by CHROMIUM. Names of other
sites are mapped to this machine, so nothing leaves it.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Live
from tests.support.fakes import reply
from tests.support.waiting import PATIENCE_S

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium on PATH (CHROMIUM=...)")

Start = Callable[..., Live]
CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "x"}], "stream": True}
SCRIPT = """
const shown = text => { document.body.textContent = text; };
fetch(URL, OPTIONS)
  .then(async answer => shown(`${answer.type} ${answer.status} ${await answer.text()}`))
  .catch(error => shown(`blocked ${error.name}`));
"""


@dataclass
class Pages:
    """A web site, and a browser that opens it."""

    port: int
    folder: Path
    html: dict[str, str] = field(default_factory=dict)

    def origin(self, host: str) -> str:
        return f"http://{host}:{self.port}"

    def fetched(self, host: str, url: str, **options: Any) -> str:
        """What a page of a site gets of an address."""
        script = SCRIPT.replace("URL", json.dumps(url)).replace("OPTIONS", json.dumps(options))
        self.html["/page"] = f"<!doctype html><body>nothing yet<script>{script}</script></body>"
        return self.opened(f"{self.origin(host)}/page")

    def opened(self, url: str) -> str:
        """The text of a page, once its scripts are done."""
        assert CHROMIUM is not None
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-proxy-server",
            "--no-first-run", "--disable-background-networking",
            "--host-resolver-rules=MAP *.example 127.0.0.1, EXCLUDE 127.0.0.1",
            f"--user-data-dir={self.folder}", "--virtual-time-budget=60000", "--dump-dom", url,
        ]  # fmt: skip
        ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert ran.returncode == 0, ran.stderr
        body = re.sub(r"<script>.*?</script>", "", ran.stdout, flags=re.DOTALL)
        return html.unescape(re.sub(r"<[^>]*>", "", body)).strip()


@pytest.fixture
def pages(tmp_path: Path) -> Iterator[Pages]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = site.html.get(self.path)
            self.send_response(404 if page is None else 200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write((page or "").encode())

        def log_message(self, *_args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        site = Pages(server.server_port, tmp_path / "profile")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield site
        server.shutdown()
        thread.join(PATIENCE_S)


def asked(**headers: str) -> dict[str, Any]:
    """What a chat in a page gives to `fetch`."""
    headers = {"content-type": "application/json", **headers}
    return {"method": "POST", "headers": headers, "body": json.dumps(BODY)}


def chat_url(endpoint: Live) -> str:
    return f"http://127.0.0.1:{endpoint.url.split(':')[2].split('/')[0]}{CHAT}"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1"])
def test_page_whose_origin_is_not_allowed_reads_nothing(
    live: Start, pages: Pages, host: str
) -> None:
    endpoint = live(reply("answerword"))
    assert pages.fetched(host, chat_url(endpoint), **asked()) == "blocked TypeError"
    assert endpoint.client.requests == []  # the preflight was refused


def test_page_of_elsewhere_asks_nothing_even_where_the_browser_asks_no_preflight(
    live: Start, pages: Pages
) -> None:
    endpoint = live(reply("answerword"))
    simple = {"method": "POST", "mode": "no-cors", "body": json.dumps(BODY)}
    assert pages.fetched("evil.example", chat_url(endpoint), **simple) == "blocked TypeError"
    assert endpoint.client.requests == []
    # The browser did send it.
    figures = httpx.get(chat_url(endpoint).replace(CHAT, "/metrics")).text
    assert 'nanorun_requests_total{method="POST",route="other",status="403"} 1.0' in figures


def test_name_that_was_made_to_point_here_is_refused(live: Start, pages: Pages) -> None:
    endpoint = live(reply("answerword"))
    url = chat_url(endpoint).replace("127.0.0.1", "rebound.example").replace(CHAT, "/v1/models")
    told = pages.opened(url)
    assert "rebound.example" in told and "is not a name of this endpoint" in told
    assert "owned_by" not in told


def test_page_whose_origin_is_allowed_reads_the_stream(live: Start, pages: Pages) -> None:
    endpoint = live(reply("answerword"), allow_origins=(pages.origin("app.example"),))
    text = pages.fetched("app.example", chat_url(endpoint), **asked())
    assert text.startswith("cors 200 ") and "answerword" in text and text.endswith("data: [DONE]")
    assert pages.fetched("evil.example", chat_url(endpoint), **asked()) == "blocked TypeError"
    assert len(endpoint.client.requests) == 1


@pytest.mark.parametrize(
    ("headers", "status", "word"),
    [
        ({}, 401, "invalid_api_key"),
        ({"authorization": "Bearer wrong"}, 401, "invalid_api_key"),
        ({"authorization": "Bearer right"}, 200, "answerword"),
        ({"x-api-key": "right"}, 200, "answerword"),
    ],
)
def test_page_needs_a_key_beyond_loopback(
    live: Start, pages: Pages, headers: dict[str, str], status: int, word: str
) -> None:
    origin = pages.origin("app.example")
    endpoint = live(
        reply("answerword"), host="0.0.0.0", api_keys=("right",), allow_origins=(origin,)
    )
    text = pages.fetched("app.example", chat_url(endpoint), **asked(**headers))
    assert text.startswith(f"cors {status} ") and word in text
    assert len(endpoint.client.requests) == (status == 200)
