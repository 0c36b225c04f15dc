"""
The access pipeline, in its one true order.

Signature, then claims, then decision, then exchange, then the proof of the result. The same
code runs twice for a cold request: first on the event loop with memory alone (`deadline` None,
left by `NotInMemoryError`), then in a pool thread that may wait. Nothing is skipped in either.

Source: docs/architecture.md; RFC 8693; RFC 8725.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from zlib import crc32

from kong_token_exchange.config import ClientCredentials, PluginConfig
from kong_token_exchange.core.cache_key import digest_fields
from kong_token_exchange.core.claims import (
    Claims,
    check_scopes_required,
    check_timestamps,
    forbidden_claim,
    meets_audience_required,
)
from kong_token_exchange.core.decision import Exchange, Forward, decide
from kong_token_exchange.core.dpop import Proof, verify_proof
from kong_token_exchange.core.lifetime import refresh_instant, reuse_deadline
from kong_token_exchange.core.policy import PossessionPolicy
from kong_token_exchange.core.possession import (
    NO_EVIDENCE,
    Evidence,
    check_certificate,
    check_scheme,
    required_confirmation,
)
from kong_token_exchange.errors import (
    AccessDeniedError,
    ClientRefusedError,
    DeadlineError,
    IssuerUnavailableError,
    RejectionError,
    TokenExchangeError,
)
from kong_token_exchange.flow.record import Recorder
from kong_token_exchange.flow.result import ResultProof
from kong_token_exchange.flow.values import Actor, FlowResult, Grant, Order, claims_of, end_of, sent_of
from kong_token_exchange.flow.verification import TokenVerifier
from kong_token_exchange.lease import LEASE_S, Leases, Terms
from kong_token_exchange.ports import (
    AuditSink,
    ClientSecrets,
    Clock,
    ExchangedToken,
    HttpSender,
    KeySource,
    Metrics,
    NotInMemoryError,
    ProofMemory,
    Refresher,
    SharedCache,
    TokenCache,
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
        self._metrics = metrics
        self._secrets = secrets
        self._verifier = TokenVerifier(config, keys=keys, cache=cache)
        self._proof = ResultProof(config, verifier=self._verifier, clock=clock, metrics=metrics)
        self._recorder = Recorder(config, audit=audit, metrics=metrics)

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
        actor: Actor | None = None
        now, generation = self._clock.now(), self._keys.generation
        token_key = digest_fields((self._config.identity, token))
        try:
            verified, known = self._verifier.subject(token, token_key, now=now, deadline=deadline)
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
                actor = self._verifier.actor(actor_token, subject, now=now, deadline=deadline)
            result = self._act(token, token_key, subject, decision, actor, now=now, deadline=deadline)
            if proof is not None and deadline is None:
                # Only now: a request that goes on to the pool comes by here once more.
                self._proofs.use(proof.key, iat=proof.iat, now=now)
        except TokenExchangeError as error:
            self._recorder.refusal(error, subject=subject, actor=claims_of(actor))
            raise
        self._recorder.result(result)
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
                max_age = self._verifier.trust(claims.iss).max_age
                check_timestamps(claims, now=now, leeway=leeway, max_age=max_age)
        except TokenExchangeError as error:
            self._recorder.refusal(error, subject=subject, actor=result.actor)
            raise
        repeated = replace(result, cache="hit") if result.exchanged is not None else result
        self._recorder.result(repeated)
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
        issuers, begins, ends = {self._verifier.target}, [0.0], [exchanged.reuse_until]
        for claims in (subject,) if result.actor is None else (subject, result.actor):
            trust = self._verifier.trust(claims.iss)
            issuers.add(self._verifier.endpoints[trust.issuer])
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

    def record_refusal(self, error: TokenExchangeError, *, subject: Claims | None = None) -> None:
        """Audit and count a refusal that was decided before or after the pipeline."""
        self._recorder.refusal(error, subject=subject)

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
        actor: Actor | None,
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

    # --- the exchange -----------------------------------------------------------------

    def _exchange(
        self,
        token: str,
        token_key: bytes,
        subject: Claims,
        asked: Exchange,
        actor: Actor | None,
        *,
        now: float,
        deadline: float | None,
    ) -> FlowResult:
        order = Order(
            token=token,
            subject=subject,
            relation=asked.relation,
            subject_token_type=asked.entry.subject_token_type,
            token_endpoint=self._keys.token_endpoint(self._verifier.target, deadline=deadline),
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
            actor=claims_of(actor),
        )

    def _cached(self, key: bytes, *, now: float, deadline: float | None) -> ExchangedToken | None:
        cached = self._cache.exchanged(key, now=now, monotonic=self._clock.monotonic())
        if cached is None or cached.fingerprint is None:
            return cached
        try:
            if self._keys.keys(self._verifier.target, deadline=deadline).holds(cached.fingerprint):
                return cached
        except (IssuerUnavailableError, DeadlineError):
            # Nothing says that the key is gone; the entry's own end bounds what that can cost.
            return cached
        # The issuer took the key out: no upstream would accept this token any more.
        self._cache.forget_exchanged(key)
        return None

    def _obtain(self, key: bytes, order: Order, *, deadline: float) -> tuple[ExchangedToken, bool]:
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

    def _read_shared(self, order: Order, shared: bytes) -> Grant:
        """Judge the form of what another process left, as strictly as the token endpoint's own answer."""
        now, monotonic = self._clock.now(), self._clock.monotonic()
        response, sent_at = process_shared_grant(
            shared,
            grant_type=self._config.request.grant_type,
            subject_token=order.token,
            max_token_size=self._config.max_token_size,
            actor=sent_of(order.actor),
        )
        # A clock that is ahead elsewhere lengthens nothing here.
        sent_at = min(sent_at, now)
        return Grant(response=response, sent_at=sent_at, sent_at_monotonic=monotonic - (now - sent_at))

    # --- ahead of its end -------------------------------------------------------------

    def _refresh_ahead(self, key: bytes, old: ExchangedToken, order: Order) -> None:
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

    def _renew(self, key: bytes, old: ExchangedToken, order: Order) -> None:
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
            self._recorder.renewal_refused(error, order)
        else:
            outcome = "not_needed" if renewed is None else "renewed"
        if renewed is not None:
            self._recorder.renewal(order, renewed)
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

    def _exchange_now(self, order: Order, *, deadline: float) -> ExchangedToken:
        return self._admit(order, self._ask(order, deadline=deadline), deadline=deadline)

    def _ask(self, order: Order, *, deadline: float) -> Grant:
        config = self._config
        request = build_exchange_request(
            order.token_endpoint,
            parameters=config.request,
            subject_token=order.token,
            subject_token_type=order.subject_token_type,
            actor=sent_of(order.actor),
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
        return Grant(response=response, sent_at=sent_at, sent_at_monotonic=sent_at_monotonic)

    def _send(
        self, order: Order, request: HttpRequest, secret: Secret | None, *, deadline: float
    ) -> ExchangeResponse:
        config = self._config
        authenticate = _client_authentication(config.client, secret)
        answer = self._sender.send(authenticate(request), deadline=deadline, max_body=MAX_RESPONSE_BYTES)
        return process_exchange_response(
            answer,
            grant_type=config.request.grant_type,
            subject_token=order.token,
            max_token_size=config.max_token_size,
            actor=sent_of(order.actor),
        )

    def _other_secret(self, refused: ClientRefusedError, secret: Secret | None) -> Secret | None:
        """Return what a rotation may have made the secret, where it was the secret that was refused."""
        if self._secrets is None or secret is None or not _means_secret(refused):
            return None
        return self._secrets.other_than(secret)

    def _admit(self, order: Order, grant: Grant, *, deadline: float) -> ExchangedToken:
        """Prove the result, and say until when it may be handed out again."""
        config, response = self._config, grant.response
        claims, fingerprint = self._proof.prove(order, response, deadline=deadline)
        reuse_until = reuse_deadline(
            now=grant.sent_at,
            expires_in=response.expires_in,
            result_exp=claims.exp if claims else None,
            subject_exp=min(order.subject.exp, end_of(order.actor)),
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

    def _refresh_instant(self, order: Order, grant: Grant, reuse_until: float | None) -> float:
        if self._refresher is None:
            return math.inf
        max_age, iat = self._verifier.trust(order.subject.iss).max_age, order.subject.iat
        too_old = iat + max_age if max_age is not None and iat is not None else math.inf
        instant = refresh_instant(
            now=grant.sent_at,
            reuse_until=reuse_until,
            subject_end=min(order.subject.exp, too_old, end_of(order.actor)) - REUSE_MARGIN_S,
            spread=crc32(order.token.encode("ascii")) / 2**32,
        )
        return math.inf if instant is None else instant

    # --- the result -------------------------------------------------------------------

    # --- what is told -----------------------------------------------------------------


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
