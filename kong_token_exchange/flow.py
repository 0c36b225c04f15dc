"""
The access pipeline, in its one true order.

Signature, then claims, then decision, then exchange, then the proof of the result. The same
code runs twice for a cold request: first on the event loop with memory alone (`deadline` None,
left by `NotInMemoryError`), then in a pool thread that may wait. Nothing is skipped in either.

Source: docs/architecture.md; RFC 8693; RFC 8725.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from zlib import crc32

from kong_token_exchange.config import ClientCredentials, PluginConfig
from kong_token_exchange.core.cache_key import digest_fields
from kong_token_exchange.core.claims import (
    Claims,
    check_audience,
    check_bearer,
    check_client,
    check_issuer,
    check_required_claims,
    check_scopes_required,
    check_timestamps,
    check_type,
    forbidden_claim,
    meets_audience_required,
    parse_claims,
)
from kong_token_exchange.core.decision import Exchange, Forward, Relation, decide, trusted_issuer
from kong_token_exchange.core.delegation import check_actors, is_actor, may_act
from kong_token_exchange.core.dpop import Proof, verify_proof
from kong_token_exchange.core.jwk import Jwk, select_verification_key
from kong_token_exchange.core.jws import Jws, check_algorithm, parse_compact, verify_signature
from kong_token_exchange.core.lifetime import refresh_instant, reuse_deadline
from kong_token_exchange.core.narrowing import check_same_subject, find_widening
from kong_token_exchange.core.policy import TOKEN_TYPE_ID_TOKEN, PossessionPolicy, SubjectTokenIssuer
from kong_token_exchange.core.possession import (
    NO_EVIDENCE,
    Evidence,
    check_certificate,
    check_scheme,
    proven_members,
    required_confirmation,
)
from kong_token_exchange.errors import (
    AccessDeniedError,
    ClientRefusedError,
    DeadlineError,
    ExchangedTokenError,
    Fact,
    InsufficientScopeError,
    InvalidTokenError,
    IssuerUnavailableError,
    KeySelectionError,
    RejectionError,
    TokenExchangeError,
    UnknownIssuerError,
)
from kong_token_exchange.lease import LEASE_S, Leases, Terms
from kong_token_exchange.ports import (
    AuditEvent,
    AuditSink,
    ClientSecrets,
    Clock,
    ExchangedToken,
    HttpSender,
    IssuerEndpoints,
    KeySource,
    Metrics,
    NotInMemoryError,
    ProofMemory,
    Refresher,
    SharedCache,
    TokenCache,
    VerifiedToken,
)
from kong_token_exchange.protocol.client_auth import (
    ClientAuthentication,
    client_secret_basic,
    client_secret_post,
    public_client,
)
from kong_token_exchange.protocol.exchange import (
    LASTING_REFUSALS,
    MAX_RESPONSE_BYTES,
    ActorToken,
    ExchangeResponse,
    build_exchange_request,
    process_exchange_response,
)
from kong_token_exchange.protocol.http_message import HttpRequest
from kong_token_exchange.protocol.shared_grant import build_shared_grant, process_shared_grant
from kong_token_exchange.secret import Secret

# What an issuer says of a wrong secret (RFC 6749 section 5.2; the second is Keycloak's word).
_SECRET_REFUSED = ("invalid_client", "unauthorized_client")

# Kept free before a cached token's end, seconds: the time a request takes to reach the upstream
# and be judged there by a clock of its own.
REUSE_MARGIN_S = 5.0


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
class _Actor:
    """The acting party's token; `claims` is None where it is configured and cannot be proven here."""

    sent: ActorToken = field(repr=False)
    key: str = field(repr=False)
    claims: Claims | None = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """One exchange to be made, and what is noted about its result."""

    token: str = field(repr=False)
    subject: Claims = field(repr=False)
    relation: Relation
    subject_token_type: str
    token_endpoint: str
    actor: _Actor | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grant:
    """An answer of the token endpoint, and on both clocks when it was asked for."""

    response: ExchangeResponse
    sent_at: float
    sent_at_monotonic: float


class Flow:
    """
    One plugin configuration's pipeline over shared ports.

    `shared` and `secrets` are given only where they are configured.
    """

    def __init__(
        self,
        config: PluginConfig,
        *,
        sender: HttpSender,
        keys: KeySource,
        cache: TokenCache,
        clock: Clock,
        audit: AuditSink,
        metrics: Metrics,
        proofs: ProofMemory,
        shared: SharedCache | None = None,
        refresher: Refresher | None = None,
        secrets: ClientSecrets | None = None,
    ) -> None:
        self._config = config
        self._proofs = proofs
        # None where nothing is proven: what is asked of every request then costs nothing.
        self._possession = config.possession or None
        self._sender = sender
        self._keys = keys
        self._cache = cache
        self._shared = shared
        # An assertion may be good for one use: it is never sent again unasked.
        renews = config.cache.refresh_ahead and config.request.grant_type == "token_exchange"
        self._refresher = refresher if renews else None
        self._clock = clock
        self._audit = audit
        self._metrics = metrics
        self._secrets = secrets
        self._target = IssuerEndpoints(
            issuer=config.target.issuer,
            discovery_url=config.target.discovery_url,
            jwks_uri=config.target.jwks_uri,
            token_endpoint=config.target.token_endpoint,
        )
        self._endpoints = {entry.issuer: _endpoints_of(entry) for entry in reversed(config.issuers)}
        self._endpoints[config.target.issuer] = self._target

    def run(
        self,
        token: str,
        *,
        deadline: float | None,
        actor_token: str | None = None,
        evidence: Evidence = NO_EVIDENCE,
    ) -> FlowResult:
        """
        Take one subject token through the pipeline.

        Args:
            token: The credential, already of b64token form.
            deadline: Monotonic instant by which everything ends; None to use memory alone.
            actor_token: What the actor's header held, already of b64token form.
            evidence: What came with it to prove possession; read where the configuration asks for it.

        Raises:
            NotInMemoryError: *deadline* is None and the network would be needed.
            TokenExchangeError: the request is refused; every refusal has been audited.
        """
        subject: Claims | None = None
        actor: _Actor | None = None
        now, generation = self._clock.now(), self._keys.generation
        token_key = digest_fields((self._config.identity, token))
        try:
            verified, known = self._verified_subject(token, token_key, now=now, deadline=deadline)
            subject = verified.claims
            proof = None
            if self._possession is not None:
                proof = self._prove_possession(self._possession, subject, token, evidence, now=now)
            decision = self._decide(subject)
            if not known:
                # Only now: a token that is refused anyway must not push out those in use (CACHE-18).
                self._cache.store_verified(token_key, verified)
            if proof is not None and deadline is not None:
                self._proofs.use(proof.key, iat=proof.iat, now=now)
            if isinstance(decision, Exchange):
                actor = self._actor(actor_token, subject, now=now, deadline=deadline)
            result = self._act(token, token_key, subject, decision, actor, now=now, deadline=deadline)
            if proof is not None and deadline is None:
                # Only now: a request that goes on to the pool comes by here once more.
                self._proofs.use(proof.key, iat=proof.iat, now=now)
        except TokenExchangeError as error:
            self.record_refusal(error, subject=subject, actor=_claims_of(actor))
            raise
        self._record_result(result)
        return replace(result, generation=generation)

    def repeat(self, result: FlowResult) -> FlowResult:
        """
        Hand a result that was exchanged just now to one more request with the same token.

        Counted like a hit, as for whoever waits for an exchange; the tokens' times are judged anew.

        Raises:
            TokenExchangeError: the time of the subject or the actor is over by now; the refusal has
                been audited.
        """
        subject, now, leeway = result.subject, self._clock.now(), self._config.leeway
        try:
            for claims in (subject,) if result.actor is None else (subject, result.actor):
                max_age = self._trust(claims.iss).max_age
                check_timestamps(claims, now=now, leeway=leeway, max_age=max_age)
        except TokenExchangeError as error:
            self.record_refusal(error, subject=subject, actor=result.actor)
            raise
        repeated = replace(result, cache="hit") if result.exchanged is not None else result
        self._record_result(repeated)
        return repeated

    def known_subject(self, token: str) -> Claims | None:
        """Return the claims of a token that was proven before and is still known, for an audit event."""
        verified = self._cache.verified(digest_fields((self._config.identity, token)))
        return None if verified is None else verified.claims

    def terms(self, result: FlowResult) -> Terms | None:
        """
        Say within what the same request gets the same result; None where each must be judged.

        A forwarded token and a fresh exchange are audited one by one. All else that `run` judges
        comes from the token and the configuration alone, or is one of these terms.
        """
        exchanged, subject, leeway = result.exchanged, result.subject, self._config.leeway
        if result.cache != "hit" or exchanged is None or exchanged.reuse_until is None:
            return None
        issuers, begins, ends = {self._target}, [0.0], [exchanged.reuse_until]
        for claims in (subject,) if result.actor is None else (subject, result.actor):
            trust = self._trust(claims.iss)
            issuers.add(self._endpoints[trust.issuer])
            begins += [value - leeway for value in (claims.nbf, claims.iat) if value is not None]
            ends.append(claims.exp + leeway)
            if trust.max_age is not None:
                if claims.iat is None:
                    return None
                ends.append(claims.iat + trust.max_age + leeway)
        return Terms(
            begins=max(begins),
            ends=min(ends),
            ends_monotonic=min(
                self._clock.monotonic() + LEASE_S,
                exchanged.reuse_until_monotonic,
                # Each try puts this off, so it is ahead: the hit that has the token renewed is judged.
                exchanged.refresh_at_monotonic,
                *(self._keys.settled_until(endpoints) for endpoints in issuers),
            ),
            generation=result.generation,
            exchanged=exchanged,
        )

    def leases(self) -> Leases[Any]:
        """Return an empty set of leases over this flow's clock and keys."""
        return Leases(self._clock, self._keys)

    def hit_counter(self, result: FlowResult) -> Callable[[], None]:
        """Return what counts one more hit like *result*."""
        return self._metrics.counter(
            "requests", outcome=result.decision, reason=result.relation, cache=result.cache
        )

    def _decide(self, subject: Claims) -> Forward | Exchange:
        decision = decide(subject, issuers=self._config.issuers, target_issuer=self._config.target.issuer)
        if isinstance(decision, Forward):
            self._check_forward(subject)
        return decision

    def _act(
        self,
        token: str,
        token_key: bytes,
        subject: Claims,
        decision: Forward | Exchange,
        actor: _Actor | None,
        *,
        now: float,
        deadline: float | None,
    ) -> FlowResult:
        match decision:
            case Forward():
                return FlowResult(
                    decision="forward", relation="same_issuer", cache="none", subject=subject, exchanged=None
                )
            case Exchange():
                return self._exchange(token, token_key, subject, decision, actor, now=now, deadline=deadline)

    # --- the subject token ------------------------------------------------------------

    def _verified_subject(
        self, token: str, token_key: bytes, *, now: float, deadline: float | None
    ) -> tuple[VerifiedToken, bool]:
        """Return the token once it is verified and judged, and whether it was remembered."""
        config = self._config
        verified, trust, known = self._verified(token, token_key, deadline)
        claims = verified.claims
        check_timestamps(claims, now=now, leeway=config.leeway, max_age=trust.max_age)
        # An ID token only where the exchange declares one, and never of the target: it could be forwarded.
        id_token = trust.subject_token_type == TOKEN_TYPE_ID_TOKEN and trust.issuer != config.target.issuer
        check_type(claims, typ=verified.typ, accepted=trust.typ, id_token=id_token)
        if self._possession is None:
            check_bearer(claims)
        check_audience(claims, accepted=trust.audience)
        check_required_claims(claims, required=trust.required_claims)
        check_client(claims, allowed=trust.clients)
        return verified, known

    def _verified(
        self, token: str, token_key: bytes, deadline: float | None
    ) -> tuple[VerifiedToken, SubjectTokenIssuer, bool]:
        """Return a token whose signature is verified, how its issuer is trusted, and whether it was known."""
        verified = self._cache.verified(token_key)
        if verified is not None:
            trust = self._trust(verified.claims.iss)
            # The key that verified it must still be the issuer's.
            if self._still_trusted(verified, trust, deadline):
                return verified, trust, True
        return *self._verify(token, deadline), False

    def _prove_possession(
        self, policy: PossessionPolicy, subject: Claims, token: str, evidence: Evidence, *, now: float
    ) -> Proof | None:
        """Require proof of each key that the token is bound to; a DPoP proof is still to be used up."""
        bound = required_confirmation(subject, policy=policy)
        check_scheme(evidence, bound=bound)
        if bound.x5t_s256 is not None:
            check_certificate(evidence, x5t_s256=bound.x5t_s256)
        if bound.jkt is None:
            return None
        return verify_proof(
            evidence.proof,
            access_token=token,
            jkt=bound.jkt,
            method=evidence.method,
            path=evidence.path,
            origins=evidence.origins,
            now=now,
            lifetime=policy.proof_lifetime_s,
        )

    def _trust(self, iss: object) -> SubjectTokenIssuer:
        return trusted_issuer(iss, issuers=self._config.issuers, target=self._config.target_rules)

    def _still_trusted(
        self, verified: VerifiedToken, trust: SubjectTokenIssuer, deadline: float | None
    ) -> bool:
        if verified.fingerprint is None:
            return not trust.verify_signature
        return self._keys.keys(self._endpoints[trust.issuer], deadline=deadline).holds(verified.fingerprint)

    def _verify(self, token: str, deadline: float | None) -> tuple[VerifiedToken, SubjectTokenIssuer]:
        jws = parse_compact(token, max_bytes=self._config.max_token_size)
        trust = self._trust(jws.payload.get("iss"))
        check_algorithm(jws, algorithms=trust.algorithms)
        key = None
        if trust.verify_signature:
            key = self._select_key(jws, self._endpoints[trust.issuer], deadline)
            verify_signature(jws, key, algorithms=trust.algorithms)
        claims = self._parse_claims(jws)
        check_issuer(claims, expected=trust.issuer)
        check_actors(claims, max_depth=self._config.actor.max_chain_depth)
        fingerprint = key.fingerprint if key is not None else None
        return VerifiedToken(claims=claims, typ=jws.typ, fingerprint=fingerprint), trust

    def _select_key(self, jws: Jws, endpoints: IssuerEndpoints, deadline: float | None) -> Jwk:
        jwks = self._keys.keys(endpoints, deadline=deadline)
        try:
            return select_verification_key(jwks, alg=jws.alg, kid=jws.kid)
        except KeySelectionError as error:
            if error.reason != "key_not_found":
                raise
            newer = self._keys.newer_keys(endpoints, deadline=deadline)
            if newer is None:
                raise
        return select_verification_key(newer, alg=jws.alg, kid=jws.kid)

    def _parse_claims(self, jws: Jws) -> Claims:
        config = self._config
        return parse_claims(
            jws.payload, audience_claim=config.audience_claim, scopes_claim=config.scopes_claim
        )

    def _check_forward(self, subject: Claims) -> None:
        config = self._config
        if not meets_audience_required(subject, alternatives=config.audience_required):
            raise AccessDeniedError(reason="audience_required")
        check_scopes_required(subject, alternatives=config.scopes_required)
        if (claim := forbidden_claim(subject, forbidden=config.claims_forbidden)) is not None:
            raise AccessDeniedError(reason="claim_forbidden", facts={"claim": claim})
        if config.actor.required and "act" not in subject.members:
            raise AccessDeniedError(reason="actor_missing")

    # --- the actor token --------------------------------------------------------------

    def _actor(
        self, offered: str | None, subject: Claims, *, now: float, deadline: float | None
    ) -> _Actor | None:
        """Return who acts for the subject, proven as far as that can be; None where nobody does."""
        policy = self._config.actor
        token = offered if policy.source == "header" else None
        if policy.static_token is not None:
            token = policy.static_token.reveal()
        if token is None:
            if policy.required:
                raise AccessDeniedError(reason="actor_missing")
            return None
        token_key = digest_fields((self._config.identity, token))
        claims = None
        if policy.verified:
            try:
                claims = self._verified_actor(token, token_key, now=now, deadline=deadline)
            except (InvalidTokenError, AccessDeniedError) as error:
                raise self._actor_refused(error) from None
            if policy.enforce_may_act and not may_act(subject, claims):
                raise AccessDeniedError(reason="actor_not_permitted", facts=self._actor_facts(claims))
        sent = ActorToken(token=token, token_type=policy.token_type)
        return _Actor(sent=sent, key=token_key.hex(), claims=claims)

    def _verified_actor(self, token: str, token_key: bytes, *, now: float, deadline: float | None) -> Claims:
        """Prove an actor token by every rule for its issuer's subject tokens; its signature in any case."""
        config = self._config
        verified, trust, known = self._verified(token, token_key, deadline)
        if verified.fingerprint is None:
            raise UnknownIssuerError(reason="issuer_unverified")
        claims = verified.claims
        check_timestamps(claims, now=now, leeway=config.leeway, max_age=trust.max_age)
        # It never goes upstream, so an ID token of any issuer may be one where that is declared.
        id_token = config.actor.token_type == TOKEN_TYPE_ID_TOKEN
        check_type(claims, typ=verified.typ, accepted=trust.typ, id_token=id_token)
        check_bearer(claims)
        check_audience(claims, accepted=trust.audience)
        check_required_claims(claims, required=trust.required_claims)
        check_client(claims, allowed=config.actor.clients or trust.clients)
        if not known:
            self._cache.store_verified(token_key, verified)
        return claims

    def _actor_refused(self, error: InvalidTokenError | AccessDeniedError) -> TokenExchangeError:
        """Say whose fault an actor token is: the caller's, or that of who configured it."""
        reason = "actor_" + error.reason
        if self._config.actor.source == "config":
            return ClientRefusedError(reason=reason, facts=error.facts)
        if isinstance(error, AccessDeniedError):
            return AccessDeniedError(reason=reason, facts=error.facts)
        return InvalidTokenError(reason=reason, facts=error.facts)

    # --- the exchange -----------------------------------------------------------------

    def _exchange(
        self,
        token: str,
        token_key: bytes,
        subject: Claims,
        asked: Exchange,
        actor: _Actor | None,
        *,
        now: float,
        deadline: float | None,
    ) -> FlowResult:
        order = _Order(
            token=token,
            subject=subject,
            relation=asked.relation,
            subject_token_type=asked.entry.subject_token_type,
            token_endpoint=self._keys.token_endpoint(self._target, deadline=deadline),
            actor=actor,
        )
        # The plugin configuration's identity stands for client, audience, scopes and all other
        # settings; the endpoint may also come from discovery, so it is named beside it.
        key = digest_fields(
            (
                token_key.hex(),
                order.token_endpoint,
                order.subject_token_type,
                actor.key if actor is not None else None,
            )
        )
        exchanged = self._cached(key, now=now, deadline=deadline) if self._config.cache.enabled else None
        own = False
        if exchanged is None and (refusal := self._cached_refusal(key)) is not None:
            raise refusal
        if exchanged is not None and self._clock.monotonic() >= exchanged.refresh_at_monotonic:
            self._refresh_ahead(key, exchanged, order)
        if exchanged is None:
            if deadline is None:
                raise NotInMemoryError
            until = deadline

            def exchange() -> ExchangedToken:
                nonlocal own
                try:
                    exchanged, own = self._obtain(key, order, deadline=until)
                except RejectionError as error:
                    self._remember_refusal(key, error)
                    raise
                return exchanged

            exchanged = self._cache.exchange_once(
                key, exchange, deadline=deadline, store=self._config.cache.enabled
            )
        return FlowResult(
            decision="exchange",
            relation=order.relation,
            cache="miss" if own else "hit",
            subject=subject,
            exchanged=exchanged,
            notes=tuple(order.notes),
            actor=_claims_of(actor),
        )

    def _cached(self, key: bytes, *, now: float, deadline: float | None) -> ExchangedToken | None:
        cached = self._cache.exchanged(key, now=now, monotonic=self._clock.monotonic())
        if cached is None or cached.fingerprint is None:
            return cached
        try:
            if self._keys.keys(self._target, deadline=deadline).holds(cached.fingerprint):
                return cached
        except (IssuerUnavailableError, DeadlineError):
            # Nothing says that the key is gone; the entry's own end bounds what that can cost.
            return cached
        # The issuer took the key out: no upstream would accept this token any more.
        self._cache.forget_exchanged(key)
        return None

    def _obtain(self, key: bytes, order: _Order, *, deadline: float) -> tuple[ExchangedToken, bool]:
        """Exchange, or take what another process exchanged; tell whether the exchange was made here."""
        if self._shared is None or not self._config.cache.enabled:
            return self._exchange_now(order, deadline=deadline), True

        def exchange() -> tuple[ExchangedToken, bytes]:
            grant = self._ask(order, deadline=deadline)
            exchanged = self._admit(order, grant, deadline=deadline)
            return exchanged, build_shared_grant(grant.response, sent_at=grant.sent_at)

        def prove(shared: bytes) -> ExchangedToken:
            try:
                return self._admit(order, self._read_shared(order, shared), deadline=deadline)
            except TokenExchangeError:
                # What is noted is said of the result that goes upstream.
                order.notes.clear()
                raise

        return self._shared.exchange_once(key, exchange=exchange, prove=prove, deadline=deadline)

    def _read_shared(self, order: _Order, shared: bytes) -> _Grant:
        """Judge the form of what another process left, as strictly as the token endpoint's own answer."""
        now, monotonic = self._clock.now(), self._clock.monotonic()
        response, sent_at = process_shared_grant(
            shared,
            grant_type=self._config.request.grant_type,
            subject_token=order.token,
            max_token_size=self._config.max_token_size,
            actor=_sent_of(order.actor),
        )
        # A clock that is ahead elsewhere lengthens nothing here.
        sent_at = min(sent_at, now)
        return _Grant(response=response, sent_at=sent_at, sent_at_monotonic=monotonic - (now - sent_at))

    # --- ahead of its end -------------------------------------------------------------

    def _refresh_ahead(self, key: bytes, old: ExchangedToken, order: _Order) -> None:
        """Have a token in use renewed in the background; what comes of it, no request waits for."""
        if self._refresher is None:
            return
        # First of all: whatever comes of this try, the next one is later.
        old.refresh_at_monotonic = self._clock.monotonic() + old.refresh_wait_s
        old.refresh_wait_s *= 2
        # The hit's own notes are its own.
        order = replace(order, notes=[])
        if not self._refresher.offer(lambda: self._renew(key, old, order), group=order.token_endpoint):
            self._metrics.count("refreshes", outcome="no_place")

    def _renew(self, key: bytes, old: ExchangedToken, order: _Order) -> None:
        deadline = self._clock.monotonic() + self._config.deadline_ms / 1000
        renewed: ExchangedToken | None = None

        def exchange() -> ExchangedToken:
            try:
                return self._exchange_now(order, deadline=deadline)
            except RejectionError as error:
                # Issuer or policy took it back: the old one goes with the right to a new one.
                self._remember_refusal(key, error)
                self._cache.forget_exchanged(key)
                if self._shared is not None:
                    self._shared.forget(key)
                raise

        try:
            renewed = self._cache.renew(key, old, exchange)
        except TokenExchangeError as error:
            outcome = "refused" if isinstance(error, RejectionError) else "failed"
            parties = {**self._subject_facts(order.subject), **self._actor_facts(_claims_of(order.actor))}
            self._audit_refusal(error, {**parties, **error.facts, "refresh": True})
        else:
            outcome = "not_needed" if renewed is None else "renewed"
        if renewed is not None:
            self._record_renewal(order, renewed)
        self._metrics.count("refreshes", outcome=outcome)

    def _cached_refusal(self, key: bytes) -> RejectionError | None:
        refusal = self._cache.refusal(key) if self._config.cache.enabled else None
        if refusal is not None:
            self._metrics.count("refusal_hits", reason=refusal.reason)
        return refusal

    def _remember_refusal(self, key: bytes, error: RejectionError) -> None:
        """Keep a refusal that the issuer would only repeat, for some seconds."""
        config = self._config
        # A refused assertion may be one that somebody else has used up: its result may still come.
        lasts = error.reason in LASTING_REFUSALS and config.request.grant_type == "token_exchange"
        if lasts and config.cache.enabled and config.cache.ttl_neg > 0:
            self._cache.store_refusal(key, error, ttl=config.cache.ttl_neg)

    def _exchange_now(self, order: _Order, *, deadline: float) -> ExchangedToken:
        return self._admit(order, self._ask(order, deadline=deadline), deadline=deadline)

    def _ask(self, order: _Order, *, deadline: float) -> _Grant:
        config = self._config
        request = build_exchange_request(
            order.token_endpoint,
            parameters=config.request,
            subject_token=order.token,
            subject_token_type=order.subject_token_type,
            actor=_sent_of(order.actor),
        )
        # `expires_in` counts from an instant between here and the answer: the earliest is safe.
        sent_at, sent_at_monotonic = self._clock.now(), self._clock.monotonic()
        secret = config.client.client_secret if self._secrets is None else self._secrets.current()
        try:
            response = self._send(order, request, secret, deadline=deadline)
        except ClientRefusedError as refused:
            other = self._other_secret(refused, secret)
            if other is None:
                raise
            # Refused for its client, the first request has used nothing up.
            response = self._send(order, request, other, deadline=deadline)
        return _Grant(response=response, sent_at=sent_at, sent_at_monotonic=sent_at_monotonic)

    def _send(
        self, order: _Order, request: HttpRequest, secret: Secret | None, *, deadline: float
    ) -> ExchangeResponse:
        config = self._config
        authenticate = _client_authentication(config.client, secret)
        answer = self._sender.send(authenticate(request), deadline=deadline, max_body=MAX_RESPONSE_BYTES)
        return process_exchange_response(
            answer,
            grant_type=config.request.grant_type,
            subject_token=order.token,
            max_token_size=config.max_token_size,
            actor=_sent_of(order.actor),
        )

    def _other_secret(self, refused: ClientRefusedError, secret: Secret | None) -> Secret | None:
        """Return what a rotation may have made the secret, where it was the secret that was refused."""
        if self._secrets is None or secret is None or not _means_secret(refused):
            return None
        return self._secrets.other_than(secret)

    def _admit(self, order: _Order, grant: _Grant, *, deadline: float) -> ExchangedToken:
        """Prove the result, and say until when it may be handed out again."""
        config, response = self._config, grant.response
        claims, fingerprint = self._prove_result(order, response, deadline=deadline)
        reuse_until = reuse_deadline(
            now=grant.sent_at,
            expires_in=response.expires_in,
            result_exp=claims.exp if claims else None,
            subject_exp=min(order.subject.exp, _end_of(order.actor)),
            ttl=config.cache.ttl,
            max_lifetime=config.result.max_lifetime,
            margin=REUSE_MARGIN_S,
        )
        refresh_at = self._refresh_instant(order, grant, reuse_until)
        return ExchangedToken(
            token=response.access_token,
            claims=claims,
            reuse_until=reuse_until,
            reuse_until_monotonic=grant.sent_at_monotonic
            + (reuse_until - grant.sent_at if reuse_until else 0.0),
            refresh_at_monotonic=grant.sent_at_monotonic + (refresh_at - grant.sent_at),
            fingerprint=fingerprint,
        )

    def _refresh_instant(self, order: _Order, grant: _Grant, reuse_until: float | None) -> float:
        if self._refresher is None:
            return math.inf
        max_age, iat = self._trust(order.subject.iss).max_age, order.subject.iat
        too_old = iat + max_age if max_age is not None and iat is not None else math.inf
        instant = refresh_instant(
            now=grant.sent_at,
            reuse_until=reuse_until,
            subject_end=min(order.subject.exp, too_old, _end_of(order.actor)) - REUSE_MARGIN_S,
            spread=crc32(order.token.encode("ascii")) / 2**32,
        )
        return math.inf if instant is None else instant

    # --- the result -------------------------------------------------------------------

    def _prove_result(
        self, order: _Order, response: ExchangeResponse, *, deadline: float
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

    def _check_result_actor(self, order: _Order, actor: _Actor, claims: Claims | None) -> None:
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
        order: _Order,
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
                key = self._select_key(jws, self._target, deadline)
                verify_signature(jws, key, algorithms=rules.algorithms)
                fingerprint = key.fingerprint
            claims = self._parse_claims(jws)
            check_issuer(claims, expected=config.target.issuer)
            check_timestamps(claims, now=now, leeway=config.leeway)
            check_type(claims, typ=jws.typ, accepted=rules.typ)
            check_bearer(claims)
            check_actors(claims, max_depth=config.actor.max_chain_depth)
        except InvalidTokenError as error:
            # The caller's token was good; what came out of the exchange is not.
            raise ExchangedTokenError(reason="result_" + error.reason, facts=error.facts) from None
        return claims, fingerprint

    # --- what is told -----------------------------------------------------------------

    def record_refusal(
        self, error: TokenExchangeError, *, subject: Claims | None = None, actor: Claims | None = None
    ) -> None:
        """Audit and count one refusal; *subject* and *actor* once their tokens are proven."""
        self._metrics.count("requests", outcome="refuse", reason=error.reason)
        parties = {**self._subject_facts(subject), **self._actor_facts(actor)}
        self._audit_refusal(error, {**parties, **error.facts})

    def _audit_refusal(self, error: TokenExchangeError, facts: Mapping[str, Fact]) -> None:
        self._audit.record(
            AuditEvent(outcome="refuse", reason=error.reason, status=error.status, facts=self._facts(facts))
        )

    def _record_result(self, result: FlowResult) -> None:
        self._metrics.count("requests", outcome=result.decision, reason=result.relation, cache=result.cache)
        if result.cache == "hit":
            # The exchange that filled the cache was recorded; a hit is counted only.
            return
        facts = self._result_facts(
            result.relation, result.subject, result.actor, result.exchanged, result.notes
        )
        if self._possession is not None and result.subject.sender_constrained:
            facts["proven"] = proven_members(result.subject)
        self._audit.record(
            AuditEvent(outcome=result.decision, reason=result.relation, status=200, facts=self._facts(facts))
        )

    def _record_renewal(self, order: _Order, renewed: ExchangedToken) -> None:
        facts = self._result_facts(
            order.relation, order.subject, _claims_of(order.actor), renewed, order.notes
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
        facts = {"relation": relation, **self._subject_facts(subject), **self._actor_facts(actor)}
        if exchanged is not None and exchanged.claims is not None:
            facts["aud"] = " ".join(exchanged.claims.aud)[:200]
            facts["scope"] = " ".join(sorted(exchanged.claims.scopes))[:200]
        if notes:
            facts["notes"] = ",".join(notes)
        return facts

    def _subject_facts(self, subject: Claims | None) -> dict[str, Fact]:
        """Name issuer, client and subject, the last by a digest that only this configuration makes."""
        if subject is None:
            return {}
        return {"iss": subject.iss, "client": subject.client, "subject": self._pseudonym(subject)}

    def _actor_facts(self, actor: Claims | None) -> dict[str, Fact]:
        """Name the acting party in the same way."""
        if actor is None:
            return {}
        return {"actor_iss": actor.iss, "actor_client": actor.client, "actor": self._pseudonym(actor)}

    def _pseudonym(self, party: Claims) -> str:
        material = digest_fields((party.iss, party.sub))
        return hmac.new(self._config.identity.encode("ascii"), material, hashlib.sha256).hexdigest()[:16]

    def _facts(self, facts: Mapping[str, Fact]) -> dict[str, Fact]:
        flow = self._config.flow
        names = {"flow": flow.name, "kind": flow.kind, "owner": flow.owner} if flow else {}
        return {**names, **facts}


def _means_secret(refused: ClientRefusedError) -> bool:
    if refused.reason == "client_refused":
        return refused.facts.get("error") in _SECRET_REFUSED
    return refused.reason == "token_endpoint_refused" and refused.facts.get("http_status") == 401


def _client_authentication(client: ClientCredentials, secret: Secret | None) -> ClientAuthentication:
    if secret is None:
        return public_client(client.client_id)
    if client.method == "client_secret_post":
        return client_secret_post(client.client_id, secret)
    return client_secret_basic(client.client_id, secret)


def _sent_of(actor: _Actor | None) -> ActorToken | None:
    return None if actor is None else actor.sent


def _claims_of(actor: _Actor | None) -> Claims | None:
    return None if actor is None else actor.claims


def _end_of(actor: _Actor | None) -> float:
    claims = _claims_of(actor)
    return math.inf if claims is None else claims.exp


def _endpoints_of(entry: SubjectTokenIssuer) -> IssuerEndpoints:
    return IssuerEndpoints(issuer=entry.issuer, discovery_url=entry.discovery_url, jwks_uri=entry.jwks_uri)
