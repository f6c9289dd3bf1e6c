"""What the environment says of the network: proxies, the Hub's address, its token.

Every variable is read when it is needed and checked here, so that a value that cannot be meant
is an error that names the variable.
"""

from __future__ import annotations

import ipaddress
import os
import re
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from nanorun.errors import LibraryError, UsageError

DEFAULT_ENDPOINT = "https://huggingface.co"
_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


def proxy_for(url: str) -> str | None:
    """The proxy through which `url` is asked; None for a direct connection.

    HTTP_PROXY, HTTPS_PROXY and ALL_PROXY (in either case) or the system's settings name it.
    NO_PROXY lists hosts, domains, addresses and networks such as `10.0.0.0/8` that need none; nor
    does this machine's loopback, which a proxy cannot reach.

    Raises:
        UsageError: If the variable holds no proxy's address.
    """
    parts = urlsplit(url)
    proxies = getproxies()
    if _needs_none(parts.hostname or "", proxies.get("no", "")):
        return None
    for scheme in (parts.scheme, "all"):
        if address := proxies.get(scheme):
            return _proxy_address(scheme, address)
    return None


def _needs_none(host: str, no_proxy: str) -> bool:
    ip = _network(host)
    if host == "localhost" or (ip is not None and ip.is_loopback):
        return True
    for entry in filter(None, (text.strip().lower() for text in no_proxy.split(","))):
        network = _network(entry)
        if network is not None:
            if ip is not None and ip.version == network.version and ip.network_address in network:
                return True
            continue
        domain = entry.rpartition("://")[2].partition(":")[0].removeprefix("*").removeprefix(".")
        if entry == "*" or (domain and (host == domain or host.endswith(f".{domain}"))):
            return True
    return False


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """The network, or the network of one address, that `text` stands for."""
    try:
        return ipaddress.ip_network(re.sub(r"[\[\]]", "", text), strict=False)
    except ValueError:
        return None


def _proxy_address(scheme: str, address: str) -> str:
    url = address if "://" in address else f"http://{address}"
    parts = _split(url)
    if parts is not None and parts[0] in _PROXY_SCHEMES and parts[1]:
        return url
    name = f"{scheme}_proxy"
    variable = next((key for key in os.environ if key.lower() == name), name)
    raise UsageError(
        f"{variable} is no proxy's address: {without_password(address)!r}",
        facts=["it is of the form http://host:port"],
    )


def _split(url: str) -> tuple[str, str] | None:
    """Scheme and host; None if the port or an IPv6 address is malformed."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises what `urlsplit` lets pass
    except ValueError:
        return None
    return parts.scheme, parts.hostname or ""


def without_password(address: str) -> str:
    """An address without the name and the password that it may hold."""
    return re.sub(r"(//|^)[^/@]*@", r"\1", address)


def hub_endpoint() -> str:
    """The Hub's address: HF_ENDPOINT, or the usual one.

    Raises:
        UsageError: If HF_ENDPOINT is no address.
    """
    endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    has_form = re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", endpoint)
    if has_form is None or not (_split(endpoint) or ("", ""))[1]:
        raise UsageError(
            f"HF_ENDPOINT is no address: {without_password(endpoint)!r}",
            facts=[f"it starts with https://, as {DEFAULT_ENDPOINT} does"],
        )
    return endpoint


def is_at_hub(url: str, endpoint: str) -> bool:
    """Whether `url` is the Hub's own, which alone is shown the token; not in the clear, either."""
    asked, own = urlsplit(url), urlsplit(endpoint)
    return asked.netloc == own.netloc and asked.scheme in (own.scheme, "https")


def hub_headers() -> dict[str, str]:
    """Headers for the Hub, with the token of HF_TOKEN or `hf auth login` if there is one.

    Raises:
        UsageError: If the token has characters that no token has.
    """
    headers: dict[str, str] = _huggingface_hub().utils.build_hf_headers(library_name="nanorun")
    if not all(value.isascii() and value.isprintable() for value in headers.values()):
        # Here, because HTTP's own complaint would show it.
        raise UsageError("HF_TOKEN, or the token of hf auth login, has characters no token has")
    return headers


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask any server."""
    return bool(_huggingface_hub().constants.HF_HUB_OFFLINE)


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.utils
    except ImportError as error:
        raise LibraryError(
            "huggingface_hub is not installed", tries=["pip install huggingface_hub"]
        ) from error
    return huggingface_hub
