import base64
import hashlib
import json

import pytest

from kong_token_exchange.sandbox.serving import Request
from kong_token_exchange.sandbox.upstream import EchoUpstream, bearer_token, describe, read_claims
from tests.unit.sandbox.scripted import HttpClient, get


def jwt_of(claims) -> str:
    return f"e30.{base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip('=')}.c2ln"


def test_answer_shows_what_was_received():
    with EchoUpstream() as upstream, HttpClient(upstream.url) as client:
        token = jwt_of({"sub": "alex"})
        client.send(
            f"POST /a?b=1 HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {token}\r\nX: 1\r\nX: 2\r\n"
            "Content-Length: 4\r\n\r\nbody".encode()
        )
        shown = json.loads(client.answer().body)

    assert (shown["method"], shown["path"], shown["query"]) == ("POST", "/a", "b=1")
    assert [value for name, value in shown["headers"] if name == "X"] == ["1", "2"]
    assert (shown["body_length"], shown["body_sha256"]) == (4, hashlib.sha256(b"body").hexdigest())
    assert shown["claims"] == {"sub": "alex"}


def test_hits_and_last_claims_are_kept():
    with EchoUpstream() as upstream:
        assert (upstream.hits, upstream.last_claims()) == (0, None)
        get(upstream.url, "/a", f"Authorization: Bearer {jwt_of({'n': 1})}")
        get(upstream.url, "/b", f"Authorization: bearer {jwt_of({'n': 2})}")

        assert (upstream.hits, upstream.log.count("/a"), upstream.log.count("/c")) == (2, 1, 0)
        assert upstream.last_claims() == {"n": 2}
        assert upstream.log.last("/a").path == "/a"
        assert upstream.log.last("/c") is None


@pytest.mark.parametrize(
    "token",
    ["", "a.b", "a.b.c", "a.!!.c", jwt_of([1]), jwt_of("x"), "a.\udcff.c"],
    ids=["empty", "two-parts", "not-json", "not-base64", "list", "text", "not-utf8"],
)
def test_what_is_not_a_jwt_has_no_claims(token):
    assert read_claims(token) is None


@pytest.mark.parametrize(
    ("value", "token"),
    [(None, None), ("Basic x", None), ("Bearer", None), ("Bearer  ", None), ("BEARER x", "x")],
)
def test_bearer_token(value, token):
    headers = () if value is None else (("Authorization", value),)

    assert bearer_token(Request("GET", "/", headers, b"")) == token


def test_header_bytes_that_are_not_utf8_can_be_shown():
    shown = describe(Request("GET", "/", (("X", "\udcff"),), b""))

    assert json.loads(json.dumps(shown))["headers"] == [["X", "\udcff"]]
    with EchoUpstream() as upstream:
        assert get(upstream.url, "/", "X: \udcff").status == 200
