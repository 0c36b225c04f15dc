"""
Proving the result of an exchange: that it is what policy lets out, for this very subject.

Source: docs/architecture.md; docs/threats.md EXC rows; RFC 8693 section 2.2.
"""

from __future__ import annotations

from kong_token_exchange.config import PluginConfig
from kong_token_exchange.core.claims import (
    Claims,
    check_bearer,
    check_issuer,
    check_scopes_required,
    check_timestamps,
    check_type,
    forbidden_claim,
    meets_audience_required,
)
from kong_token_exchange.core.delegation import check_actors, is_actor
from kong_token_exchange.core.jws import check_algorithm, parse_compact, verify_signature
from kong_token_exchange.core.narrowing import check_same_subject, find_widening
from kong_token_exchange.errors import (
    ExchangedTokenError,
    InsufficientScopeError,
    InvalidTokenError,
)
from kong_token_exchange.flow.values import Actor, Order
from kong_token_exchange.flow.verification import TokenVerifier
from kong_token_exchange.ports import (
    Clock,
    Metrics,
)
from kong_token_exchange.protocol.exchange import (
    ExchangeResponse,
)


class ResultProof:
    """
    One configuration's judgement of exchanged tokens.

    Args:
        config: Says what may come out.
        verifier: Reads the target issuer's tokens.
        clock: Tells what is expired.
        metrics: Counts what is noted.
    """

    def __init__(
        self, config: PluginConfig, *, verifier: TokenVerifier, clock: Clock, metrics: Metrics
    ) -> None:
        self._config = config
        self._verifier = verifier
        self._clock = clock
        self._metrics = metrics

    def prove(
        self, order: Order, response: ExchangeResponse, *, deadline: float
    ) -> tuple[Claims | None, bytes | None]:
        """Require that the result is what policy lets out; note on *order* what it lets pass."""
        config = self._config
        now = self._clock.now()
        claims, fingerprint = None, None
        scopes = response.scopes
        if config.result.validation == "none":
            if scopes is None and config.request.scopes:
                # Left out means: as requested (RFC 6749 section 5.1).
                scopes = frozenset(config.request.scopes)
            self._check_unread(scopes)
        else:
            claims, fingerprint = self._read_result(response, now=now, deadline=deadline)
            proven = check_same_subject(
                config.result, relation=order.relation, subject=order.subject, result=claims
            )
            if not proven:
                order.notes.append("subject_unproven")
            if not meets_audience_required(claims, alternatives=config.audience_required):
                raise ExchangedTokenError(reason="result_audience")
            if (claim := forbidden_claim(claims, forbidden=config.claims_forbidden)) is not None:
                raise ExchangedTokenError(reason="result_claim_forbidden", facts={"claim": claim})
            check_scopes_required(claims, alternatives=config.scopes_required)
        self._check_narrowing(order, response, claims, scopes, now=now)
        if order.actor is not None:
            self._check_result_actor(order, order.actor, claims)
        for note in order.notes:
            self._metrics.count("result_notes", note=note)
        return claims, fingerprint

    def _check_result_actor(self, order: Order, actor: Actor, claims: Claims | None) -> None:
        """Require that the result names the very actor that was sent; note where it names nobody."""
        config = self._config
        if claims is not None and "act" not in claims.members:
            # Without `act` it is impersonation: more than what was asked for.
            delegation = config.flow is not None and config.flow.kind == "delegation"
            if config.actor.required or (delegation and config.result.narrowing == "enforce"):
                raise ExchangedTokenError(reason="result_actor_missing")
            order.notes.append("actor_not_in_result")
        elif claims is None or actor.claims is None:
            order.notes.append("actor_unproven")
        elif not is_actor(claims, actor.claims):
            raise ExchangedTokenError(reason="result_actor_differs", facts={"claim": "act"})

    def _check_unread(self, scopes: frozenset[str] | None) -> None:
        """Judge by the answer alone what is asked of a result that only its resource can read."""
        config = self._config
        if config.audience_required:
            raise ExchangedTokenError(reason="result_audience_unproven")
        if not config.scopes_required:
            return
        if scopes is None:
            raise ExchangedTokenError(reason="result_scope_unproven")
        if not any(wanted <= scopes for wanted in config.scopes_required):
            raise InsufficientScopeError(
                reason="scopes_required", scope=" ".join(sorted(config.scopes_required[0]))
            )

    def _check_narrowing(
        self,
        order: Order,
        response: ExchangeResponse,
        claims: Claims | None,
        scopes: frozenset[str] | None,
        *,
        now: float,
    ) -> None:
        config = self._config
        if config.result.narrowing == "off":
            return
        downscoping = config.flow is not None and config.flow.kind == "downscoping"
        found = find_widening(
            config.result,
            subject=order.subject,
            result=claims,
            answered_scopes=scopes,
            # Within one issuer the difference is noted even where nothing forbids it.
            downscoping=downscoping or order.relation == "same_issuer",
            now=now,
            leeway=config.leeway,
            requested_audience=frozenset((*config.request.audience, *config.request.resource)),
        )
        if claims is None:
            found += self._find_unread_widening(scopes, response.expires_in, downscoping=downscoping)
        order.notes.extend(found)
        forbids = {"scope_beyond_subject": downscoping, "audience_beyond_request": config.strict}
        forbidden = [word for word in found if forbids.get(word, True)]
        if forbidden and config.result.narrowing == "enforce":
            raise ExchangedTokenError(
                reason="result_wider_than_policy", facts={"widening": ",".join(forbidden)}
            )

    def _find_unread_widening(
        self, scopes: frozenset[str] | None, expires_in: int | None, *, downscoping: bool
    ) -> tuple[str, ...]:
        """List the limits that an unread result breaks by its `expires_in`, or cannot be shown to keep."""
        config, policy = self._config, self._config.result
        found = []
        if scopes is None and (downscoping or policy.allowed_scopes is not None):
            found.append("scope_unproven")
        if policy.max_lifetime is not None and expires_in is None:
            found.append("lifetime_unproven")
        elif policy.max_lifetime is not None and (expires_in or 0) > policy.max_lifetime + config.leeway:
            found.append("lifetime_not_allowed")
        return tuple(found)

    def _read_result(
        self, response: ExchangeResponse, *, now: float, deadline: float
    ) -> tuple[Claims, bytes | None]:
        """Verify the exchanged token as strictly as a subject token of the target issuer."""
        config, rules = self._config, self._config.target_rules
        fingerprint = None
        try:
            jws = parse_compact(response.access_token.reveal(), max_bytes=config.max_token_size)
            if config.result.validation == "full":
                check_algorithm(jws, algorithms=rules.algorithms)
                key = self._verifier.select_key(jws, self._verifier.target, deadline)
                verify_signature(jws, key, algorithms=rules.algorithms)
                fingerprint = key.fingerprint
            claims = self._verifier.parse_claims_of(jws)
            check_issuer(claims, expected=config.target.issuer)
            check_timestamps(claims, now=now, leeway=config.leeway)
            check_type(claims, typ=jws.typ, accepted=rules.typ)
            check_bearer(claims)
            check_actors(claims, max_depth=config.actor.max_chain_depth)
        except InvalidTokenError as error:
            # The caller's token was good; what came out of the exchange is not.
            raise ExchangedTokenError(reason="result_" + error.reason, facts=error.facts) from None
        return claims, fingerprint
