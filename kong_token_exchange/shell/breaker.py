"""
A guard before the token endpoint: breaker, rest and shedding, one state per endpoint.

- *Breaker*: after some faults in a row the endpoint is left alone for a while; then one request
  goes first, and the others follow only when it succeeds.
- *Rest*: a 429, or a 503 with Retry-After, is obeyed for every caller. Without a usable
  Retry-After the wait starts at a second and doubles, with jitter.
- *Shedding*: no more than so many exchanges are under way at one endpoint. Callers that wait for
  another one's exchange of the same token are not counted: they hold threads of their own.

A refusal of the token is no fault and never opens anything.

Source: docs/adr/0009-breaker.md; docs/threats.md RES-01 to RES-06, RES-13.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from kong_token_exchange.core.policy import BreakerPolicy
from kong_token_exchange.errors import DeadlineError, IssuerUnavailableError
from kong_token_exchange.ports import Clock, HttpSender, Metrics
from kong_token_exchange.protocol.http_message import HttpRequest, HttpResponse

# The plugin server has 64 threads by default: distinct exchanges of one issuer leave a quarter to others.
MAX_IN_FLIGHT = 48

# Longest rest that a Retry-After can ask for, and the largest step of our own (FAULT-07, FAULT-08).
MAX_REST_S = 30.0
FIRST_REST_S = 1.0


@dataclass(slots=True)
class _Endpoint:
    lock: threading.Lock = field(default_factory=threading.Lock)
    faults: int = 0
    open_until: float = float("-inf")
    is_open: bool = False
    probing: bool = False
    in_flight: int = 0
    rest_until: float = float("-inf")
    next_rest_s: float = FIRST_REST_S


class GuardedSender:
    """
    Implements `ports.HttpSender` over another one.

    Args:
        sender: Sends what the guard lets through.
        clock: Times everything by its monotonic side.
        metrics: Counts what is held back, by reason.
        policy: When the breaker opens.
        max_in_flight: Most requests under way at one endpoint.
        jitter: A number from 0 to 1, to keep nodes from coming back all at once.
    """

    def __init__(
        self,
        sender: HttpSender,
        clock: Clock,
        metrics: Metrics,
        *,
        policy: BreakerPolicy,
        max_in_flight: int = MAX_IN_FLIGHT,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._sender = sender
        self._clock = clock
        self._metrics = metrics
        self._policy = policy
        self._max_in_flight = max_in_flight
        self._jitter = jitter
        # Keyed by configured or discovered endpoints, never by anything of a token: this stays small.
        self._endpoints: dict[str, _Endpoint] = {}
        self._endpoints_lock = threading.Lock()

    def send(self, request: HttpRequest, *, deadline: float, max_body: int) -> HttpResponse:
        """
        Send, unless the endpoint is held back just now.

        Raises:
            IssuerUnavailableError: held back (`breaker_open`, `endpoint_rests`, `exchange_shed`), or
                as the sender raises it.
            DeadlineError: as the sender raises it.
        """
        time_left_s = deadline - self._clock.monotonic()
        if time_left_s <= 0:
            raise DeadlineError(reason="deadline")
        endpoint = self._endpoint(request.url)
        probe = self._enter(endpoint)
        sent_at = self._clock.monotonic()
        try:
            response = self._sender.send(request, deadline=deadline, max_body=max_body)
        except DeadlineError:
            self._metrics.observe("exchange_seconds", self._clock.monotonic() - sent_at, result="deadline")
            # Who comes with little time left says nothing of the endpoint.
            self._leave(
                endpoint, probe=probe, fault=True if time_left_s >= self._policy.fair_time_s else None
            )
            raise
        except IssuerUnavailableError:
            self._metrics.observe("exchange_seconds", self._clock.monotonic() - sent_at, result="failed")
            self._leave(endpoint, probe=probe, fault=True)
            raise
        except BaseException:
            # Not the endpoint's fault as far as we know; a probe that ends so lets another one try.
            self._leave(endpoint, probe=probe, fault=None)
            raise
        self._metrics.observe("exchange_seconds", self._clock.monotonic() - sent_at, result="answered")
        rests = response.status == 429 or (response.status == 503 and "retry-after" in response.headers)
        if rests:
            self._rest(endpoint, response)
        self._leave(endpoint, probe=probe, fault=response.status >= 500 and not rests)
        return response

    def _endpoint(self, url: str) -> _Endpoint:
        endpoint = self._endpoints.get(url)
        if endpoint is None:
            with self._endpoints_lock:
                endpoint = self._endpoints.setdefault(url, _Endpoint())
        return endpoint

    def _enter(self, endpoint: _Endpoint) -> bool:
        now = self._clock.monotonic()
        with endpoint.lock:
            if now < endpoint.rest_until:
                wait_s = _whole_seconds(endpoint.rest_until - now)
                raise self._counted(IssuerUnavailableError(reason="endpoint_rests", retry_after=wait_s))
            if endpoint.is_open and (endpoint.probing or now < endpoint.open_until):
                wait_s = _whole_seconds(endpoint.open_until - now)
                raise self._counted(IssuerUnavailableError(reason="breaker_open", retry_after=wait_s))
            if endpoint.in_flight >= self._max_in_flight:
                raise self._counted(IssuerUnavailableError(reason="exchange_shed"))
            endpoint.in_flight += 1
            endpoint.probing = endpoint.is_open
            return endpoint.is_open

    def _counted(self, error: IssuerUnavailableError) -> IssuerUnavailableError:
        self._metrics.count("held_back", reason=error.reason)
        return error

    def _leave(self, endpoint: _Endpoint, *, probe: bool, fault: bool | None) -> None:
        now = self._clock.monotonic()
        with endpoint.lock:
            endpoint.in_flight -= 1
            if probe:
                endpoint.probing = False
            if fault is None:
                return
            if not fault:
                endpoint.faults = 0
                # Only the probe closes: an answer to a request from before says nothing of now.
                if probe:
                    endpoint.is_open = False
                return
            endpoint.faults += 1
            if probe or (0 < self._policy.failures <= endpoint.faults and not endpoint.is_open):
                endpoint.is_open = True
                endpoint.open_until = now + self._policy.open_for_s
                self._metrics.count("breaker_opened")

    def _rest(self, endpoint: _Endpoint, response: HttpResponse) -> None:
        now = self._clock.monotonic()
        asked = _retry_after_s(response)
        with endpoint.lock:
            if asked is not None:
                endpoint.rest_until = now + min(asked, MAX_REST_S)
                endpoint.next_rest_s = FIRST_REST_S
                return
            # A quiet time since the last rest starts the doubling anew.
            if now - endpoint.rest_until > 2 * MAX_REST_S:
                endpoint.next_rest_s = FIRST_REST_S
            endpoint.rest_until = now + endpoint.next_rest_s * (0.5 + 0.5 * self._jitter())
            endpoint.next_rest_s = min(2 * endpoint.next_rest_s, MAX_REST_S)


def _whole_seconds(wait_s: float) -> int:
    return max(1, min(math.ceil(wait_s), int(MAX_REST_S)))


def _retry_after_s(response: HttpResponse) -> float | None:
    value = response.headers.get("retry-after", "").strip()
    # A date would have to be judged by the server's clock; such an answer gets our own wait.
    if not (value.isascii() and value.isdigit() and 0 < len(value) < 7) or int(value) == 0:
        return None
    return float(value)
