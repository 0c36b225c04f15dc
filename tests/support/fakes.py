"""
Fakes of the flow's ports: a clock that is moved, a sender with scripted answers, keys in memory.

    clock = FakeClock()
    sender = FakeSender({TOKEN_ENDPOINT: [token_response("..."), IssuerUnavailableError(reason="down")]})
    sender.count(TOKEN_ENDPOINT)        how often it was asked
    with sender.held() as hold: ...     answers wait until the block ends; `hold.entered` says one waits

Each fake counts what is asked of it, so that tests count calls instead of sleeping.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from kong_token_exchange.core.jwk import JwkSet, parse_jwk_set
from kong_token_exchange.ports import AuditEvent, IssuerEndpoints, NotInMemoryError
from kong_token_exchange.protocol.http_message import HttpRequest, HttpResponse
from tests.support.minting import NOW

# Longer than any wait that is meant to end; short enough that a hang is seen.
PATIENCE_S = 10.0

Answer = HttpResponse | BaseException | Callable[[HttpRequest], HttpResponse]

ACCESS_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:access_token"


class FakeClock:
    """Two clocks that stand still until they are moved."""

    def __init__(self, now: float = NOW, monotonic: float = 1_000.0) -> None:
        self._now = float(now)
        self._monotonic = monotonic

    def now(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds
        self._monotonic += seconds

    def step_wall(self, seconds: float) -> None:
        """Set the wall clock, as an administrator or NTP does; no time passes."""
        self._now += seconds


@dataclass
class Hold:
    """Answers that wait: `entered` is set once the first caller waits for one."""

    entered: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def release_first(self) -> None:
        """Let the answers go once somebody waits for one."""
        assert self.entered.wait(PATIENCE_S)
        self.released.set()


class FakeSender:
    """
    Answers from a script, by URL.

    A list is used up in order and its last answer repeated; anything else answers every time.
    """

    def __init__(self, script: Mapping[str, Answer | Sequence[Answer]] | None = None) -> None:
        self.script: dict[str, Answer | Sequence[Answer]] = dict(script or {})
        self.requests: list[HttpRequest] = []
        self.deadlines: list[float] = []
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._hold: Hold | None = None

    def send(self, request: HttpRequest, *, deadline: float, max_body: int) -> HttpResponse:
        with self._lock:
            self.requests.append(request)
            self.deadlines.append(deadline)
            answer = self._next(request.url)
            self._asked[request.url] += 1
            hold = self._hold
        if hold is not None:
            hold.entered.set()
            assert hold.released.wait(PATIENCE_S)
        if isinstance(answer, BaseException):
            raise answer
        return answer if isinstance(answer, HttpResponse) else answer(request)

    def count(self, url: str | None = None) -> int:
        """Return how often *url*, or anything, was asked."""
        return len(self.requests) if url is None else self._asked[url]

    def forms(self) -> list[list[tuple[str, str]]]:
        """Return the forms that were posted."""
        return [form_of(request) for request in self.requests if request.method == "POST"]

    @contextmanager
    def held(self) -> Iterator[Hold]:
        """Make callers wait for their answers until the block ends."""
        self._hold = hold = Hold()
        try:
            yield hold
        finally:
            self._hold = None
            hold.released.set()

    def _next(self, url: str) -> Answer:
        assert url in self.script, f"nobody is to ask {url}"
        answer = self.script[url]
        if isinstance(answer, Sequence):
            return answer[min(self._asked[url], len(answer) - 1)]
        return answer


class FakeKeySource:
    """
    Keys and token endpoints in memory, by issuer.

    `newer` is what a fetch for an unknown key brings: a set, an error, or nothing. Issuers in
    `cold` have nothing in memory: whoever may not wait gets `NotInMemoryError`.
    """

    def __init__(
        self, keys: Mapping[str, bytes | BaseException], *, token_endpoint: str | BaseException = ""
    ) -> None:
        self.sets: dict[str, JwkSet | BaseException] = {
            issuer: parse_jwk_set(served) if isinstance(served, bytes) else served
            for issuer, served in keys.items()
        }
        self.endpoint = token_endpoint
        self.newer: dict[str, JwkSet | BaseException | None] = {}
        self.cold: set[str] = set()
        # Changed by a test that changes what a fetch brings.
        self.generation = 0
        self.settled = float("inf")
        self.asked: Counter[str] = Counter()
        self.asked_newer: Counter[str] = Counter()

    def keys(self, endpoints: IssuerEndpoints, *, deadline: float | None) -> JwkSet:
        self._wait(endpoints.issuer, deadline)
        self.asked[endpoints.issuer] += 1
        return _given(self.sets[endpoints.issuer])

    def newer_keys(self, endpoints: IssuerEndpoints, *, deadline: float | None) -> JwkSet | None:
        if endpoints.issuer in self.newer and deadline is None:
            raise NotInMemoryError
        self.asked_newer[endpoints.issuer] += 1
        newer = self.newer.get(endpoints.issuer)
        return None if newer is None else _given(newer)

    def settled_until(self, endpoints: IssuerEndpoints) -> float:
        return self.settled

    def token_endpoint(self, endpoints: IssuerEndpoints, *, deadline: float | None) -> str:
        self._wait(endpoints.issuer, deadline)
        if isinstance(self.endpoint, BaseException):
            raise self.endpoint
        return endpoints.token_endpoint or self.endpoint

    def _wait(self, issuer: str, deadline: float | None) -> None:
        if issuer in self.cold and deadline is None:
            raise NotInMemoryError
        self.cold.discard(issuer)


class FakeAudit:
    """Keeps the events."""

    def __init__(self) -> None:
        self.events: list[AuditEvent] = []

    def record(self, event: AuditEvent) -> None:
        self.events.append(event)


class FakeMetrics:
    """Counts by name and labels, `requests,outcome=refuse,reason=token_expired`."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.times: list[tuple[str, float, dict[str, str]]] = []

    def count(self, name: str, **labels: str) -> None:
        self.counter(name, **labels)()

    def counter(self, name: str, **labels: str) -> Callable[[], None]:
        key = name + "".join(f",{label}={value}" for label, value in labels.items())
        return lambda: self.counts.update([key])

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        self.times.append((name, seconds, labels))


# --- messages -------------------------------------------------------------------------


def json_response(document: object, status: int = 200, **headers: str) -> HttpResponse:
    """Return an answer with a JSON body."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return HttpResponse(
        status=status,
        headers={"content-type": "application/json", **named},
        body=json.dumps(document).encode(),
    )


def token_document(token: str, **members: object) -> dict[str, object]:
    """Return a good token response with *members* changed; ... leaves one out."""
    good: dict[str, object] = {
        "access_token": token,
        "issued_token_type": ACCESS_TOKEN_TYPE,
        "token_type": "Bearer",
        "expires_in": 300,
    }
    return {name: value for name, value in {**good, **members}.items() if value is not ...}


def token_response(token: str, **members: object) -> HttpResponse:
    """Return the answer of a token endpoint that issued *token*."""
    return json_response(token_document(token, **members))


def error_response(error: str, description: str | None = None, status: int = 400) -> HttpResponse:
    """Return an OAuth error (RFC 6749 section 5.2)."""
    document = {"error": error} if description is None else {"error": error, "error_description": description}
    return json_response(document, status)


def form_of(request: HttpRequest) -> list[tuple[str, str]]:
    """Return the members of a form, in order."""
    return parse_qsl(request.body.decode("ascii"), keep_blank_values=True, strict_parsing=True)


def run_in_threads(work: Callable[[], object], count: int) -> list[Any]:
    """Run *work* in *count* threads at once; return results and errors."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - the test asserts what came
            results.append(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "a thread hangs"
    return results


def _given(value: JwkSet | BaseException) -> JwkSet:
    if isinstance(value, BaseException):
        raise value
    return value
