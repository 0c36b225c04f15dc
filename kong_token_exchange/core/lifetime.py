"""
Until when an exchanged token may be reused, or not at all, and from when on it is renewed.

Source: RFC 8693 section 2.2.1; RFC 7519 section 4.1.4; ADR 0005.
"""

from __future__ import annotations

# A token in use is renewed within this part of its life; the spread keeps those that were made together
# from being renewed together.
REFRESH_FROM = 0.8
REFRESH_SPREAD = 0.1

# A token that lives shorter than this, seconds, is exchanged when it is needed.
MIN_LIFE_TO_REFRESH_S = 10.0


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


def refresh_instant(
    *, now: float, reuse_until: float | None, subject_end: float, spread: float
) -> float | None:
    """
    Return from when on a token in use is renewed ahead of its end.

    Args:
        now: NumericDate, seconds, from which *reuse_until* was counted.
        reuse_until: NumericDate, as `reuse_deadline` gave it.
        subject_end: NumericDate after which the subject token gives no new one, margin included.
        spread: From 0 to 1, another one for each token.

    Returns:
        NumericDate, or None where a new one would hardly be good for longer: the subject token
        bounds both, or the life is too short.
    """
    if reuse_until is None:
        return None
    life = reuse_until - now
    begin = life * (REFRESH_FROM + REFRESH_SPREAD * spread)
    if life < MIN_LIFE_TO_REFRESH_S or subject_end - reuse_until < life - begin:
        return None
    return now + begin
