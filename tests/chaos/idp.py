"""
An identity provider that can be told to misbehave, and remembers which token it gave for which.

What it answers when it behaves is the sandbox issuer's own answer. Every misbehaviour is a small
coroutine over one request (`Turn`), so a row of the suite writes the bytes it wants. The listener
itself can be closed (`down`), or stay with a full backlog that takes no further connection
(`black_hole`), or speak TLS with any certificate.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qs

from kong_token_exchange.sandbox.issuer import Issuer, User, internal_realm
from kong_token_exchange.sandbox.serving import LoopThread
from kong_token_exchange.sandbox.upstream import read_claims

SECRET = "MARKsecretQ7wV2"
CLAIM = "MARKclaimX9zK4"
USERS = 48
LISTEN_HOST = "127.0.0.1"

_PREFIX = "protocol/openid-connect/"
_ENDPOINTS = {
    _PREFIX + "token": "token",
    _PREFIX + "certs": "jwks",
    ".well-known/openid-configuration": "discovery",
}


@dataclass(frozen=True, slots=True)
class Issued:
    """What one exchanged token was issued for."""

    realm: str
    subject_jti: str
    subject: str
    honest: bool


@dataclass(slots=True)
class Ask:
    """One request to the identity provider."""

    realm: str
    endpoint: str
    method: str
    headers: Mapping[str, str]
    body: bytes
    at: float


@dataclass(slots=True)
class Turn:
    """One request with the means to answer it; a behaviour returns whether the connection stays."""

    idp: ChaosIdp
    ask: Ask
    writer: asyncio.StreamWriter

    def normal(self) -> tuple[int, dict[str, str], bytes]:
        return self.idp.answer(self.ask)

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def reply(self, status: int, headers: Mapping[str, str], body: bytes) -> bool:
        await self.send(render(status, headers, body))
        return True

    def reset(self) -> None:
        """Drop the connection with RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.writer.transport.abort()


Behaviour = Callable[[Turn], Awaitable[bool]]


def render(status: int, headers: Mapping[str, str], body: bytes) -> bytes:
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers.items())]
    lines += [f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


# --- behaviours -----------------------------------------------------------------------


async def behave(turn: Turn) -> bool:
    return await turn.reply(*turn.normal())


def answering(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Behaviour:
    async def answer(turn: Turn) -> bool:
        return await turn.reply(status, headers or {"Content-Type": "application/json"}, body)

    return answer


def after(delay_s: float, then: Behaviour = behave) -> Behaviour:
    async def wait(turn: Turn) -> bool:
        await asyncio.sleep(delay_s)
        return await then(turn)

    return wait


async def silence(turn: Turn) -> bool:
    """Take the request and never answer; ends with the connection."""
    with contextlib.suppress(OSError):
        while not turn.writer.is_closing():  # noqa: ASYNC110 - the other side's end is no event here
            await asyncio.sleep(0.05)
    return False


def dripping(interval_s: float) -> Behaviour:
    """Answer one byte at a time."""

    async def drip(turn: Turn) -> bool:
        for byte in render(*turn.normal()):
            await turn.send(bytes([byte]))
            await asyncio.sleep(interval_s)
        return True

    return drip


def cut_after(count: int, *, reset: bool) -> Behaviour:
    """Send the head and *count* bytes of the body, then end the connection."""

    async def cut(turn: Turn) -> bool:
        status, headers, body = turn.normal()
        whole = render(status, headers, body)
        await turn.send(whole[: len(whole) - len(body) + count])
        if reset:
            await asyncio.sleep(0.02)
            turn.reset()
        return False

    return cut


def sometimes(behaviours: Sequence[Behaviour], choose: Callable[[], int]) -> Behaviour:
    async def pick(turn: Turn) -> bool:
        return await behaviours[choose()](turn)

    return pick


def closing_when_idle(idle_s: float) -> Behaviour:
    """Answer as if the connection stayed, then close it a moment later, as idle timeouts do."""

    async def close_later(turn: Turn) -> bool:
        await turn.reply(*turn.normal())
        await asyncio.sleep(idle_s)
        return False

    return close_later


async def swap_subject(turn: Turn) -> bool:
    """Answer with a good token of somebody else."""
    status, headers, body = turn.idp.answer_for_another(turn.ask)
    return await turn.reply(status, headers, body)


# --- the server -----------------------------------------------------------------------


class ChaosIdp:
    """
    One or more realms behind one listener.

    Args:
        base: What the issuers' names begin with, `http://keycloak:8080`.
        realms: Their names.
        tls: Serve TLS with it; may be replaced while running (`set_tls`).
    """

    def __init__(self, base: str, realms: Sequence[str], *, tls: ssl.SSLContext | None = None) -> None:
        self.offset_s = 0.0
        self.issuers = {name: _issuer(f"{base}/realms/{name}", self.now) for name in realms}
        self.issued: dict[str, Issued] = {}
        self.asks: list[tuple[float, str, str]] = []
        self._generation = 0
        self._tls = tls
        self._behaviours: dict[tuple[str, str], Behaviour] = {}
        self._documents: dict[tuple[str, str], bytes] = {}
        self._thread = LoopThread("chaos-idp")
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._hole: list[socket.socket] = []
        with socket.socket() as probe:
            probe.bind((LISTEN_HOST, 0))
            self.address: tuple[str, int] = probe.getsockname()
        self._lock = threading.Lock()

    def now(self) -> float:
        return time.time() + self.offset_s

    def start(self) -> None:
        self._thread.start()
        self.up()

    def stop(self) -> None:
        self.down()
        self._thread.stop()

    # --- faults -----------------------------------------------------------------------

    def up(self) -> None:
        """Listen, if it does not."""
        self._fill_hole()
        if self._server is None:
            self._thread.call(self._listen())

    def down(self) -> None:
        """Refuse connections and drop those that are open."""
        self._fill_hole()
        if self._server is not None:
            self._thread.call(self._shut())

    def black_hole(self) -> None:
        """Let every new connection attempt go unanswered: a listener whose backlog is full."""
        self.down()
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(self.address)
        listener.listen(0)
        self._hole = [listener]
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(self.address)
            self._hole.append(filler)
        time.sleep(0.05)

    def _fill_hole(self) -> None:
        for sock in self._hole:
            sock.close()
        self._hole = []

    def set_tls(self, tls: ssl.SSLContext | None) -> None:
        self.down()
        self._tls = tls
        self.up()

    def misbehave(self, realm: str, endpoint: str, behaviour: Behaviour) -> None:
        """Let one endpoint (`token`, `jwks`, `discovery`, or `*` for all) behave so from now on."""
        with self._lock:
            self._behaviours[realm, endpoint] = behaviour

    def behave(self) -> None:
        """Behave again, and listen."""
        with self._lock:
            self._behaviours.clear()
            self._documents.clear()
        self.offset_s = 0.0
        self.up()

    # --- what was asked ---------------------------------------------------------------

    def count(self, realm: str, endpoint: str, since: float = 0.0) -> int:
        """Return how many requests have come for one endpoint since a monotonic instant."""
        with self._lock:
            return sum(1 for at, *what in self.asks if at >= since and what == [realm, endpoint])

    def forget(self) -> None:
        """Start counting anew."""
        with self._lock:
            self.asks.clear()

    # --- answers ----------------------------------------------------------------------

    def answer(self, ask: Ask) -> tuple[int, dict[str, str], bytes]:
        issuer = self.issuers[ask.realm]
        if ask.endpoint == "token":
            status, headers, body = issuer.answer_token_request(ask.body, ask.headers)
            self._note(ask, body, honest=True)
            return status, headers, body
        document = issuer.jwks() if ask.endpoint == "jwks" else issuer.discovery()
        return 200, {"Content-Type": "application/json"}, json.dumps(document).encode()

    def answer_for_another(self, ask: Ask) -> tuple[int, dict[str, str], bytes]:
        """Exchange, but for another user's token of the same shape."""
        issuer = self.issuers[ask.realm]
        form = parse_qs(ask.body.decode())
        claims = read_claims(form["subject_token"][0]) or {}
        name = next(name for name, user in issuer.realm.users.items() if user.id != claims.get("sub"))
        other = mint(issuer, name)
        form["subject_token"] = [other]
        body = "&".join(f"{key}={value}" for key, values in form.items() for value in map(_quote, values))
        status, headers, answer = issuer.answer_token_request(body, ask.headers)
        self._note(ask, answer, honest=False)
        return status, headers, answer

    def _note(self, ask: Ask, body: bytes, *, honest: bool) -> None:
        token = json.loads(body).get("access_token") if body else None
        given = read_claims(token) if token else None
        subject = read_claims((parse_qs(ask.body.decode()).get("subject_token") or [""])[0])
        if given is not None and subject is not None:
            self.issued[given["jti"]] = Issued(
                ask.realm, str(subject.get("jti")), str(subject.get("sub")), honest
            )

    # --- the listener -----------------------------------------------------------------

    async def _listen(self) -> None:
        generation = self._generation

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._serve(reader, writer, generation)

        self._server = await asyncio.start_server(
            serve, *self.address, reuse_address=True, backlog=1024, ssl=self._tls
        )

    async def _shut(self) -> None:
        # A handshake that is under way now may end later, with the old certificate.
        self._generation += 1
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, generation: int
    ) -> None:
        self._writers.add(writer)
        try:
            while generation == self._generation and await self._serve_one(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        begin = await reader.readexactly(1)
        if begin == b"\x16":
            # A TLS handshake on a plain port: servers answer so.
            writer.write(render(400, {"Connection": "close"}, b"plain HTTP only"))
            return False
        head = (begin + await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
        }
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        realm, endpoint = _place(target)
        if endpoint is None or realm not in self.issuers:
            writer.write(render(404, {}, b"{}"))
            return True
        ask = Ask(realm, endpoint, method, headers, body, time.monotonic())
        with self._lock:
            self.asks.append((ask.at, realm, endpoint))
            behaviour = (
                self._behaviours.get((realm, endpoint)) or self._behaviours.get((realm, "*")) or behave
            )
        return await behaviour(Turn(self, ask, writer))


def _place(target: str) -> tuple[str, str | None]:
    parts = target.strip("/").split("/", 2)
    if len(parts) < 3 or parts[0] != "realms":
        return "", None
    return parts[1], _ENDPOINTS.get(parts[2])


def _quote(value: str) -> str:
    from urllib.parse import quote

    return quote(value, safe="")


def _issuer(name: str, now: Callable[[], float]) -> Issuer:
    realm = internal_realm("http://nobody.invalid")
    clients = dict(realm.clients)
    # Longer than any row, so that what is cached at its begin is cached at its end.
    clients["client-2"] = replace(clients["client-2"], secret=SECRET, token_life_s=3 * 3600)
    users = {
        f"user-{number}": User(
            id=f"MARKsub{number:02}-7f3a-4b1c", password="x", email=f"user-{number}@x.example"
        )
        for number in range(USERS)
    }
    return Issuer(name, replace(realm, clients=clients, users=users), now=now)


EXCHANGED_SCOPES = ("orders", "reports", "add-client-2-as-audience")


def mint(issuer: Issuer, user: str, scopes: Sequence[str] = EXCHANGED_SCOPES, **changes: object) -> str:
    """Return a subject token, signed with ES256: it is made three times as fast as RS256."""
    options: dict[str, object] = {"key": issuer.key("ES256"), "mark": CLAIM, **changes}
    return issuer.mint(user=user, scopes=scopes, **options)  # type: ignore[arg-type]


@dataclass
class EvilHost:
    """A listener that nobody may talk to: counts connections and bytes."""

    connections: int = 0
    received: int = 0
    _listener: socket.socket = field(default_factory=socket.socket)

    def __post_init__(self) -> None:
        self._listener.bind((LISTEN_HOST, 0))
        self._listener.listen(16)
        self.address: tuple[str, int] = self._listener.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            sock.settimeout(1.0)
            with contextlib.suppress(OSError):
                self.received += len(sock.recv(65536))
            sock.close()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
