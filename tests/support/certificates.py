"""Certificates that are made when they are needed."""

from __future__ import annotations

import subprocess
from pathlib import Path

_MAKE = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for localhost that signed itself, and its key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    files = ["-subj", "/CN=localhost", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*_MAKE.split(), *files], check=True, capture_output=True)
    return cert, key
