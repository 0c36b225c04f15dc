"""
A steady stream of requests, each on a connection of its own, and a judge at the upstream.

A new connection per request: a kept one that the server closes while a request is under way
would be counted as the gateway's error.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from kong_token_exchange.sandbox.serving import HttpServer, Request, Response, json_headers
from kong_token_exchange.sandbox.upstream import bearer_token, read_claims

# Longer than any deadline of ours: whatever takes longer than this hangs.
ANSWER_TIMEOUT_S = 20.0

Verdict = str | None


class JudgingUpstream(HttpServer):
    """An API that judges every token it gets: `complaints` counts what is wrong, `good` what is right."""

    def __init__(self, judge: Callable[[str, str | None, Mapping[str, Any]], Verdict]) -> None:
        super().__init__(self._echo_nothing, name="judging-upstream")
        self._judge = judge
        self.complaints: Counter[str] = Counter()
        self.good = 0

    def _echo_nothing(self, request: Request) -> Response:
        token = bearer_token(request)
        verdict = self._judge(request.path, token, (read_claims(token) if token else None) or {})
        if verdict is None:
            self.good += 1
        else:
            self.complaints[verdict] += 1
        return Response(200, json_headers(), b"{}")


class SteadyLoad:
    """
    Send *rate* requests a second from a few threads until told to stop; a context manager.

    Args:
        url: Of the gateway, `http://host:port`.
        requests: Path and bearer token of each request, taken in turn.
        rate: Requests a second, of all threads.
        threads: How many requests may be under way.
    """

    def __init__(
        self, url: str, requests: Sequence[tuple[str, str]], *, rate: float, threads: int = 16
    ) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._address = (host, int(port))
        self._requests = requests
        self._rate = rate
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._next = 0
        self._started = 0.0
        self._ended = 0.0
        self.outcomes: Counter[str] = Counter()
        self.slowest_s = 0.0

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._ended = time.monotonic()
        for thread in self._threads:
            thread.join(2 * ANSWER_TIMEOUT_S)

    @property
    def sent(self) -> int:
        return sum(self.outcomes.values())

    @property
    def achieved_rate(self) -> float:
        return self.sent / ((self._ended or time.monotonic()) - self._started)

    def summary(self) -> str:
        outcomes = " ".join(f"{name}={count}" for name, count in sorted(self.outcomes.items()))
        return (
            f"{self.sent} requests at {self.achieved_rate:.0f}/s, slowest {self.slowest_s:.2f} s: {outcomes}"
        )

    def _run(self) -> None:
        while not self._stopped.is_set():
            with self._lock:
                number = self._next
                self._next += 1
            due = self._started + number / self._rate
            if self._stopped.wait(max(0.0, due - time.monotonic())):
                return
            began = time.monotonic()
            outcome = self._send(*self._requests[number % len(self._requests)])
            with self._lock:
                self.outcomes[outcome] += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)

    def _send(self, path: str, token: str) -> str:
        connection = http.client.HTTPConnection(*self._address, timeout=ANSWER_TIMEOUT_S)
        try:
            connection.request(
                "GET", path, headers={"Authorization": f"Bearer {token}", "Connection": "close"}
            )
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__
        else:
            return str(answer.status)
        finally:
            connection.close()
