"""What the environment says of proxies and the Hub: used, or refused by the variable's name."""

from __future__ import annotations

import os

import pytest

from nanorun.errors import UsageError
from nanorun.net.environment import hub_endpoint, is_at_hub, proxy_for

PROXY = "http://proxy.test:3128"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [key for key in os.environ if key.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_proxy_is_that_of_the_scheme_or_of_all(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, PROXY)
    assert proxy_for("https://hub.test/x") == PROXY
    monkeypatch.setenv(variable, "proxy.test:3128")
    assert proxy_for("https://hub.test/x") == PROXY
    expected = PROXY if variable == "ALL_PROXY" else None
    assert proxy_for("http://hub.test/x") == expected


@pytest.mark.parametrize(
    ("no_proxy", "host", "is_direct"),
    [
        ("*", "hub.test", True),
        ("hub.test", "hub.test", True),
        ("hub.test", "cdn.hub.test", True),
        (".hub.test", "cdn.hub.test", True),
        ("hub.test:443", "hub.test", True),
        ("https://hub.test", "hub.test", True),
        ("hub.test", "myhub.test", False),
        ("localhost,fd07:b51a:cc66:f0::/64", "hub.test", False),
        ("localhost,fd07:b51a:cc66:f0::/64", "[fd07:b51a:cc66:f0::7]", True),
        ("[fd07::1]", "[fd07::1]", True),
        ("[::1]", "hub.test", False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("10.0.0.0/8", "[fd07::1]", False),
        ("", "127.0.0.1", True),
        ("", "[::1]", True),
        ("", "localhost", True),
        (" , ,", "hub.test", False),
    ],
)
def test_hosts_and_networks_of_no_proxy_are_asked_directly(
    no_proxy: str, host: str, is_direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert (proxy_for(f"https://{host}/x") is None) == is_direct


@pytest.mark.parametrize("value", ["http://[::1", "http://", "ftp://a:1", "http://a:port", "::"])
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "all_proxy"])
def test_bad_proxy_is_an_error_that_names_the_variable(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=f"^{variable} is no proxy's address"):
        proxy_for("http://hub.test/x")


def test_password_of_a_proxy_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://me:secret@a:port")
    with pytest.raises(UsageError) as caught:
        proxy_for("http://hub.test/x")
    assert "secret" not in caught.value.render()


def test_endpoint_is_checked_and_has_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert hub_endpoint() == "https://huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.test:81/sub/")
    assert hub_endpoint() == "http://hub.test:81/sub"
    monkeypatch.setenv("HF_ENDPOINT", "http://[::1")
    with pytest.raises(UsageError, match=r"^HF_ENDPOINT is no address"):
        hub_endpoint()


@pytest.mark.parametrize(
    ("url", "endpoint", "expected"),
    [
        ("https://hub.test/a", "https://hub.test", True),
        ("https://hub.test/a", "http://hub.test", True),
        ("http://hub.test/a", "https://hub.test", False),
        ("https://cdn.hub.test/a", "https://hub.test", False),
        ("https://hub.test:8443/a", "https://hub.test", False),
    ],
)
def test_token_belongs_to_the_hub_and_is_not_sent_in_the_clear(
    url: str, endpoint: str, expected: bool
) -> None:
    assert is_at_hub(url, endpoint) == expected
