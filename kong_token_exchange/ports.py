"""
What the flow needs from the outside, as Protocols.

A `deadline` is a monotonic instant in seconds. Where it is None the caller stands on the
plugin server's event loop: only memory may be used, and `NotInMemoryError` says that more
would be needed.

The shells implement these; tests replace them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from kong_token_exchange.core.claims import Claims
from kong_token_exchange.core.jwk import JwkSet
from kong_token_exchange.errors import Fact, RejectionError
from kong_token_exchange.protocol.http_message import HttpRequest, HttpResponse
from kong_token_exchange.secret import Secret


class NotInMemoryError(Exception):
    """The answer needs the network and the caller may not wait: not a failure, never rendered."""


class Clock(Protocol):
    """Time, twice: what tokens speak of, and what only moves forward."""

    def now(self) -> float:
        """Return the wall clock as NumericDate, seconds."""
        ...

    def monotonic(self) -> float:
        """Return the monotonic clock, seconds."""
        ...


class HttpSender(Protocol):
    """Sends one request, which the server acts on once at most; follows nothing."""

    def send(self, request: HttpRequest, *, deadline: float, max_body: int) -> HttpResponse:
        """
        Send and read the answer, all before *deadline*.

        Raises:
            IssuerUnavailableError: no connection, or a broken answer.
            NonConformingResponseError: an over-long or encoded answer.
            DeadlineError: *deadline* passed.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuerEndpoints:
    """Where an issuer is found: configured addresses win over discovered ones."""

    issuer: str
    discovery_url: str | None
    jwks_uri: str | None = None
    token_endpoint: str | None = None


class KeySource(Protocol):
    """Keys and token endpoints of configured issuers; never of any other."""

    def keys(self, endpoints: IssuerEndpoints, *, deadline: float | None) -> JwkSet:
        """
        Return the issuer's usable keys.

        Raises:
            NotInMemoryError: none in memory and *deadline* is None.
            IssuerUnavailableError, DeadlineError: they cannot be had.
        """
        ...

    def newer_keys(self, endpoints: IssuerEndpoints, *, deadline: float | None) -> JwkSet | None:
        """
        Return newer keys because a token names an unknown one; None where there are none to be had.

        None means that the set which the caller knows stands, within the cool-down. The set that
        is returned may be the same one where it was fetched a moment ago.

        Raises:
            NotInMemoryError: a fetch would be due and *deadline* is None.
            IssuerUnavailableError: the fetch failed, or failed a moment ago: the key may exist.
        """
        ...

    @property
    def generation(self) -> int:
        """A number that changes with every document or key set that was fetched."""
        ...

    def settled_until(self, endpoints: IssuerEndpoints) -> float:
        """Return until when, on the monotonic clock, `keys` would only say again what it said last."""
        ...

    def token_endpoint(self, endpoints: IssuerEndpoints, *, deadline: float | None) -> str:
        """
        Return the issuer's token endpoint.

        Raises:
            NotInMemoryError, IssuerUnavailableError, DeadlineError: as `keys`.
        """
        ...


@dataclass(slots=True, kw_only=True)
class VerifiedToken:
    """A subject token whose signature was verified with the key of that fingerprint."""

    claims: Claims = field(repr=False)
    typ: str | None
    fingerprint: bytes | None


@dataclass(slots=True, weakref_slot=True, kw_only=True)
class ExchangedToken:
    """
    An exchanged token that was proven, and until when it may be handed out again.

    `reuse_until` is NumericDate, `reuse_until_monotonic` the same instant on the monotonic
    clock; the earlier one counts. `fingerprint` is that of the key that verified it, None where
    its signature was not looked at. `rendered` is the plugin's, for what it made of the token.
    A hit at or after `refresh_at_monotonic` has it renewed in the background; each try puts the next
    one off by `refresh_wait_s`, seconds, which then doubles.
    `dropped` is set once the cache has let go of it because it must not be handed out.
    """

    token: Secret
    claims: Claims | None = field(repr=False)
    reuse_until: float | None
    reuse_until_monotonic: float
    fingerprint: bytes | None = field(default=None, repr=False)
    refresh_at_monotonic: float = math.inf
    refresh_wait_s: float = 5.0
    rendered: Any = field(default=None, repr=False)
    dropped: bool = False


class ClientSecrets(Protocol):
    """A client secret that somebody rotates; asked where waiting is allowed."""

    def current(self) -> Secret:
        """
        Return the secret to authenticate with now.

        Raises:
            GatewayError: there is none.
        """
        ...

    def other_than(self, refused: Secret) -> Secret | None:
        """Return another one to try once, because the issuer refused *refused*; None where there is none."""
        ...


class TokenCache(Protocol):
    """Bounded memory: verified subject tokens, exchanged tokens, and one exchange per key at a time."""

    def verified(self, key: bytes) -> VerifiedToken | None:
        """Return a verified token, or None."""
        ...

    def store_verified(self, key: bytes, token: VerifiedToken) -> None:
        """Keep a verified token."""
        ...

    def exchanged(self, key: bytes, *, now: float, monotonic: float) -> ExchangedToken | None:
        """Return an exchanged token that may still be handed out, or None."""
        ...

    def forget_exchanged(self, key: bytes) -> None:
        """Drop an exchanged token that must not be handed out again."""
        ...

    def refusal(self, key: bytes) -> RejectionError | None:
        """Return the issuer's refusal of a moment ago, made anew with the fact `cached`, or None."""
        ...

    def store_refusal(self, key: bytes, error: RejectionError, *, ttl: float) -> None:
        """Keep a refusal for *ttl* seconds."""
        ...

    def exchange_once(
        self, key: bytes, exchange: Callable[[], ExchangedToken], *, deadline: float, store: bool
    ) -> ExchangedToken:
        """
        Run *exchange* unless one for *key* is under way, whose result or error is then shared.

        With *store* a result or refusal that landed meanwhile takes its place.

        Raises:
            DeadlineError: the caller's own deadline passed while another one's exchange ran.
        """
        ...

    def renew(
        self, key: bytes, old: ExchangedToken, exchange: Callable[[], ExchangedToken]
    ) -> ExchangedToken | None:
        """
        Put what *exchange* gives in the place of *old*; None where *old* is gone or one is under way.

        Raises:
            TokenExchangeError: what *exchange* raised; *old* stays.
        """
        ...


class Refresher(Protocol):
    """Works in the background, within bounds."""

    def offer(self, work: Callable[[], None], *, group: str) -> bool:
        """Take *work* on, or say at once that there is no place; *group* shares a part of the threads."""
        ...


class ProofMemory(Protocol):
    """Which DPoP proofs were used."""

    def use(self, key: bytes, *, iat: float, now: float) -> None:
        """
        Take note of a proof; memory only.

        Raises:
            ProofError: it was used before.
            IssuerUnavailableError: that cannot be told.
        """
        ...


class SharedCache(Protocol):
    """A second level that several processes share; nothing that it gives is believed."""

    def exchange_once(
        self,
        key: bytes,
        *,
        exchange: Callable[[], tuple[ExchangedToken, bytes]],
        prove: Callable[[bytes], ExchangedToken],
        deadline: float,
    ) -> tuple[ExchangedToken, bool]:
        """
        Take what another process left under *key*, else run *exchange* and leave its result there.

        A fault of the second level costs a bounded moment and is never told to the caller.

        Args:
            key: Everything that shapes the result, 32 bytes.
            exchange: Makes the exchange; returns the result, and what another process is given.
            prove: Turns what another process left into a result; a `TokenExchangeError` from it
                means that it is not acceptable, and counts as nothing found.
            deadline: Monotonic instant by which the caller wants its answer.

        Returns:
            The result, and whether *exchange* made it.

        Raises:
            TokenExchangeError: what *exchange* raised.
        """
        ...

    def forget(self, key: bytes) -> None:
        """Drop what is under *key*, because the issuer took it back; never waits, never raises."""
        ...

    def close(self) -> None:
        """Close its connections; it may be used again."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """One decision, without any token: `subject` is a keyed digest's first hex digits."""

    outcome: Literal["exchange", "forward", "refuse"]
    reason: str
    status: int
    facts: Mapping[str, Fact] = field(default_factory=dict)


class AuditSink(Protocol):
    """Takes audit events; never raises, never blocks."""

    def record(self, event: AuditEvent) -> None:
        """Take one event."""
        ...


class Metrics(Protocol):
    """Counts and times things by name; labels come from fixed sets."""

    def count(self, name: str, **labels: str) -> None:
        """Add one."""
        ...

    def counter(self, name: str, **labels: str) -> Callable[[], None]:
        """Return what adds one to the same count each time it is called."""
        ...

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Take in how long something took."""
        ...
