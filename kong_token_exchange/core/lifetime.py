"""
Until when an exchanged token may be reused, or not at all.

Source: RFC 8693 section 2.2.1; RFC 7519 section 4.1.4; ADR 0005.
"""

from __future__ import annotations


def reuse_deadline(
    *,
    now: float,
    expires_in: int | None,
    result_exp: float | None,
    subject_exp: float,
    ttl: float,
    max_lifetime: float | None,
    margin: float,
) -> float | None:
    """
    Return the last instant before which an exchanged token may be handed out again.

    Args:
        now: NumericDate, seconds.
        expires_in: Lifetime from the token response, seconds; None if absent.
        result_exp: `exp` of the exchanged token, NumericDate; None for one that was not read.
        subject_exp: `exp` of the verified subject token, NumericDate.
        ttl: Configured bound, seconds.
        max_lifetime: Policy's bound on an exchanged token's life, seconds; None for none.
        margin: Seconds kept free before the earliest of these.

    Returns:
        NumericDate, or None when nothing is left, or when the result has no expiry of its own.
    """
    if expires_in is None and result_exp is None:
        return None
    bounds = [subject_exp, now + ttl]
    if expires_in is not None:
        bounds.append(now + expires_in)
    if result_exp is not None:
        bounds.append(result_exp)
    if max_lifetime is not None:
        bounds.append(now + max_lifetime)
    deadline = min(bounds) - margin
    return deadline if deadline > now else None
