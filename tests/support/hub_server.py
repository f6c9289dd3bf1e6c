"""A Hub on loopback: the routes that matter, ranges, a storage elsewhere, and faults on demand."""

from __future__ import annotations

import hashlib
import json
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "nvidia/Tiny"
TOKEN = "hf_secret"


@dataclass
class FakeHub:
    """What the servers hold and what they were asked."""

    folder: Path
    lfs: tuple[str, ...] = (".safetensors", "tokenizer.json")
    faults: dict[str, float] = field(default_factory=dict)
    """Fault to how often it strikes: 429, 500, reset, short, less, expired."""
    token: str = ""
    """Required, if set."""
    damaged: str = ""
    """File whose content is not what its hash says."""
    requests: Counter[str] = field(default_factory=Counter)
    n_bytes_sent: int = 0
    leaked: list[str] = field(default_factory=list)
    """Tokens that the storage was shown, which is none of its business."""
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    lock: threading.Lock = field(default_factory=threading.Lock)
    endpoint: str = ""
    storage: str = ""

    def content(self, name: str) -> bytes | None:
        path = self.folder / name
        if "/" in name or not path.is_file():
            return None
        raw = path.read_bytes()
        return raw[:-1] + bytes([raw[-1] ^ 1]) if name == self.damaged else raw

    def fault(self) -> str | None:
        with self.lock:
            for name, share in self.faults.items():
                if self.rng.random() < share:
                    return name
        return None

    def info(self) -> dict[str, object]:
        return {
            "id": REPOSITORY,
            "sha": COMMIT,
            "siblings": [self.sibling(p) for p in sorted(self.folder.iterdir()) if p.is_file()],
        }

    def sibling(self, path: Path) -> dict[str, object]:
        raw = path.read_bytes()
        blob = hashlib.sha1(f"blob {len(raw)}\0".encode() + raw).hexdigest()
        entry: dict[str, object] = {"rfilename": path.name, "size": len(raw), "blobId": blob}
        if path.name.endswith(self.lfs):
            digest = hashlib.sha256(raw).hexdigest()
            entry["lfs"] = {"sha256": digest, "size": len(raw), "pointerSize": 130}
        return entry


class Handler(BaseHTTPRequestHandler):
    """The Hub; the storage is the same on another port."""

    protocol_version = "HTTP/1.1"
    hub: FakeHub
    is_storage = False

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        route = "storage" if self.is_storage else path.split("/")[1 if "/api/" in path else 3]
        with self.hub.lock:
            self.hub.requests[f"{self.command} {route}"] += 1
        if self.strike(self.hub.fault()):
            return
        if self.is_storage:
            self.from_storage(path)
        elif path.startswith("/api/models/"):
            self.from_api(path.removeprefix("/api/models/"))
        else:
            self.from_repository(path)

    def strike(self, fault: str | None) -> bool:
        if fault in ("429", "500", "503"):
            self.answer(int(fault), b"busy", {"Retry-After": "0"} if fault == "429" else {})
        elif fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True
        elif fault == "expired" and self.is_storage:
            self.answer(403, b"expired", {})
        else:
            self.cut = fault in ("short", "less")
            self.cut_is_stated = fault == "less"
            return False
        return True

    def from_api(self, path: str) -> None:
        repository, _, revision = path.partition("/revision/")
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.answer(401, b"{}", {"X-Error-Code": "GatedRepo"})
        elif repository != REPOSITORY:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("", "main", "v1.0", COMMIT):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            body = json.dumps(self.hub.info()).encode()
            self.answer(200, body, {"Content-Type": "application/json"})

    def from_repository(self, path: str) -> None:
        name = path.rsplit("/", 1)[-1]
        content = self.hub.content(name)
        places = [f"/{REPOSITORY}/resolve/{revision}/{name}" for revision in ("main", COMMIT)]
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.answer(401, b"", {"X-Error-Code": "GatedRepo"})
        elif content is None or path not in places:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif name.endswith(self.hub.lfs):
            digest = hashlib.sha256(content).hexdigest()
            headers = {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            headers["Location"] = f"{self.hub.storage}/{name}?signature=1"
            self.answer(302, b"", headers | {"X-Repo-Commit": COMMIT})
        else:
            self.ranged(content, {"X-Repo-Commit": COMMIT})

    def from_storage(self, path: str) -> None:
        if "Authorization" in self.headers:
            self.hub.leaked.append(self.headers["Authorization"])
        content = self.hub.content(path[1:])
        if content is None:
            self.answer(404, b"", {})
        else:
            self.ranged(content, {})

    def ranged(self, content: bytes, headers: dict[str, str]) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found is None:
            self.answer(200, content, headers)
            return
        first, last = int(found[1]), min(int(found[2]), len(content) - 1)
        if self.cut and self.cut_is_stated:
            last = first + (last - first) // 2
        span = f"bytes {first}-{last}/{len(content)}"
        self.answer(206, content[first : last + 1], headers | {"Content-Range": span})

    cut = False
    cut_is_stated = False

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut and not self.cut_is_stated and status == 206:
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)
        with self.hub.lock:
            self.hub.n_bytes_sent += len(body)


@contextmanager
def serve_hub(folder: Path) -> Iterator[FakeHub]:
    """Serve the files of `folder` as the repository `REPOSITORY`."""
    hub = FakeHub(folder)
    servers = []
    for is_storage in (False, True):
        handler = type("Bound", (Handler,), {"hub": hub, "is_storage": is_storage})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{s.server_address[1]}" for s in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
