"""
Proving a token of an issuer that is trusted: its signature, its times, and whom it is for.

Subject and actor tokens are proven by the same rules; a result is read with the same keys.

Source: docs/architecture.md; RFC 8725; RFC 9068.
"""

from __future__ import annotations

from kong_token_exchange.config import PluginConfig
from kong_token_exchange.core.cache_key import digest_fields
from kong_token_exchange.core.claims import (
    Claims,
    check_audience,
    check_bearer,
    check_client,
    check_issuer,
    check_required_claims,
    check_timestamps,
    check_type,
    parse_claims,
)
from kong_token_exchange.core.decision import trusted_issuer
from kong_token_exchange.core.delegation import check_actors, may_act
from kong_token_exchange.core.jwk import Jwk, select_verification_key
from kong_token_exchange.core.jws import Jws, check_algorithm, parse_compact, verify_signature
from kong_token_exchange.core.policy import TOKEN_TYPE_ID_TOKEN, SubjectTokenIssuer
from kong_token_exchange.errors import (
    AccessDeniedError,
    ClientRefusedError,
    InvalidTokenError,
    KeySelectionError,
    TokenExchangeError,
    UnknownIssuerError,
)
from kong_token_exchange.flow.record import actor_facts
from kong_token_exchange.flow.values import Actor
from kong_token_exchange.ports import (
    IssuerEndpoints,
    KeySource,
    TokenCache,
    VerifiedToken,
)
from kong_token_exchange.protocol.exchange import (
    ActorToken,
)


class TokenVerifier:
    """
    One configuration's trust in issuers, over shared keys and a shared memory of what was proven.

    Args:
        config: Says who is trusted and with what.
        keys: The issuers' keys.
        cache: Remembers verified tokens.
    """

    def __init__(self, config: PluginConfig, *, keys: KeySource, cache: TokenCache) -> None:
        self._config = config
        self._keys = keys
        self._cache = cache
        # None where nothing is proven: what is asked of every request then costs nothing.
        self._possession = config.possession or None
        self.target = IssuerEndpoints(
            issuer=config.target.issuer,
            discovery_url=config.target.discovery_url,
            jwks_uri=config.target.jwks_uri,
            token_endpoint=config.target.token_endpoint,
        )
        self.endpoints = {entry.issuer: _endpoints_of(entry) for entry in reversed(config.issuers)}
        self.endpoints[config.target.issuer] = self.target

    def subject(
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
            trust = self.trust(verified.claims.iss)
            # The key that verified it must still be the issuer's.
            if self._still_trusted(verified, trust, deadline):
                return verified, trust, True
        return *self._verify(token, deadline), False

    def trust(self, iss: object) -> SubjectTokenIssuer:
        """Return what is configured for an issuer; raise `UnknownIssuerError` where nothing is."""
        return trusted_issuer(iss, issuers=self._config.issuers, target=self._config.target_rules)

    def _still_trusted(
        self, verified: VerifiedToken, trust: SubjectTokenIssuer, deadline: float | None
    ) -> bool:
        if verified.fingerprint is None:
            return not trust.verify_signature
        return self._keys.keys(self.endpoints[trust.issuer], deadline=deadline).holds(verified.fingerprint)

    def _verify(self, token: str, deadline: float | None) -> tuple[VerifiedToken, SubjectTokenIssuer]:
        jws = parse_compact(token, max_bytes=self._config.max_token_size)
        trust = self.trust(jws.payload.get("iss"))
        check_algorithm(jws, algorithms=trust.algorithms)
        key = None
        if trust.verify_signature:
            key = self.select_key(jws, self.endpoints[trust.issuer], deadline)
            verify_signature(jws, key, algorithms=trust.algorithms)
        claims = self.parse_claims_of(jws)
        check_issuer(claims, expected=trust.issuer)
        check_actors(claims, max_depth=self._config.actor.max_chain_depth)
        fingerprint = key.fingerprint if key is not None else None
        return VerifiedToken(claims=claims, typ=jws.typ, fingerprint=fingerprint), trust

    def select_key(self, jws: Jws, endpoints: IssuerEndpoints, deadline: float | None) -> Jwk:
        """Return the one key of the issuer that fits, with newer keys fetched where none does."""
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

    def parse_claims_of(self, jws: Jws) -> Claims:
        """Read a token's claims, with audience and scopes where the configuration says they are."""
        config = self._config
        return parse_claims(
            jws.payload, audience_claim=config.audience_claim, scopes_claim=config.scopes_claim
        )

    def actor(
        self, offered: str | None, subject: Claims, *, now: float, deadline: float | None
    ) -> Actor | None:
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
                raise AccessDeniedError(
                    reason="actor_not_permitted", facts=actor_facts(self._config.identity, claims)
                )
        sent = ActorToken(token=token, token_type=policy.token_type)
        return Actor(sent=sent, key=token_key.hex(), claims=claims)

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


def _endpoints_of(entry: SubjectTokenIssuer) -> IssuerEndpoints:
    return IssuerEndpoints(issuer=entry.issuer, discovery_url=entry.discovery_url, jwks_uri=entry.jwks_uri)
