"""
Client authentication at the token endpoint, each a function from request to request.

Source: RFC 6749 section 2.3.1; RFC 7591 section 2 (names of the methods).
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from urllib.parse import quote_plus, urlencode

from kong_token_exchange.protocol.http_message import HttpRequest
from kong_token_exchange.secret import Secret

ClientAuthentication = Callable[[HttpRequest], HttpRequest]


def client_secret_basic(client_id: str, client_secret: Secret) -> ClientAuthentication:
    """
    Authenticate by HTTP Basic; id and secret are form-encoded before they are joined.

    Source: RFC 6749 section 2.3.1 and appendix B.
    """

    def authenticate(request: HttpRequest) -> HttpRequest:
        pair = f"{quote_plus(client_id)}:{quote_plus(client_secret.reveal())}"
        credentials = base64.b64encode(pair.encode("ascii")).decode("ascii")
        return replace(request, headers={**request.headers, "Authorization": f"Basic {credentials}"})

    return authenticate


def client_secret_post(client_id: str, client_secret: Secret) -> ClientAuthentication:
    """Authenticate by `client_id` and `client_secret` in the form."""

    def authenticate(request: HttpRequest) -> HttpRequest:
        return _add_to_form(request, [("client_id", client_id), ("client_secret", client_secret.reveal())])

    return authenticate


def public_client(client_id: str) -> ClientAuthentication:
    """Name the client without proving it (`none`)."""

    def authenticate(request: HttpRequest) -> HttpRequest:
        return _add_to_form(request, [("client_id", client_id)])

    return authenticate


def _add_to_form(request: HttpRequest, members: list[tuple[str, str]]) -> HttpRequest:
    return replace(request, body=request.body + b"&" + urlencode(members).encode("ascii"))
