import json

import pytest

from kong_token_exchange.sandbox.answers import error_answer, media_type


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        ("text/html", "text/html"),
        ("TEXT/HTML;charset=x", "text/html"),
        ("text/plain;q=0.5, text/html;q=0.9", "text/html"),
        ("text/plain, text/html", "text/plain"),
        ("text/*", "text/plain"),
        ("text/xml", "application/xml"),
        ("image/png", "application/json"),
        ("text/html;q=0", "application/json"),
        ("", "application/json"),
    ],
)
def test_format_follows_the_accept_header(accept, expected):
    assert media_type(accept) == expected


@pytest.mark.parametrize("accept", ["application/json", "text/plain", "text/html", "application/xml"])
def test_every_format_names_message_and_request(accept):
    answer = error_answer(404, "f" * 32, accept=accept)

    assert b"no Route matched with those values" in answer.body
    assert b"f" * 32 in answer.body
    assert answer.headers == [("Content-Type", f"{accept}; charset=utf-8")]


def test_json_is_kongs():
    answer = error_answer(500, "id", accept="application/json")

    assert json.loads(answer.body) == {"message": "An unexpected error occurred", "request_id": "id"}


def test_message_can_be_given():
    assert b"too large" in error_answer(400, "id", accept="text/plain", message="too large").body


@pytest.mark.parametrize("status", [501, 505])
def test_nginx_answers_some_itself(status):
    answer = error_answer(status, "id", accept="application/json")

    assert answer.headers == [("Content-Type", "text/html; charset=UTF-8")]
    assert str(status).encode() in answer.body
