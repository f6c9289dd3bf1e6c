"""The certificate an endpoint shows, checked before anything slow is begun for it."""

from __future__ import annotations

import ssl
from pathlib import Path

from nanorun.errors import UsageError


def check_pair(cert: Path | None, key: Path | None) -> None:
    """Make sure that TLS can be spoken with these files; nothing to check if neither is given.

    Args:
        cert: The certificate, with those between it and its root, as PEM.
        key: Its private key as PEM, without a password.

    Raises:
        UsageError: If one is missing, cannot be read, or does not belong to the other.
    """
    if cert is None and key is None:
        return
    if cert is None or key is None:
        given, missing = (
            ("--tls-key", "--tls-cert") if cert is None else ("--tls-cert", "--tls-key")
        )
        raise UsageError(f"{given} needs {missing} beside it")
    for path in (cert, key):
        _check_readable(path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # An empty password, or OpenSSL would ask for one at the terminal.
        context.load_cert_chain(cert, key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise UsageError(
            f"cannot use {cert} with the key {key}: {error}",
            facts=["both must be PEM, belong together, and the key have no password"],
        ) from error


def _check_readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {(error.strerror or '').lower()}") from error
