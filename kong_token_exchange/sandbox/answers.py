"""
The error answers of Kong: one message, four formats.

Source: Kong 3.9.1 `kong/tools/http.lua`, `kong/error_handlers.lua` (behaviour).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from http import HTTPStatus

MESSAGES = {
    400: "Bad request",
    404: "no Route matched with those values",
    405: "Method not allowed",
    413: "Payload too large",
    414: "URI too long",
    426: "Please use HTTPS protocol",
    500: "An unexpected error occurred",
    502: "An invalid response was received from the upstream server",
    503: "no Service found with those values",
    504: "The upstream server is timing out",
}

_FORMATS = {
    "application/json": '{{\n  "message":"{message}",\n  "request_id":"{request_id}"\n}}',
    "text/plain": "{message}\nrequest_id: {request_id}\n",
    "text/html": (
        '<!doctype html>\n<html>\n  <head>\n    <meta charset="utf-8">\n    <title>Error</title>\n  </head>\n'
        "  <body>\n    <h1>Error</h1>\n    <p>{message}.</p>\n    <p>request_id: {request_id}</p>\n"
        "  </body>\n</html>\n"
    ),
    "application/xml": (
        '<?xml version="1.0" encoding="UTF-8"?>\n<error>\n  <message>{message}</message>\n'
        "  <requestid>{request_id}</requestid>\n</error>\n"
    ),
}

_NGINX_PAGE = (
    "<html>\r\n<head><title>{title}</title></head>\r\n<body>\r\n<center><h1>{title}</h1></center>\r\n"
    "</body>\r\n</html>\r\n"
)

_BY_TYPE = {"text/*": "text/plain", "text/xml": "application/xml"}

_QUALITY = re.compile(r";\s*q=(\d(?:\.\d{0,3})?)")


@dataclass(slots=True)
class Answer:
    """An answer that the gateway makes itself."""

    status: int
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""


def media_type(accept: str) -> str:
    """Return the format for an Accept header: the first of the best quality, JSON for what is not known."""
    best, chosen = 0.0, "application/json"
    for item in accept.split(","):
        match = _QUALITY.search(item)
        quality = float(match[1]) if match else 1.0
        if quality > best:
            wanted = item.partition(";")[0].strip().lower()
            best = quality
            chosen = wanted if wanted in _FORMATS else _BY_TYPE.get(wanted, "application/json")
    return chosen


def error_answer(status: int, request_id: str, *, accept: str, message: str = "") -> Answer:
    """
    Return the answer for an error.

    Args:
        status: Its status; 501 and 505 are nginx's own page.
        request_id: Named in the body.
        accept: Which formats are wanted, as in an Accept header.
        message: Instead of the usual text for the status.
    """
    if status in (501, 505):
        page = _NGINX_PAGE.format(title=f"{status} {HTTPStatus(status).phrase}")
        return Answer(status, [("Content-Type", "text/html; charset=UTF-8")], page.encode())
    kind = media_type(accept)
    body = _FORMATS[kind].format(message=message or MESSAGES[status], request_id=request_id)
    return Answer(status, [("Content-Type", f"{kind}; charset=utf-8")], body.encode())
