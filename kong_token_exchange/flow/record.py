"""
What is told of a decision: one audit event and one count, without any token.

Source: docs/security.md, what is logged; docs/operations.md.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence

from kong_token_exchange.config import PluginConfig
from kong_token_exchange.core.cache_key import digest_fields
from kong_token_exchange.core.claims import (
    Claims,
)
from kong_token_exchange.core.decision import Relation
from kong_token_exchange.core.possession import (
    proven_members,
)
from kong_token_exchange.errors import (
    Fact,
    TokenExchangeError,
)
from kong_token_exchange.flow.values import FlowResult, Order, claims_of
from kong_token_exchange.ports import (
    AuditEvent,
    AuditSink,
    ExchangedToken,
    Metrics,
)


class Recorder:
    """
    One configuration's words for audit and metrics.

    Args:
        config: Names the flow, and keys the pseudonyms.
        audit: Takes the events.
        metrics: Takes the counts.
    """

    def __init__(self, config: PluginConfig, *, audit: AuditSink, metrics: Metrics) -> None:
        self._config = config
        self._audit = audit
        self._metrics = metrics

    def refusal(
        self, error: TokenExchangeError, *, subject: Claims | None = None, actor: Claims | None = None
    ) -> None:
        """Audit and count one refusal; *subject* and *actor* once their tokens are proven."""
        self._metrics.count("requests", outcome="refuse", reason=error.reason)
        parties = self._party_facts(subject, actor)
        self._audit_refusal(error, {**parties, **error.facts})

    def renewal_refused(self, error: TokenExchangeError, order: Order) -> None:
        """Audit a renewal ahead of its token's end that failed; no request was refused."""
        parties = self._party_facts(order.subject, claims_of(order.actor))
        self._audit_refusal(error, {**parties, **error.facts, "refresh": True})

    def _audit_refusal(self, error: TokenExchangeError, facts: Mapping[str, Fact]) -> None:
        self._audit.record(
            AuditEvent(outcome="refuse", reason=error.reason, status=error.status, facts=self._facts(facts))
        )

    def result(self, result: FlowResult) -> None:
        """Count a request that goes on, and audit it unless a cached token serves it."""
        self._metrics.count("requests", outcome=result.decision, reason=result.relation, cache=result.cache)
        if result.cache == "hit":
            # The exchange that filled the cache was recorded; a hit is counted only.
            return
        facts = self._result_facts(
            result.relation, result.subject, result.actor, result.exchanged, result.notes
        )
        if self._config.possession and result.subject.sender_constrained:
            facts["proven"] = proven_members(result.subject)
        self._audit.record(
            AuditEvent(outcome=result.decision, reason=result.relation, status=200, facts=self._facts(facts))
        )

    def renewal(self, order: Order, renewed: ExchangedToken) -> None:
        """Audit a renewal ahead of its token's end."""
        facts = self._result_facts(
            order.relation, order.subject, claims_of(order.actor), renewed, order.notes
        )
        facts["refresh"] = True
        self._audit.record(
            AuditEvent(outcome="exchange", reason=order.relation, status=200, facts=self._facts(facts))
        )

    def _result_facts(
        self,
        relation: Relation,
        subject: Claims,
        actor: Claims | None,
        exchanged: ExchangedToken | None,
        notes: Sequence[str],
    ) -> dict[str, Fact]:
        facts = {"relation": relation, **self._party_facts(subject, actor)}
        if exchanged is not None and exchanged.claims is not None:
            facts["aud"] = " ".join(exchanged.claims.aud)[:200]
            facts["scope"] = " ".join(sorted(exchanged.claims.scopes))[:200]
        if notes:
            facts["notes"] = ",".join(notes)
        return facts

    def _party_facts(self, subject: Claims | None, actor: Claims | None) -> dict[str, Fact]:
        identity = self._config.identity
        return {**subject_facts(identity, subject), **actor_facts(identity, actor)}

    def _facts(self, facts: Mapping[str, Fact]) -> dict[str, Fact]:
        flow = self._config.flow
        names = {"flow": flow.name, "kind": flow.kind, "owner": flow.owner} if flow else {}
        return {**names, **facts}


def subject_facts(identity: str, subject: Claims | None) -> dict[str, Fact]:
    """Name issuer, client and subject, the last by a digest that only this configuration makes."""
    if subject is None:
        return {}
    return {"iss": subject.iss, "client": subject.client, "subject": _pseudonym(identity, subject)}


def actor_facts(identity: str, actor: Claims | None) -> dict[str, Fact]:
    """Name the acting party in the same way."""
    if actor is None:
        return {}
    return {"actor_iss": actor.iss, "actor_client": actor.client, "actor": _pseudonym(identity, actor)}


def _pseudonym(identity: str, party: Claims) -> str:
    material = digest_fields((party.iss, party.sub))
    return hmac.new(identity.encode("ascii"), material, hashlib.sha256).hexdigest()[:16]
