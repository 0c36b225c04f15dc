"""FAULT-60 to FAULT-70: the second cache level in Redis, which does not exist yet."""

from __future__ import annotations

from tests.chaos.run import Row

REASON = "not yet: there is no second cache level"

_FAULTS = (
    ("60", "down at start", "200 by exchange; reconnect within 5 s"),
    ("61", "killed under load", "200; at most its small timeout slower until its breaker opens"),
    ("62", "slow, 5 s", "as 61"),
    ("63", "restarted", "no error visible"),
    ("64", "FLUSHALL with 1,000 hot tokens", "200; at most 1,000 exchanges"),
    ("65", "poisoned: random bytes, another key's value, truncated, old version", "a miss; 200 by exchange"),
    ("66", "NOAUTH, READONLY, OOM, LOADING, MOVED", "as 61"),
    ("67", "wrong TLS certificate", "as down; never plain text"),
    ("68", "a value of 50 MB", "bounded read, a miss"),
    ("69", "TTL lost, entry expired", "`exp` is checked: a miss"),
    ("70", "replica lag, failover", "miss, or hit of a valid entry"),
)

ROWS = tuple(
    Row(
        id=f"FAULT-{number}",
        section="Redis (second level)",
        fault=fault,
        expected=expected,
        upstream="exchanged tokens only",
        reason=REASON,
    )
    for number, fault, expected in _FAULTS
)
