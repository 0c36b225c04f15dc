"""
The decision: verified claims and policy in, Forward or Exchange out.

Source: design of Kong openid-connect 3.16 `token_exchange`: a foreign issuer's token is
always exchanged, one of the target issuer's own where an entry's conditions all match.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from kong_token_exchange.core.claims import Claims
from kong_token_exchange.core.policy import Conditions, SubjectTokenIssuer
from kong_token_exchange.errors import UnknownIssuerError

Relation = Literal["same_issuer", "cross_issuer"]


@dataclass(frozen=True, slots=True)
class Forward:
    """The validated token goes upstream as it is: it is the target issuer's, and no entry asks for more."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """
    The token must be exchanged.

    `relation` says whether it stays with its issuer, `entry` which configured entry asks for it.
    """

    relation: Relation
    entry: SubjectTokenIssuer


Decision = Forward | Exchange


def trusted_issuer(
    iss: object, *, issuers: Sequence[SubjectTokenIssuer], target: SubjectTokenIssuer
) -> SubjectTokenIssuer:
    """
    Return how tokens of *iss* are proven: its first entry, or the target's own profile.

    Args:
        iss: The unverified `iss` member, of any type; used as a key and for nothing else.
        issuers: The configured entries, in order.
        target: The profile of the target issuer where no entry names it.

    Raises:
        UnknownIssuerError: not a configured issuer; compared as exact strings.

    Source: RFC 8725 section 3.10.
    """
    if isinstance(iss, str):
        for entry in issuers:
            if entry.issuer == iss:
                return entry
        if iss == target.issuer:
            return target
    raise UnknownIssuerError(reason="issuer_unknown")


def decide(claims: Claims, *, issuers: Sequence[SubjectTokenIssuer], target_issuer: str) -> Decision:
    """
    Decide what happens to a verified token of a configured issuer.

    The first entry of the target issuer whose conditions all match asks for the exchange.
    An entry of the target issuer without conditions never matches: nothing is vacuously true.
    A token of any other issuer is exchanged as that issuer's first entry says; conditions are
    not for it.

    Raises:
        UnknownIssuerError: no entry is for the token's issuer, and it is not the target either.
    """
    for entry in issuers:
        if entry.issuer != claims.iss:
            continue
        if claims.iss != target_issuer:
            return Exchange("cross_issuer", entry)
        if entry.conditions is not None and conditions_match(claims, entry.conditions):
            return Exchange("same_issuer", entry)
    if claims.iss != target_issuer:
        raise UnknownIssuerError(reason="issuer_unknown")
    return Forward()


def conditions_match(claims: Claims, conditions: Conditions) -> bool:
    """Tell whether conditions are set and every one of them holds for these claims."""
    return bool(conditions) and (
        _all_present(conditions.has_audience, claims.aud)
        and _one_absent(conditions.missing_audience, claims.aud)
        and _all_present(conditions.has_scopes, claims.scopes)
        and _one_absent(conditions.missing_scopes, claims.scopes)
    )


def _all_present(listed: Sequence[str], present: Collection[str]) -> bool:
    return all(value in present for value in listed)


def _one_absent(listed: Sequence[str], present: Collection[str]) -> bool:
    return not listed or any(value not in present for value in listed)
