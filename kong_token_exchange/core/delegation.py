"""
Delegation: who acts for the subject, in the tokens that come in and in the one that comes out.

A party is known by `sub` or by its client, together with `iss` where that is named. Everything
here works on verified claims; the flow decides when it is asked.

Source: RFC 8693 sections 1.1, 4.1 and 4.4; docs/adr/0011-delegation.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from kong_token_exchange.core.claims import CLIENT_MEMBERS, Claims, is_identifier
from kong_token_exchange.core.strict_json import Json
from kong_token_exchange.errors import ClaimError

# What says who somebody is. An `iss` alone names everybody at that issuer, and so nobody.
_NAMING = ("sub", *CLIENT_MEMBERS)
_IDENTITY = ("iss", *_NAMING)

# RFC 8693 section 4.4: these have no meaning inside of `may_act` and are not used.
_NOT_USED = frozenset({"exp", "nbf", "aud"})


def check_actors(claims: Claims, *, max_depth: int) -> None:
    """
    Require that `act`, where it is, is a chain of objects that is not too long.

    Each exchange adds a link, so the bound also ends a loop of exchanges.

    Args:
        claims: Verified claims, of any token.
        max_depth: Most actors, the current one included.

    Raises:
        ClaimError: a link is no object, is empty, names a party by anything but text, or there
            are too many of them.

    Source: RFC 8693 section 4.1.
    """
    members, depth = claims.members, 0
    while "act" in members:
        act = members["act"]
        depth += 1
        if not isinstance(act, Mapping) or not act or depth > max_depth:
            raise ClaimError(claim="act", facts={"depth": depth})
        if not all(is_identifier(act[name]) for name in _IDENTITY if name in act):
            raise ClaimError(claim="act", facts={"depth": depth})
        members = act


def may_act(subject: Claims, actor: Claims) -> bool:
    """
    Tell whether the subject token's `may_act` names this actor.

    Without the claim nobody is named, and an empty one names nobody either. Every member must
    equal the actor's claim of that name, whatever it is called; a client may be spelled otherwise
    in the actor's token. Without `iss` the actor must be of the subject token's issuer, because a
    `sub` is unique there alone.

    Source: RFC 8693 section 4.4; RFC 7519 section 4.1.2.
    """
    named = subject.members.get("may_act")
    if not isinstance(named, Mapping) or not any(name in named for name in _NAMING):
        return False
    if "iss" not in named and actor.iss != subject.iss:
        return False
    return all(_equal(value, _claim(actor, name)) for name, value in named.items() if name not in _NOT_USED)


def is_actor(result: Claims, actor: Claims) -> bool:
    """
    Tell whether the outermost `act` of the result names this actor.

    What it says beside `iss`, `sub` and the client is about that party and not compared.

    Source: RFC 8693 section 4.1.
    """
    act = result.members.get("act")
    if not isinstance(act, Mapping) or not any(name in act for name in _NAMING):
        return False
    return all(_equal(act[name], _claim(actor, name)) for name in _IDENTITY if name in act)


def _claim(actor: Claims, name: str) -> Json:
    if name in CLIENT_MEMBERS and name not in actor.members:
        return actor.client
    return actor.members.get(name)


def _equal(one: Json, other: Json) -> bool:
    # Exact types: to Python True is 1 and 1 is 1.0. An empty text names nobody.
    return type(one) in (str, int) and type(one) is type(other) and one == other and one != ""
