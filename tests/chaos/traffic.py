"""
Good and bad requests all the time, and the books about them.

Each request carries an id, so that what the upstream sees can be laid beside what was sent: whether
that request's token was acceptable at all (I1), whether the caller's own token came through where it
had to be exchanged (I2), and whether what came instead was issued for that very token (I3).
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import random
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kong_token_exchange.sandbox.issuer import Issuer, SigningKey, encode_jws
from kong_token_exchange.sandbox.serving import HttpServer, LoopThread, Request, Response, json_headers
from kong_token_exchange.sandbox.upstream import bearer_token, read_claims
from tests.chaos.idp import CLAIM, EXCHANGED_SCOPES, SECRET, USERS, ChaosIdp, mint

ID_HEADER = "x-chaos-id"

# Tokens of each route that are sent again and again.
WARM = 3

# A client that has waited for so long has not been answered.
CLIENT_TIMEOUT_S = 25.0
# More than this under way, and the stream of requests pauses: the rate is bounded both ways.
MAX_IN_FLIGHT = 400

# What a connection came to instead of a status.
REFUSED, BROKEN, UNANSWERED = -1, -2, -3
WORDS = {REFUSED: "refused", BROKEN: "broken", UNANSWERED: "unanswered", 0: "pending"}

# The audience that each route asks for; what its upstream sees must have it.
AUDIENCE = {
    "/orders": "orders-api",
    "/reports": "reports-api",
    "/second": "orders-api",
    "/secure": "orders-api",
    "/nodns": "orders-api",
    "/toggle": "orders-api",
}
REALM = {"/second": "second", "/secure": "secure", "/nodns": "nodns"}

_JWT = re.compile(r"eyJ[A-Za-z0-9_-]{12,}")
_LONG_RUN = re.compile(r"[A-Za-z0-9_-]{40,}")
MARKS = (SECRET, CLAIM, "MARKsub")

GOOD_STATUS = 200
# What each kind of bad request is answered when nothing is wrong.
BAD_STATUS = {
    "opaque": 401,
    "stranger": 401,
    "alg-none": 401,
    "malformed": 400,
    "none": 401,
    "forged": 401,
    "expired": 401,
    "nobody": 403,
}
# Judged without any key: whatever happens to the issuer, the answer is the same.
GARBAGE = frozenset({"opaque", "stranger", "alg-none", "malformed", "none"})


@dataclass(slots=True)
class Sent:
    """One request and its answer. Times are monotonic seconds."""

    id: str
    kind: str
    good: bool
    path: str
    authorization: str | None
    jti: str | None
    subject: str | None
    sent_at: float
    ended_at: float = 0.0
    status: int = 0
    retry_after: str | None = None
    body: bytes = b""
    upstream_hits: int = 0
    exchanged: bool = True

    @property
    def took_s(self) -> float:
        return self.ended_at - self.sent_at


@dataclass
class Books:
    """Everything sent, by id; what is wrong with what the upstream saw."""

    sent: dict[str, Sent] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    complained: Counter[str] = field(default_factory=Counter)
    signatures: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def complain(self, invariant: str, text: str) -> None:
        with self._lock:
            self.complained[invariant] += 1
            if self.complained[invariant] <= 5:
                self.complaints.append(f"{invariant}: {text}")

    def take_complaints(self) -> list[str]:
        with self._lock:
            found, self.complaints = self.complaints, []
            total, self.complained = self.complained, Counter()
        return [*found, *(f"{name}: {count} in all" for name, count in total.items() if count > 5)]

    def look_for_marks(self, where: str, text: str) -> None:
        """I6: no mark, no piece of a token, in anything that people read."""
        for mark in MARKS:
            if mark in text:
                self.complain("I6", f"{mark} in {where}: {_around(text, mark)}")
        found = _JWT.search(text)
        if found:
            self.complain("I6", f"something like a token in {where}: {_around(text, found[0][:12])}")
        for run in _LONG_RUN.findall(text):
            if run[:40] in self.signatures:
                self.complain("I6", f"a signature in {where}: {_around(text, run[:12])}")

    def note_token(self, token: str) -> None:
        signature = token.rpartition(".")[2]
        if len(signature) >= 40:
            self.signatures.add(signature[:40])


def _around(text: str, what: str) -> str:
    at = text.find(what)
    return text[max(0, at - 60) : at + 20].replace("\n", " ")


# --- the upstream ---------------------------------------------------------------------


class Upstream(HttpServer):
    """The API behind the gateway: judges every request that reaches it."""

    def __init__(self, books: Books, idps: Iterable[ChaosIdp]) -> None:
        super().__init__(self._judge, name="chaos-upstream")
        self._books = books
        self._idps = list(idps)
        self.hits = 0
        # Requests that go upstream as they came, because the plugin is switched off there.
        self.open_paths: set[str] = set()
        self.raw_seen = 0
        # Paths whose audience changes while requests flow; the row itself judges what it saw.
        self.flexible: set[str] = set()
        self.audiences: deque[tuple[float, str, str]] = deque(maxlen=20_000)

    def _judge(self, request: Request) -> Response:
        self.hits += 1
        for invariant, text in self._complaints(request):
            self._books.complain(invariant, text)
        return Response(200, json_headers(), b"{}")

    def _complaints(self, request: Request) -> Iterable[tuple[str, str]]:
        sent = self._books.sent.get(request.header(ID_HEADER) or "")
        if sent is None:
            yield "I1", f"a request that nobody sent: {request.path}"
            return
        sent.upstream_hits += 1
        if request.path in self.open_paths and self._is_untouched(request, sent):
            self.raw_seen += 1
            return
        if not sent.good:
            yield "I1", f"a bad request ({sent.kind}) reached the upstream of {request.path}"
        token = bearer_token(request) or ""
        if not sent.exchanged:
            if f"Bearer {token}" != sent.authorization:
                yield "I3", f"{sent.kind}: another token than the one to be forwarded"
            return
        own = (sent.authorization or "").removeprefix("Bearer ")
        if any(own in value or own.rpartition(".")[2] in value for _, value in request.headers):
            yield "I2", f"the caller's own token reached the upstream of {request.path}"
        if own and own in request.target:
            yield "I2", f"the caller's own token is in the query of {request.path}"
        yield from self._judge_exchanged(token, sent, request.path)

    def _is_untouched(self, request: Request, sent: Sent) -> bool:
        return request.header("authorization") == sent.authorization

    def _judge_exchanged(self, token: str, sent: Sent, path: str) -> Iterable[tuple[str, str]]:
        claims = read_claims(token) or {}
        issued = next((found for idp in self._idps if (found := idp.issued.get(claims.get("jti", "")))), None)
        if issued is None:
            yield "I3", f"a token that was never issued, at {path}"
            return
        self._books.note_token(token)
        if not issued.honest or issued.subject_jti != sent.jti:
            yield "I3", f"a token issued for another subject token, at {path}"
        if claims.get("sub") != sent.subject:
            yield "I3", f"another subject's token, at {path}"
        aud = claims.get("aud")
        names = [aud] if isinstance(aud, str) else list(aud or [])
        self.audiences.append((time.monotonic(), path, ",".join(names)))
        if path not in self.flexible and AUDIENCE.get(path, "") not in names:
            yield "I3", f"a token for {aud} at {path}: another route's configuration"


# --- tokens ---------------------------------------------------------------------------


class Wallet:
    """Tokens of every kind, good and bad."""

    def __init__(self, issuers: Mapping[str, Issuer], books: Books, seed: int) -> None:
        self.issuers = issuers
        self._books = books
        self._random = random.Random(seed)
        self._forger = SigningKey.generate("ES256")
        self._warm: dict[tuple[str, int], str] = {}
        self._count = itertools.count(1)
        self.life_s: float = 3 * 3600.0

    def user(self) -> str:
        return f"user-{self._random.randrange(USERS)}"

    def make(
        self, kind: str, path: str, token: str | None = None, *, exchanged: bool = True, good: bool = True
    ) -> Sent:
        """Return a request to be sent, with a token of its kind; the books know it from here on."""
        if token is None and kind in BAD_STATUS:
            value, good = self._bad(kind, path), False
        else:
            chosen = token if token is not None else self.token(kind, path)
            self._books.note_token(chosen)
            value = f"Bearer {chosen}"
        claims = read_claims((value or "").removeprefix("Bearer ")) or {}
        sent = Sent(
            id=f"c{next(self._count)}",
            kind=kind,
            good=good,
            path=path,
            authorization=value,
            jti=claims.get("jti"),
            subject=claims.get("sub"),
            sent_at=time.monotonic(),
            exchanged=exchanged and kind != "forward",
        )
        self._books.sent[sent.id] = sent
        return sent

    def token(self, kind: str, path: str) -> str:
        if kind in ("warm", "other"):
            return self._reused(path)
        if kind == "forward":
            return self.fresh(path, scopes=("orders",))
        return self.fresh(path)

    def fresh(self, path: str, scopes: Sequence[str] = EXCHANGED_SCOPES, **changes: Any) -> str:
        changes.setdefault("life_s", self.life_s)
        token = mint(self.issuers[REALM.get(path, "internal")], self.user(), scopes, **changes)
        self._books.note_token(token)
        return token

    def _reused(self, path: str) -> str:
        key = (path, self._random.randrange(WARM))
        if key not in self._warm:
            self._warm[key] = self.fresh(path)
        return self._warm[key]

    def prime(self, paths: Iterable[str] = ("/orders", "/reports", "/second", "/secure")) -> list[Sent]:
        """Return requests with each token that is used again and again: once sent, they are cached."""
        for path in paths:
            for number in range(WARM):
                self._warm.setdefault((path, number), self.fresh(path))
        return [self.make("warm", path, token) for (path, _), token in self._warm.items() if path in paths]

    def forget_warm(self) -> None:
        self._warm.clear()

    def _bad(self, kind: str, path: str) -> str | None:
        makers: Mapping[str, Callable[[], str]] = {
            "opaque": lambda: self._random.randbytes(24).hex(),
            "malformed": lambda: "two tokens",
            "expired": lambda: self.fresh(path, life_s=-30),
            "forged": lambda: self.forged(path),
            "nobody": lambda: self.fresh(path, scopes=("inventory",)),
            "stranger": lambda: self._stranger(path),
            "alg-none": lambda: self._unsigned(path),
        }
        return None if kind == "none" else "Bearer " + makers[kind]()

    def _stranger(self, path: str) -> str:
        claims = {**(read_claims(self.fresh(path)) or {}), "iss": "https://stranger.example"}
        return encode_jws({"alg": "ES256", "kid": "x"}, claims, self._forger.sign)

    def _unsigned(self, path: str) -> str:
        claims = read_claims(self.fresh(path)) or {}
        return encode_jws({"alg": "none", "typ": "JWT"}, claims, lambda _: b"")

    def forged(self, path: str) -> str:
        """A token with the right `kid`, signed by somebody else."""
        issuer = self.issuers[REALM.get(path, "internal")]
        claims = read_claims(self.fresh(path)) or {}
        header = {"alg": "ES256", "kid": issuer.key("ES256").kid, "typ": "JWT"}
        return encode_jws(header, claims, self._forger.sign)

    def unknown_kid(self, path: str) -> str:
        """A token that names a key nobody has."""
        head, payload, signature = self.fresh(path).split(".")
        header = json.loads(base64.urlsafe_b64decode(head + "=="))
        header["kid"] = self._random.randbytes(8).hex()
        changed = base64.urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=").decode()
        return f"{changed}.{payload}.{signature}"


# --- sending --------------------------------------------------------------------------

# Twenty requests, good and bad, in the order in which they are sent again and again.
MIX: Sequence[tuple[str, str]] = (
    ("warm", "/orders"),
    ("fresh", "/orders"),
    ("opaque", "/orders"),
    ("warm", "/reports"),
    ("forged", "/reports"),
    ("forward", "/orders"),
    ("fresh", "/reports"),
    ("none", "/orders"),
    ("other", "/second"),
    ("expired", "/orders"),
    ("warm", "/orders"),
    ("stranger", "/reports"),
    ("fresh", "/orders"),
    ("alg-none", "/orders"),
    ("other", "/second"),
    ("warm", "/reports"),
    ("nobody", "/orders"),
    ("fresh", "/reports"),
    ("malformed", "/reports"),
    ("forged", "/orders"),
)


class Client:
    """Sends requests over new connections, from a loop of its own; keeps each until it is taken."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._thread = LoopThread("chaos-client")
        self._address = ("127.0.0.1", 0)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stream: asyncio.Task[None] | None = None
        self.done: deque[Sent] = deque()
        self.rate = 0.0
        self.worst_lag_s = 0.0
        self.pauses = 0

    def start(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._address = (host, int(port))
        self._thread.start()
        self._thread.call(self._begin())

    def stop(self) -> None:
        self._thread.stop()

    @property
    def in_flight(self) -> int:
        return len(self._tasks)

    def stream(
        self, rate: float, make: Callable[[str, str], Sent], mix: Sequence[tuple[str, str]] = MIX
    ) -> None:
        """Send the mix at *rate* a second until `quiet`."""
        self.quiet()
        self.rate = rate

        async def begin() -> None:
            self._stream = asyncio.get_running_loop().create_task(self._flow(rate, make, mix))

        self._thread.call(begin())

    def quiet(self) -> None:
        async def end() -> None:
            if self._stream is not None:
                self._stream.cancel()
                self._stream = None

        self._thread.call(end())

    def send(self, sent: Sent, extra: bytes = b"") -> Sent:
        """Send one request and wait for its end."""
        self._thread.call(self._exchange(sent, extra), CLIENT_TIMEOUT_S + 5)
        return sent

    def send_all(self, requests: Sequence[Sent], *, abort_after_s: float | None = None) -> None:
        """Send all at the same time and wait for their ends; or leave them after a while."""

        async def burst() -> None:
            tasks = [asyncio.ensure_future(self._exchange(sent)) for sent in requests]
            _, pending = await asyncio.wait(tasks, timeout=abort_after_s)
            for task in pending:
                task.cancel()
            if pending:
                await asyncio.wait(pending)

        self._thread.call(burst(), CLIENT_TIMEOUT_S + 15)

    def run(self, work: Any, timeout_s: float = 60.0) -> Any:
        """Run a coroutine in the client's loop."""
        return self._thread.call(work, timeout_s)

    async def _begin(self) -> None:
        asyncio.get_running_loop().create_task(self._watch_lag())

    async def _watch_lag(self) -> None:
        # Its own lateness must not be counted as the gateway's.
        while True:
            due = time.monotonic() + 0.05
            await asyncio.sleep(0.05)
            self.worst_lag_s = max(self.worst_lag_s, time.monotonic() - due)

    async def _flow(
        self, rate: float, make: Callable[[str, str], Sent], mix: Sequence[tuple[str, str]]
    ) -> None:
        began = time.monotonic()
        for number in itertools.count():
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
            while len(self._tasks) >= MAX_IN_FLIGHT:
                self.pauses += 1
                await asyncio.sleep(0.05)
                began += 0.05
            self.launch(make(*mix[number % len(mix)]))

    def launch(self, sent: Sent) -> None:
        """Send without waiting; only from the client's loop."""
        task = asyncio.ensure_future(self._exchange(sent))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _exchange(self, sent: Sent, extra: bytes = b"") -> None:
        sent.sent_at = time.monotonic()
        try:
            async with asyncio.timeout(CLIENT_TIMEOUT_S):
                await self._talk(sent, extra)
        except TimeoutError:
            sent.status = UNANSWERED
        except ConnectionRefusedError:
            sent.status = REFUSED
        except (OSError, ValueError, IndexError):
            sent.status = BROKEN
        except asyncio.CancelledError:
            sent.kind = "left"
            raise
        finally:
            sent.ended_at = time.monotonic()
            self.done.append(sent)

    async def _talk(self, sent: Sent, extra: bytes) -> None:
        reader, writer = await asyncio.open_connection(*self._address)
        try:
            credential = f"Authorization: {sent.authorization}\r\n" if sent.authorization else ""
            writer.write(
                f"GET {sent.path} HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n"
                f"{ID_HEADER}: {sent.id}\r\n{credential}".encode("latin-1")
                + extra
                + b"\r\n"
            )
            answer = await reader.read(-1)
        finally:
            writer.close()
        head = answer.partition(b"\r\n\r\n")[0]
        lines = head.decode("latin-1").split("\r\n")
        sent.status = int(lines[0].split(" ", 2)[1])
        for line in lines[1:]:
            if line.lower().startswith("retry-after:"):
                sent.retry_after = line.partition(":")[2].strip()
        if sent.status != GOOD_STATUS:
            self._books.look_for_marks(f"an answer {sent.status}", answer.decode("utf-8", "replace"))
