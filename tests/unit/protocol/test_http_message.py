"""HTTP messages as values."""

import pytest

from kong_token_exchange.protocol.http_message import HttpResponse


@pytest.mark.parametrize(
    ("value", "media_type"),
    [
        ("application/json", "application/json"),
        ("Application/JSON; charset=utf-8", "application/json"),
        (" application/json ;", "application/json"),
        ("", ""),
        (";application/json", ""),
        ("text/html, application/json", "text/html, application/json"),
    ],
)
def test_the_media_type_is_without_parameters_and_case(value: str, media_type: str) -> None:
    assert media_type == HttpResponse(status=200, headers={"content-type": value}).media_type()


def test_no_media_type() -> None:
    assert not HttpResponse(status=200).media_type()


def test_answers_print_their_status_alone() -> None:
    response = HttpResponse(status=200, headers={"set-cookie": "mark"}, body=b"mark")

    assert "HttpResponse(status=200)" == repr(response)
