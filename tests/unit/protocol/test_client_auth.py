"""Client authentication: what the token endpoint gets, whatever characters a secret has."""

import base64
from urllib.parse import unquote_plus

import pytest

from kong_token_exchange.protocol.client_auth import client_secret_basic, client_secret_post, public_client
from kong_token_exchange.protocol.http_message import HttpRequest
from kong_token_exchange.secret import Secret
from tests.support.fakes import form_of

REQUEST = HttpRequest(
    method="POST", url="https://idp.test/token", headers={"Accept": "application/json"}, body=b"grant_type=x"
)

AWKWARD = {
    "EXC-03-plain": ("client", "secret"),
    "EXC-03-colon": ("cli:ent", "sec:ret"),
    "EXC-03-percent": ("client%3A", "100%"),
    "EXC-03-plus-and-space": ("a+b c", "d+e f"),
    "EXC-03-ampersand": ("a&client_id=b", "c&scope=admin"),
    "EXC-03-not-ascii": ("cli\u00ebnt", "\u20ac\U0001f511"),
    "EXC-03-url": ("https://client.test/?a=b#c", "/=?"),
}


@pytest.mark.parametrize(("client_id", "secret"), AWKWARD.values(), ids=AWKWARD.keys())
def test_basic_credentials_are_form_encoded_before_they_are_joined(client_id: str, secret: str) -> None:
    request = client_secret_basic(client_id, Secret(secret))(REQUEST)

    scheme, _, encoded = request.headers["Authorization"].partition(" ")
    pair = base64.b64decode(encoded, validate=True).decode("ascii")
    assert "Basic" == scheme
    assert 1 == pair.count(":")
    assert [client_id, secret] == [unquote_plus(part) for part in pair.split(":")]
    assert "application/json" == request.headers["Accept"]


def test_exc_03_the_example_of_the_standard() -> None:
    # RFC 6749 section 2.3.1 with the characters of appendix B.
    request = client_secret_basic(" %&+", Secret("\u00a3\u20ac"))(REQUEST)

    assert "+%25%26%2B:%C2%A3%E2%82%AC" == base64.b64decode(request.headers["Authorization"][6:]).decode()


def test_exc_02_basic_leaves_the_secret_out_of_form_and_address() -> None:
    request = client_secret_basic("client", Secret("mark-secret"))(REQUEST)

    assert (REQUEST.url, REQUEST.body) == (request.url, request.body)


@pytest.mark.parametrize(("client_id", "secret"), AWKWARD.values(), ids=AWKWARD.keys())
def test_post_credentials_are_form_encoded(client_id: str, secret: str) -> None:
    request = client_secret_post(client_id, Secret(secret))(REQUEST)

    assert [("grant_type", "x"), ("client_id", client_id), ("client_secret", secret)] == form_of(request)
    assert REQUEST.url == request.url
    assert "Authorization" not in request.headers


def test_a_public_client_is_named_alone() -> None:
    request = public_client("a&b")(REQUEST)

    assert [("grant_type", "x"), ("client_id", "a&b")] == form_of(request)
    assert "Authorization" not in request.headers


def test_requests_print_neither_headers_nor_body() -> None:
    for authenticate in (
        client_secret_basic("client", Secret("mark-secret")),
        client_secret_post("client", Secret("mark-secret")),
    ):
        request = authenticate(REQUEST)

        assert "mark" not in repr(request)
        assert "grant_type" not in repr(request)
        assert "Basic" not in str(request)
