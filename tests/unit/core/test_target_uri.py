"""Two spellings of one target URI are equal, and two URIs never are."""

import pytest

from kong_token_exchange.core.target_uri import (
    normalise_origin,
    normalise_path,
    normalise_uri,
    request_origin,
)

ORIGIN = "https://api.test:443"

URIS = {
    "plain": ("https://api.test/orders", (ORIGIN, "/orders")),
    "case": ("HTTPS://API.Test/orders", (ORIGIN, "/orders")),
    "port": ("https://api.test:443/orders", (ORIGIN, "/orders")),
    "empty-port": ("https://api.test:/orders", (ORIGIN, "/orders")),
    "other-port": ("https://api.test:8443/orders", ("https://api.test:8443", "/orders")),
    "http": ("http://api.test", ("http://api.test:80", "/")),
    "address": ("https://[2001:DB8::1]/a", ("https://[2001:db8::1]:443", "/a")),
    "query-and-fragment": ("https://api.test/orders?a=/b#c?d", (ORIGIN, "/orders")),
    "query-without-path": ("https://api.test?a", (ORIGIN, "/")),
    "no-scheme": ("//api.test/orders", None),
    "scheme": ("ftp://api.test/orders", None),
    "user": ("https://api.test@evil.test/orders", None),
    "backslash": ("https://api.test\\@evil.test/", None),
    "blank": ("https://api.test/or ders", None),
    "control": ("https://api.test/or\nders", None),
    "beyond-ascii": ("https://\u0430pi.test/orders", None),
    "port-too-high": ("https://api.test:65536/", None),
    "port-zero": ("https://api.test:0/", None),
    "port-text": ("https://api.test:https/", None),
    "no-host": ("https:///orders", None),
    "empty": ("", None),
}


@pytest.mark.parametrize(("uri", "parts"), URIS.values(), ids=URIS)
def test_a_uri_has_an_origin_and_a_path(uri: str, parts: tuple[str, str] | None) -> None:
    assert parts == normalise_uri(uri)


@pytest.mark.parametrize(
    ("path", "normalised"),
    [
        # RFC 3986 sections 5.2.4 and 6.2.2.
        ("/a/b/c/./../../g", "/a/g"),
        ("/a/./b", "/a/b"),
        ("/a/..", "/"),
        ("/a/.", "/a/"),
        ("/../../a", "/a"),
        ("/%7esmith/%41", "/~smith/A"),
        ("/a/%2e%2E/b", "/b"),
        ("/a%2fb", "/a%2Fb"),
        ("/a//b", "/a//b"),
        ("/.well-known/x", "/.well-known/x"),
        ("/a%", "/a%"),
        ("/a%zz", "/a%zz"),
        ("/%C3%bc", "/%C3%BC"),
        ("", ""),
    ],
)
def test_a_path_is_normalised_and_nothing_more(path: str, normalised: str) -> None:
    assert normalised == normalise_path(path)


def test_an_origin_has_a_known_scheme_and_a_host() -> None:
    assert "https://api.test:8443" == normalise_origin("HTTPS", "API.test", 8443)
    assert normalise_origin("ws", "api.test", 80) is None
    assert normalise_origin("https", "api.test/x", None) is None


@pytest.mark.parametrize(
    ("authority", "addressed", "host", "port", "expected"),
    [
        pytest.param("api.test", "api.test", "api.test", "8443", ORIGIN, id="behind-a-balancer"),
        pytest.param("API.test:9443", "api.test", "api.test", "8443", "https://api.test:9443", id="own-port"),
        pytest.param(
            "kong.internal", "kong.internal", "api.test", "443", ORIGIN, id="trusted-proxy-names-the-host"
        ),
        pytest.param(
            "kong.internal:8443",
            "kong.internal",
            "api.test",
            "444",
            "https://api.test:444",
            id="and-the-port",
        ),
        pytest.param("", "kong", "api.test", "443", ORIGIN, id="no-authority"),
        pytest.param("", "", "", "443", None, id="neither"),
        # The request line names another host than the header that Kong chose the route by.
        pytest.param("api.test", "evil.test", "evil.test", "443", None, id="CLM-31-two-hosts"),
        pytest.param("a b", "evil.test", "evil.test", "443", None, id="CLM-31-odd-header"),
        pytest.param("", "kong", "kong", "443", None, id="CLM-31-no-header"),
        pytest.param("api.test.", "evil.test", "api.test", "443", "https://api.test.:443", id="proxy-agrees"),
    ],
)
def test_the_origin_of_a_request_is_what_its_client_sees(
    authority: str, addressed: str, host: str, port: str, expected: str | None
) -> None:
    assert expected == request_origin(
        scheme="https", host=host, port=port, authority=authority, addressed=addressed
    )
