"""
Narrowing and same subject: what came out of an exchange against what policy lets out.

Both are judged on verified claims of the result, and on the answer's own `scope`, since
a server may say one thing in the answer and another in the token.

Source: docs/configuration.md `token_exchange.result`; RFC 8693 sections 2.2.1 and 5.
"""

from __future__ import annotations

from collections.abc import Sequence

from kong_token_exchange.core.claims import Claims
from kong_token_exchange.core.decision import Relation
from kong_token_exchange.core.policy import ClaimPair, ResultPolicy
from kong_token_exchange.errors import ExchangedTokenError


def find_widening(
    policy: ResultPolicy,
    *,
    subject: Claims,
    result: Claims | None,
    answered_scopes: frozenset[str] | None,
    downscoping: bool,
    now: float,
    leeway: float = 0.0,
    requested_audience: frozenset[str] = frozenset(),
) -> tuple[str, ...]:
    """
    List where a result is wider than policy allows, as stable words for audit and error.

    Scopes count in whatever spelling the result names them. A result that names no audience is
    for anybody, so it is beyond every `allowed_audience`. What is not read is not judged: with
    `validation: none` only the answer's own `scope` is.

    Args:
        policy: The limits that are set.
        subject: Verified claims of the subject token.
        result: Verified claims of the result; None where it is not read (`validation: none`).
        answered_scopes: Scopes of the token response; None if it named none.
        downscoping: Whether the flow promises a subset of the subject's scopes.
        now: NumericDate, seconds.
        leeway: Tolerated clock difference, seconds.
        requested_audience: What was asked for by `audience` and `resource`; empty for nothing. Where
            `allowed_audience` is set, that is the limit instead.

    Returns:
        Any of `scope_not_allowed`, `audience_not_allowed`, `lifetime_not_allowed`,
        `scope_beyond_subject`, `audience_beyond_request`; empty when the result is within every limit.
    """
    scopes = answered_scopes or frozenset()
    if result is not None:
        scopes = scopes | result.scopes | result.other_scopes
    found: list[str] = []
    if policy.allowed_scopes is not None and not scopes <= policy.allowed_scopes:
        found.append("scope_not_allowed")
    if result is not None:
        if policy.allowed_audience is not None and not _within(result, policy.allowed_audience):
            found.append("audience_not_allowed")
        if policy.max_lifetime is not None and result.exp - now > policy.max_lifetime + leeway:
            found.append("lifetime_not_allowed")
    if downscoping and not scopes <= subject.scopes:
        found.append("scope_beyond_subject")
    # A server may know an audience by another name than its token's `aud` (RFC 8693 section 2.1):
    # whether this forbids anything is for the caller to say.
    asked = requested_audience if policy.allowed_audience is None else None
    if asked and result is not None and not _within(result, asked):
        found.append("audience_beyond_request")
    return tuple(found)


def check_same_subject(policy: ResultPolicy, *, relation: Relation, subject: Claims, result: Claims) -> bool:
    """
    Require that the result speaks of the subject token's subject.

    A pair is equal when both are the same text, or the same whole number; two empty texts, two
    lists or two booleans name nobody.

    Returns:
        True when that was proven, False when policy asks for no proof.

    Raises:
        ExchangedTokenError: a compared pair of claims differs or is absent.

    Source: RFC 8693 section 1.1 (impersonation and delegation keep the subject).
    """
    pairs = _subject_pairs(policy, relation)
    for pair in pairs:
        wanted, found = subject.members.get(pair.subject_claim), result.members.get(pair.result_claim)
        # Exact types: to Python True is 1 and 1 is 1.0.
        if not wanted or type(wanted) not in (str, int) or type(found) is not type(wanted) or found != wanted:
            raise ExchangedTokenError(reason="subject_differs", facts={"claim": pair.result_claim})
    return bool(pairs)


def _within(result: Claims, allowed: frozenset[str]) -> bool:
    # Where `audience_claim` names another member, the standard one is judged, too: the upstream reads it.
    standard = result.members.get("aud")
    named = standard if isinstance(standard, list) else [] if standard is None else [standard]
    return (
        bool(result.aud)
        and allowed.issuperset(result.aud)
        # Nobody has judged the type of that one.
        and all(isinstance(value, str) and value in allowed for value in named)
    )


def _subject_pairs(policy: ResultPolicy, relation: Relation) -> Sequence[ClaimPair]:
    match policy.same_subject:
        case None | ():
            return (_SUB,) if relation == "same_issuer" else ()
        case "sub":
            return (_SUB,)
        case "off":
            return ()
        case pairs:
            return pairs


_SUB = ClaimPair(subject_claim="sub", result_claim="sub")
