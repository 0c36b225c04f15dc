"""Tokens in the query and in cookies."""

from __future__ import annotations

import pytest

from kong_token_exchange.errors import MalformedRequestError
from kong_token_exchange.protocol.credentials import Removal, cookie_token, query_token


@pytest.mark.parametrize(
    ("query", "token", "left"),
    [
        ("", None, None),
        ("a=1&b=2", None, None),
        ("access_token=x.y.z", "x.y.z", ""),
        ("a=1&access_token=x.y.z&b=2", "x.y.z", "a=1&b=2"),
        ("a=%26&access_token=x%2Ey", "x.y", "a=%26"),
        ("access%5Ftoken=x.y", "x.y", ""),
        ("Access_Token=x.y", None, None),
        ("my_access_token=x", None, None),
        ("access_token=", None, ""),
        ("access_token", None, ""),
    ],
)
def test_the_query_argument_is_read_and_taken_out(query: str, token: str | None, left: str | None) -> None:
    assert (token, Removal(raw_query=left)) == query_token(query, max_length=100)


@pytest.mark.parametrize(
    "query",
    [
        "access_token=a&access_token=a",
        "access_token=a&access_token=b",
        "access_token=a%20b",
        "access_token=%FF",
    ],
)
def test_hdr_11_a_repeated_or_malformed_argument_is_refused(query: str) -> None:
    with pytest.raises(MalformedRequestError) as caught:
        query_token(query, max_length=100)

    assert (400, "invalid_request") == (caught.value.status, caught.value.error)


def test_the_longest_token_is_read_and_one_more_is_not() -> None:
    assert ("x" * 100) == query_token("access_token=" + "x" * 100, max_length=100)[0]
    with pytest.raises(MalformedRequestError):
        query_token("access_token=" + "x" * 101, max_length=100)


@pytest.mark.parametrize(
    ("header", "token", "left"),
    [
        ("", None, None),
        ("a=1", None, None),
        ("t=x.y", "x.y", ""),
        ("a=1; t=x.y; b=2", "x.y", "a=1; b=2"),
        ("a=1;t=x.y", "x.y", "a=1"),
        ('t="x.y"', "x.y", ""),
        ("T=x.y", None, None),
        ("tt=x.y", None, None),
        ("t=", None, ""),
    ],
)
def test_the_cookie_is_read_and_taken_out(header: str, token: str | None, left: str | None) -> None:
    assert (token, Removal(cookie=left)) == cookie_token(header, name="t", max_length=100)


@pytest.mark.parametrize("header", ["t=a; t=a", "t=a; t=b", "t=a b", "t=\udcff"])
def test_a_repeated_or_malformed_cookie_is_refused(header: str) -> None:
    with pytest.raises(MalformedRequestError):
        cookie_token(header, name="t", max_length=100)


def test_a_preflight_only_removes() -> None:
    assert (None, Removal(raw_query="a=1")) == query_token(
        "access_token=a b&a=1&access_token=c", max_length=1, strict=False
    )
    assert (None, Removal(cookie="")) == cookie_token("t=a; t=b", name="t", max_length=1, strict=False)
