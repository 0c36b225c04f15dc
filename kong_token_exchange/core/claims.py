"""
Verified claims: read them into a typed value, then judge them by one rule each.

Everything here runs after the signature has been verified. Types are strict: a
boolean is not a number, a numeric string is not a date, a list is not a name.

Source: RFC 7519 section 4.1; RFC 9068 section 2.2; RFC 8693 section 4; docs/threats.md CLM rows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from kong_token_exchange.core.strict_json import Json
from kong_token_exchange.errors import AccessDeniedError, ClaimError, InsufficientScopeError, TimestampError

# NumericDate beyond 2**53 cannot be told from its neighbour as a JSON number (RFC 8259 section 6).
_MAX_NUMERIC_DATE = 2**53

# Identifiers end up in headers and logs. OpenID Connect bounds `sub` to 255 characters; client
# identifiers that are URLs are longer, none reaches this.
_MAX_IDENTIFIER = 1024
# C0 and C1 controls, the two line separators of Unicode, and halves of a surrogate pair.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

# The members providers use for the client a token was issued to: OIDC and Keycloak, RFC 9068,
# Okta, Entra v1.
CLIENT_MEMBERS = ("azp", "client_id", "cid", "appid")

# The members that name scopes, beside the configured one: RFC 8693 section 4.2; Okta (a list) and Entra.
_SCOPE_MEMBERS = ("scope", "scp")

# Tokens that are not access tokens say so in the payload: Keycloak's `typ`. The member has no
# standard meaning, so other words than these say nothing.
_OTHER_PAYLOAD_TYPES = frozenset(
    {
        "id",
        "serialized-id",
        "refresh",
        "offline",
        "logout",
        "dpop",
        "registrationaccesstoken",
        "initialaccesstoken",
    }
)
# What only ID tokens have (OpenID Connect Core sections 3.1.3.6 and 3.3.2.11), and only logout
# tokens and other security events (RFC 8417 section 2.2).
_ID_TOKEN_MEMBERS = ("at_hash", "c_hash")
_EVENT_MEMBER = "events"

# What an access token's `typ` header may be where an issuer's `typ` does not say (RFC 9068 section 4).
ACCESS_TOKEN_TYPES = ("at+jwt", "application/at+jwt", "jwt")
ID_TOKEN_TYPES = ("jwt",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """
    The claims of one verified token.

    `aud` and `scopes` are empty when the token names none. `other_scopes` are named by another
    spelling than the configured claim: no requirement is met by them, every limit is judged on
    them too. Times are NumericDate, seconds.
    """

    iss: str
    sub: str
    aud: tuple[str, ...]
    exp: float
    nbf: float | None
    iat: float | None
    client: str | None
    scopes: frozenset[str]
    sender_constrained: bool
    other_scopes: frozenset[str] = frozenset()
    members: Mapping[str, Json] = field(repr=False)


def parse_claims(
    payload: Mapping[str, Json],
    *,
    audience_claim: Sequence[str] = ("aud",),
    scopes_claim: Sequence[str] = ("scope",),
) -> Claims:
    """
    Read the payload of a verified token.

    `iss`, `sub` and `exp` are required, as RFC 9068 section 2.2 requires them; every access token
    of Keycloak, Entra, Okta and Auth0 has them, that of a machine client included. Keycloak's
    lightweight tokens have no `sub`: they are for introspection, not for validation here.

    `aud` may be absent, since Keycloak leaves it out where no audience is mapped: such a token
    meets no `audience` and no `audience_required`, and is beyond every `allowed_audience`.

    Scopes are read from one configured claim, as Kong does, so that a token with `scope` and
    `scp` means one thing; for Okta and Entra configure `scp`. A claim that is there has the right
    type: null, an empty audience or two spaces between scopes are no way to say "none".

    The first of `azp`, `client_id`, `cid` and `appid` names the client: in a token that Keycloak
    exchanged, `azp` is who asked for it and `client_id` may still be the first client.

    Args:
        payload: The payload as an object.
        audience_claim: Path to the member that holds the audience.
        scopes_claim: Path to the member that holds the scopes: a space-separated string or a list.

    Raises:
        ClaimError: a claim we rely on is absent or of the wrong type; `claim` names it.

    Source: RFC 7519 section 4.1; RFC 8693 section 4.2.
    """
    exp = _numeric_date(payload, "exp")
    if exp is None:
        raise ClaimError(claim="exp")
    scopes = _scopes(_member_at(payload, scopes_claim, claim="scope"))
    others = (_scopes(_member_at(payload, (name,), claim="scope")) for name in _SCOPE_MEMBERS)
    return Claims(
        iss=_identifier(payload, "iss"),
        sub=_identifier(payload, "sub"),
        aud=_audience(_member_at(payload, audience_claim, claim="aud")),
        exp=exp,
        nbf=_numeric_date(payload, "nbf"),
        iat=_numeric_date(payload, "iat"),
        client=_client(payload),
        scopes=scopes,
        other_scopes=frozenset().union(*others) - scopes,
        sender_constrained="cnf" in payload,
        members=payload,
    )


def check_timestamps(claims: Claims, *, now: float, leeway: float, max_age: float | None = None) -> None:
    """
    Judge `exp`, `nbf` and `iat` at *now*.

    Args:
        claims: Verified claims.
        now: NumericDate, seconds.
        leeway: Tolerated clock difference, seconds.
        max_age: Longest time since `iat`, seconds; None for no limit.

    Raises:
        TimestampError: expired (also when `exp` equals *now*), not yet valid, issued in the
            future, or older than *max_age*.

    Source: RFC 7519 sections 4.1.4 to 4.1.6.
    """
    if now >= claims.exp + leeway:
        raise TimestampError(claim="exp", facts={"exp": claims.exp})
    for name, value in (("nbf", claims.nbf), ("iat", claims.iat)):
        if value is not None and value > now + leeway:
            raise TimestampError(claim=name, facts={name: value})
    if max_age is not None and (claims.iat is None or now > claims.iat + max_age + leeway):
        raise TimestampError(claim="iat", facts={"iat": claims.iat})


def check_issuer(claims: Claims, *, expected: str) -> None:
    """
    Require the very issuer whose key verified the token.

    Raises:
        ClaimError: `iss` differs; compared as exact strings.

    Source: RFC 7519 section 4.1.1; RFC 8725 section 3.8.
    """
    if claims.iss != expected:
        raise ClaimError(claim="iss", facts={"expected": expected})


def check_audience(claims: Claims, *, accepted: Collection[str]) -> None:
    """
    Require one of the *accepted* audiences; an empty collection accepts any.

    Raises:
        ClaimError: `aud` holds none of them; compared as exact strings.

    Source: RFC 7519 section 4.1.3.
    """
    if accepted and not any(aud in accepted for aud in claims.aud):
        raise ClaimError(claim="aud", facts={"accepted": ",".join(accepted)[:200]})


def check_client(claims: Claims, *, allowed: Collection[str]) -> None:
    """
    Require that the token was issued to an *allowed* client; an empty collection allows any.

    Raises:
        AccessDeniedError: another client, or none is named.
    """
    if allowed and claims.client not in allowed:
        raise AccessDeniedError(reason="client_not_allowed")


def check_required_claims(claims: Claims, *, required: Collection[str]) -> None:
    """
    Require that each named member is present and not null.

    A name is that of a member as it stands, or else a path: `realm_access.roles`.

    Raises:
        ClaimError: one is not.
    """
    for name in required:
        if all(value is None for value in _named(claims.members, name)):
            raise ClaimError(claim=name)


def forbidden_claim(claims: Claims, *, forbidden: Collection[str]) -> str | None:
    """
    Return the first of the *forbidden* members that is there, null included; None where none is.

    Names are read as in `check_required_claims`, and both readings count.

    Source: Kong openid-connect `claims_forbidden`.
    """
    return next((name for name in forbidden if _named(claims.members, name)), None)


def check_type(claims: Claims, *, typ: str | None, accepted: Collection[str], id_token: bool = False) -> None:
    """
    Require an access token: by its `typ` header, and by what its payload says of itself.

    An ID token of a server that marks it in no way cannot be told apart here: its `aud` is the
    client, so an issuer's accepted audience refuses it.

    Args:
        claims: Verified claims.
        typ: The `typ` header member, None when absent.
        accepted: Accepted values, compared without case; empty for the usual ones of an access
            token or none at all.
        id_token: An ID token is wanted instead, because the exchange declares one; for issuers
            whose tokens are never forwarded.

    Raises:
        ClaimError: another kind of token (ID token, logout token, DPoP proof, ...).

    Source: RFC 8725 section 3.11; RFC 9068 section 4.
    """
    if accepted:
        fits = typ is not None and typ.lower() in {value.lower() for value in accepted}
    else:
        fits = typ is None or typ.lower() in (ID_TOKEN_TYPES if id_token else ACCESS_TOKEN_TYPES)
    if not fits:
        raise ClaimError(claim="typ")
    if not (_says_id_token(claims.members) if id_token else _says_access_token(claims.members)):
        raise ClaimError(claim="token_use")


def check_bearer(claims: Claims) -> None:
    """
    Refuse a sender-constrained token: without its proof it is somebody else's token.

    Raises:
        ClaimError: the token has `cnf`.

    Source: RFC 9449 section 7.2; RFC 8705 section 3.
    """
    if claims.sender_constrained:
        raise ClaimError(claim="cnf")


def check_scopes_required(claims: Claims, *, alternatives: Sequence[frozenset[str]]) -> None:
    """
    Require all scopes of at least one alternative; one that names no scope is never met.

    Raises:
        InsufficientScopeError: no alternative is met; the first one is named in the challenge.

    Source: Kong openid-connect `scopes_required`; RFC 6750 section 3.1.
    """
    if alternatives and not any(wanted and wanted <= claims.scopes for wanted in alternatives):
        raise InsufficientScopeError(reason="scopes_required", scope=" ".join(sorted(alternatives[0])))


def meets_audience_required(claims: Claims, *, alternatives: Sequence[frozenset[str]]) -> bool:
    """
    Tell whether `aud` holds all values of at least one alternative; one without values is never met.

    Source: Kong openid-connect `audience_required`.
    """
    return not alternatives or any(wanted and wanted.issubset(claims.aud) for wanted in alternatives)


def is_identifier(value: Json) -> bool:
    """Tell whether *value* is text that may name a party: not empty, bounded, without control characters."""
    return isinstance(value, str) and 0 < len(value) <= _MAX_IDENTIFIER and _CONTROL.search(value) is None


# --- reading --------------------------------------------------------------------------


def _says_access_token(members: Mapping[str, Json]) -> bool:
    payload_type = members.get("typ", "")
    if not isinstance(payload_type, str) or payload_type.lower() in _OTHER_PAYLOAD_TYPES:
        return False
    # `token_use` is Cognito's.
    if members.get("token_use", "access") != "access":
        return False
    return _EVENT_MEMBER not in members and not any(name in members for name in _ID_TOKEN_MEMBERS)


def _says_id_token(members: Mapping[str, Json]) -> bool:
    return (
        members.get("typ", "ID") == "ID"
        and members.get("token_use", "id") == "id"
        and _EVENT_MEMBER not in members
    )


def _named(payload: Mapping[str, Json], name: str) -> list[Json]:
    """Return what *name* stands for: the member of that very name, and the one at that path."""
    found = [payload[name]] if name in payload else []
    parent, _, last = name.rpartition(".")
    value: object = payload
    for step in parent.split(".") if parent else ():
        value = value.get(step) if isinstance(value, Mapping) else None
    if parent and isinstance(value, Mapping) and last in value:
        found.append(value[last])
    return found


def _member_at(payload: Mapping[str, Json], path: Sequence[str], *, claim: str) -> Json:
    """Return the member at *path*, None when it is absent; a null is there and has no type we read."""
    value: object = payload
    for name in path:
        if not isinstance(value, Mapping):
            raise ClaimError(claim=claim)
        if name not in value:
            return None
        value = value[name]
    if value is None:
        raise ClaimError(claim=claim)
    return cast("Json", value)


def _numeric_date(payload: Mapping[str, Json], name: str) -> float | None:
    if name not in payload:
        return None
    value = payload[name]
    # The comparison alone refuses NaN and the infinities too, and an integer of any length.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MAX_NUMERIC_DATE:
        raise ClaimError(claim=name)
    return value


def _identifier(payload: Mapping[str, Json], name: str) -> str:
    value = payload.get(name)
    if not is_identifier(value):
        raise ClaimError(claim=name)
    return cast("str", value)


def _audience(value: Json) -> tuple[str, ...]:
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values:
        raise ClaimError(claim="aud")
    result: list[str] = []
    for item in values:
        if not isinstance(item, str) or not item or _CONTROL.search(item):
            raise ClaimError(claim="aud")
        result.append(item)
    return tuple(result)


def _scopes(value: Json) -> frozenset[str]:
    if value is None or value == "":
        return frozenset()
    values = value.split(" ") if isinstance(value, str) else value
    if not isinstance(values, list):
        raise ClaimError(claim="scope")
    result: set[str] = set()
    for item in values:
        if not isinstance(item, str) or not item or " " in item or _CONTROL.search(item):
            raise ClaimError(claim="scope")
        result.add(item)
    return frozenset(result)


def _client(payload: Mapping[str, Json]) -> str | None:
    for name in CLIENT_MEMBERS:
        if name in payload:
            return _identifier(payload, name)
    return None
