"""
What the steps of the flow hand to each other.

Source: docs/architecture.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from kong_token_exchange.core.claims import (
    Claims,
)
from kong_token_exchange.core.decision import Relation
from kong_token_exchange.ports import (
    ExchangedToken,
)
from kong_token_exchange.protocol.exchange import (
    ActorToken,
    ExchangeResponse,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowResult:
    """
    What goes upstream.

    `exchanged` is None when the validated subject token itself is forwarded. `cache` is "miss"
    for the one request that made the exchange, "hit" for all that share its result, in whatever
    process. `notes` say
    what policy let pass and an auditor should know. `generation` is the key source's from before
    anything was judged. `actor` is who acts for the subject, where that was proven.
    """

    decision: Literal["exchange", "forward"]
    relation: Relation
    cache: Literal["hit", "miss", "none"]
    subject: Claims = field(repr=False)
    exchanged: ExchangedToken | None
    notes: tuple[str, ...] = ()
    generation: int = 0
    actor: Claims | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """The acting party's token; `claims` is None where it is configured and cannot be proven here."""

    sent: ActorToken = field(repr=False)
    key: str = field(repr=False)
    claims: Claims | None = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One exchange to be made, and what is noted about its result."""

    token: str = field(repr=False)
    subject: Claims = field(repr=False)
    relation: Relation
    subject_token_type: str
    token_endpoint: str
    actor: Actor | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """An answer of the token endpoint, and on both clocks when it was asked for."""

    response: ExchangeResponse
    sent_at: float
    sent_at_monotonic: float


def sent_of(actor: Actor | None) -> ActorToken | None:
    """Return what is sent of an actor."""
    return None if actor is None else actor.sent


def claims_of(actor: Actor | None) -> Claims | None:
    """Return what is proven of an actor."""
    return None if actor is None else actor.claims


def end_of(actor: Actor | None) -> float:
    """Return when an actor's token ends, NumericDate; infinity where that is not known."""
    claims = claims_of(actor)
    return math.inf if claims is None else claims.exp
