"""
Credentials in the query and in cookies: read them, and say what is left without them.

Source: RFC 6750 section 2.3; RFC 6265 section 4.2; Kong openid-connect `bearer_token_param_type`.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote_plus

from kong_token_exchange.errors import MalformedRequestError
from kong_token_exchange.protocol.bearer import parse_token

# RFC 6750 section 2.3.
QUERY_ARGUMENT = "access_token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """What query and cookie header become once the credential is taken out; None leaves one as it is."""

    raw_query: str | None = None
    cookie: str | None = None


def query_token(raw_query: str, *, max_length: int, strict: bool = True) -> tuple[str | None, Removal]:
    """
    Read the token of the query argument `access_token`.

    Args:
        raw_query: The query as it came, without "?".
        max_length: Longest token, in characters.
        strict: False only removes, whatever it is.

    Returns:
        The token, None when the argument is absent, and the query without the argument.

    Raises:
        MalformedRequestError: repeated, or not a b64token.
    """
    kept: list[str] = []
    values: list[str] = []
    for pair in raw_query.split("&") if raw_query else []:
        name, _, value = pair.partition("=")
        if unquote_plus(name, errors="surrogateescape") == QUERY_ARGUMENT:
            values.append(unquote_plus(value, errors="surrogateescape"))
        else:
            kept.append(pair)
    if not values:
        return None, Removal()
    return _only(values, max_length, strict=strict), Removal(raw_query="&".join(kept))


def cookie_token(
    header: str, *, name: str, max_length: int, strict: bool = True
) -> tuple[str | None, Removal]:
    """
    Read the token of one cookie.

    Args:
        header: The `Cookie` header as it came.
        name: The cookie's name, compared exactly.
        max_length: Longest token, in characters.
        strict: False only removes, whatever it is.

    Returns:
        The token, None when the cookie is absent, and the header without it ("" when nothing is left).

    Raises:
        MalformedRequestError: repeated, or not a b64token.
    """
    kept: list[str] = []
    values: list[str] = []
    # nginx joins several Cookie headers with "; "; RFC 6265 separates pairs the same way.
    for pair in header.split(";") if header else []:
        key, _, value = pair.strip().partition("=")
        if key == name:
            values.append(value.removeprefix('"').removesuffix('"'))
        elif pair.strip():
            kept.append(pair.strip())
    if not values:
        return None, Removal()
    return _only(values, max_length, strict=strict), Removal(cookie="; ".join(kept))


def _only(values: list[str], max_length: int, *, strict: bool) -> str | None:
    if not strict:
        return None
    if len(values) > 1:
        raise MalformedRequestError(reason="credential_repeated")
    return parse_token(values[0], max_length=max_length)
