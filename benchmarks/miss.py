"""
What a miss costs: CPU by its parts, and the time added to the issuer's own.

    python -m benchmarks.miss [--json path] [--rounds 5] [--misses 400]

A miss is what the plugin does for a token that it has not seen: once on the event loop, where it
finds that the network is needed, and once in a thread. Clients are compared by the same request
to the same stub issuer. All figures of a table are of one run: medians of alternating rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import http.client
import json
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import requests
import urllib3

from benchmarks.machine import describe
from benchmarks.stub_issuer import KEYS_PATH, SLOW_PATH, TOKEN_PATH, StubIssuer, StubSettings, token_answer
from kong_token_exchange.config import load_config
from kong_token_exchange.flow import Flow, pipeline, verification
from kong_token_exchange.flow import result as proving
from kong_token_exchange.ports import NotInMemoryError
from kong_token_exchange.protocol.http_message import HttpRequest
from kong_token_exchange.sandbox.issuer import SigningKey, encode_jws
from kong_token_exchange.shell.exchange_client import ExchangeSender
from kong_token_exchange.shell.http_client import RequestsSender
from kong_token_exchange.wiring import Shells
from tests.chaos.certificates import Authority

PARTS = ("subject", "subject signature", "request", "client", "result", "result signature", "rest")

# What is aimed at: microseconds of CPU beside the two signature checks, and milliseconds added at the median.
TARGET_CPU_US = 250
TARGET_ADDED_MS = 1

_DELAY_S = 0.02
_ISSUER, _SUBJECT, _AUDIENCE = "https://issuer.test", "0b5c7a52-5d0f-4f6e-9d0f-1f8a6a1f7b11", "gateway"
_HOST = "localhost"


# --- clients --------------------------------------------------------------------------

Send = Callable[[], int]


@contextmanager
def _clients(url: str, ca_file: Path, body: bytes) -> Iterator[dict[str, Send]]:
    """Give what sends the same form over a kept connection and returns the length of the answer."""
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
    request = HttpRequest(method="POST", url=url, headers=headers, body=body)
    ours, documents = (kind(ca_file=str(ca_file)) for kind in (ExchangeSender, RequestsSender))

    def send(sender: ExchangeSender | RequestsSender) -> int:
        return len(sender.send(request, deadline=time.monotonic() + 10, max_body=65536).body)

    session = requests.Session()
    session.trust_env = False
    session.verify = str(ca_file)
    pool = urllib3.PoolManager(ca_certs=str(ca_file), retries=False)
    bare = _bare(url, ca_file)
    found: dict[str, Send] = {
        "ours, for exchanges": lambda: send(ours),
        "ours, for documents (requests' adapter)": lambda: send(documents),
        "requests.Session": lambda: len(session.post(url, data=body, headers=headers).content),
        "urllib3.PoolManager": lambda: len(pool.request("POST", url, body=body, headers=headers).data),
        "http.client, bare": lambda: _send_bare(bare, url, body, headers),
    }
    curl = _curl(url, ca_file, body, headers)
    if curl is not None:
        found["pycurl"] = curl
    with contextlib.closing(ours), contextlib.closing(documents), session, pool, contextlib.closing(bare):
        yield found


def _bare(url: str, ca_file: Path) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    if parts.scheme == "http":
        return http.client.HTTPConnection(parts.netloc)
    return http.client.HTTPSConnection(parts.netloc, context=ssl.create_default_context(cafile=str(ca_file)))


def _send_bare(connection: http.client.HTTPConnection, url: str, body: bytes, headers: dict[str, str]) -> int:
    connection.request("POST", urlsplit(url).path, body, headers)
    return len(connection.getresponse().read())


def _curl(url: str, ca_file: Path, body: bytes, headers: dict[str, str]) -> Send | None:
    try:
        import pycurl  # noqa: PLC0415 - compared where it is there; nothing of ours needs it
    except ImportError:
        return None
    handle = pycurl.Curl()
    handle.setopt(pycurl.URL, url)
    handle.setopt(pycurl.CAINFO, str(ca_file))
    handle.setopt(pycurl.HTTPHEADER, [f"{name}: {value}" for name, value in headers.items()] + ["Expect:"])
    handle.setopt(pycurl.POSTFIELDS, body)

    def send() -> int:
        answer: bytes = handle.perform_rb()
        return len(answer)

    return send


@dataclass
class ClientRow:
    """CPU of the calling thread and time of one call, microseconds, medians over rounds."""

    client: str
    cpu_us: float
    p50_us: float


def measure_clients(clients: dict[str, Send], *, calls: int, rounds: int) -> list[ClientRow]:
    """Call each client in turn, round by round."""
    cpu: dict[str, list[float]] = {name: [] for name in clients}
    wall: dict[str, list[float]] = {name: [] for name in clients}
    lengths = {send() for send in clients.values()}
    if len(lengths) != 1:
        raise RuntimeError("the clients did not get the same answer")
    for _ in range(rounds):
        for name, send in clients.items():
            times = []
            with _no_collector():
                began = time.thread_time()
                for _ in range(calls):
                    start = time.perf_counter()
                    send()
                    times.append(time.perf_counter() - start)
                cpu[name].append((time.thread_time() - began) / calls)
            wall[name].append(statistics.median(times))
    return [
        ClientRow(name, statistics.median(cpu[name]) * 1e6, statistics.median(wall[name]) * 1e6)
        for name in clients
    ]


# --- a miss by its parts --------------------------------------------------------------


class Stopwatch:
    """CPU of this thread by part; a part within a part is taken out of the outer one."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inner = [0.0]

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return *function*, timed as *part*."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.thread_time() - began
                self.seconds[part] += taken - self._inner.pop()
                self._inner[-1] += taken

        return timed


@contextmanager
def _timed(flow: Flow, watch: Stopwatch) -> Iterator[None]:
    """Time the parts of *flow*."""
    verifier, proof, sender = flow._verifier, flow._proof, flow._sender
    authentication = pipeline._client_authentication

    def authenticated(*args: Any) -> Callable[..., Any]:
        return watch.wrap("request", watch.wrap("request", authentication)(*args))

    with ExitStack() as stack:

        def put(target: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, value))

        put(verifier, "subject", watch.wrap("subject", verifier.subject))
        put(verification, "verify_signature", watch.wrap("subject signature", verification.verify_signature))
        put(pipeline, "build_exchange_request", watch.wrap("request", pipeline.build_exchange_request))
        put(pipeline, "_client_authentication", authenticated)
        put(flow, "_sender", _TimedSender(watch.wrap("client", sender.send)))
        put(proof, "prove", watch.wrap("result", proof.prove))
        put(proving, "verify_signature", watch.wrap("result signature", proving.verify_signature))
        yield


@dataclass
class _TimedSender:
    send: Callable[..., Any]


def miss(flow: Flow, token: str) -> None:
    """Take a token through the flow as the plugin does: from memory, then with the network."""
    try:
        flow.run(token, deadline=None)
    except NotInMemoryError:
        if flow.run(token, deadline=time.monotonic() + 10).cache == "miss":
            return
    raise RuntimeError("that was no miss")


def measure_parts(flow: Flow, tokens: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return microseconds of CPU a miss by part, medians over rounds."""
    rounds: dict[str, list[float]] = {part: [] for part in PARTS}
    for batch in tokens:
        watch = Stopwatch()
        with _timed(flow, watch), _no_collector():
            began = time.thread_time()
            for token in batch:
                miss(flow, token)
            whole = time.thread_time() - began
        watch.seconds["rest"] = whole - sum(watch.seconds.values())
        for part, seconds in watch.seconds.items():
            rounds[part].append(seconds / len(batch) * 1e6)
    return {part: statistics.median(values) for part, values in rounds.items()}


def measure_added(flow: Flow, tokens: Sequence[str], stub: StubIssuer) -> tuple[float, float]:
    """Return the median of a miss and that of the issuer's own time, seconds."""
    stub.own_times()
    times = []
    for token in tokens:
        began = time.perf_counter()
        miss(flow, token)
        times.append(time.perf_counter() - began)
    return statistics.median(times), statistics.median(stub.own_times())


@contextmanager
def _no_collector() -> Iterator[None]:
    """Keep the collector away: what it takes belongs to no part."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# --- the stage ------------------------------------------------------------------------


class Stage:
    """A key, tokens made with it, and configurations that lead to the stub."""

    def __init__(self, folder: Path) -> None:
        self.shells = Shells()
        self._key = SigningKey.generate()
        self._made = 0
        authority = Authority.make("benchmark")
        self.ca_file = authority.write(folder / "ca.pem")
        authority.server_context(folder, "stub", _HOST)
        self._certificate = folder / "stub.pem"
        self.result = self._mint(aud="upstream")

    def settings(self) -> StubSettings:
        """Return what the stub is to answer."""
        return StubSettings(
            token_answer=token_answer(self.result, expires_in=3600),
            keys=json.dumps({"keys": [self._key.jwk()]}).encode(),
            certificate=self._certificate,
            delay_s=_DELAY_S,
        )

    def tokens(self, count: int) -> list[str]:
        """Mint tokens that nobody has seen."""
        return [self._mint(aud=_AUDIENCE) for _ in range(count)]

    def flow(self, base_url: str, path: str) -> Flow:
        """Return the flow of a configuration whose every limit is set."""
        config = load_config(
            {
                "issuer": _ISSUER,
                "token_endpoint": base_url + path,
                "jwks_endpoint": base_url + KEYS_PATH,
                "client_id": ["gateway"],
                "client_secret": ["s3cret-of-the-benchmark"],
                "audience": ["upstream"],
                "scopes": ["orders"],
                "ca_file": str(self.ca_file),
                "audience_required": ["upstream"],
                "auth_methods": ["bearer"],
                "token_exchange": {
                    "subject_token_issuers": [
                        {"issuer": _ISSUER, "conditions": {"has_audience": [_AUDIENCE]}}
                    ],
                    "result": {
                        "narrowing": "enforce",
                        "allowed_audience": ["upstream"],
                        "allowed_scopes": ["orders"],
                    },
                },
            }
        )
        return self.shells.make_flow(config)

    def _mint(self, *, aud: str) -> str:
        self._made += 1
        now = int(time.time())
        claims = {
            "iss": _ISSUER,
            "sub": _SUBJECT,
            "aud": aud,
            "azp": "client-1",
            "scope": "orders",
            "iat": now,
            "exp": now + 3600,
            "jti": f"{self._made:032d}",
            "preferred_username": "somebody@example.test",
            "realm_access": {"roles": ["offline_access", "default-roles", "uma_authorization"]},
        }
        header = {"alg": "RS256", "typ": "JWT", "kid": self._key.kid}
        return encode_jws(header, claims, self._key.sign)


@dataclass
class Findings:
    """All of one run."""

    clients: dict[str, list[ClientRow]]
    parts_us: dict[str, float]
    added_ms: float
    machine: dict[str, str]

    @property
    def beside_signatures_us(self) -> float:
        """CPU of a miss without its two signature checks, microseconds."""
        return sum(self.parts_us.values()) - sum(
            value for part, value in self.parts_us.items() if part.endswith("signature")
        )

    def as_json(self) -> dict[str, Any]:
        """Return one object."""
        return {
            "clients": {
                transport: {row.client: {"cpu_us": row.cpu_us, "p50_us": row.p50_us} for row in rows}
                for transport, rows in self.clients.items()
            },
            "miss_cpu_us": self.parts_us,
            "miss_cpu_us_beside_signatures": self.beside_signatures_us,
            "added_p50_ms": self.added_ms,
            "machine": self.machine,
        }

    def as_markdown(self) -> str:
        """Return the tables."""
        lines = ["| client | plain: CPU us | p50 us | TLS: CPU us | p50 us |", "|---|---:|---:|---:|---:|"]
        for plain, tls in zip(self.clients["plain"], self.clients["tls"], strict=True):
            lines.append(
                f"| {plain.client} | {plain.cpu_us:.0f} | {plain.p50_us:.0f} "
                f"| {tls.cpu_us:.0f} | {tls.p50_us:.0f} |"
            )
        lines += ["", "| part of a miss, over TLS | CPU us |", "|---|---:|"]
        lines += [f"| {part} | {value:.0f} |" for part, value in self.parts_us.items()]
        lines += [f"| **all** | **{sum(self.parts_us.values()):.0f}** |", ""]
        aims = [
            ("CPU of a miss beside signature checks, us", f"{self.beside_signatures_us:.0f}", TARGET_CPU_US),
            ("added to the issuer's own time at the median, ms", f"{self.added_ms:.2f}", TARGET_ADDED_MS),
        ]
        lines += ["| | measured | wanted | |", "|---|---:|---|---|"]
        for what, measured, wanted in aims:
            verdict = "met" if float(measured) <= wanted else "**missed**"
            lines.append(f"| {what} | {measured} | at most {wanted} | {verdict} |")
        return "\n".join(lines)


def run(*, misses: int, rounds: int) -> Findings:
    """Measure everything once."""
    with tempfile.TemporaryDirectory() as name:
        stage = Stage(Path(name))
        body = b"subject_token=" + stage.result.encode() + b"&audience=upstream"
        with StubIssuer(stage.settings()) as stub, contextlib.closing(stage.shells):
            plain, tls = f"http://{_HOST}:{stub.plain_port}", f"https://{_HOST}:{stub.tls_port}"
            clients = {}
            for transport, url in (("plain", plain), ("tls", tls)):
                with _clients(url + TOKEN_PATH, stage.ca_file, body) as senders:
                    clients[transport] = measure_clients(senders, calls=misses, rounds=rounds)
            flow = stage.flow(tls, TOKEN_PATH)
            miss(flow, stage.tokens(1)[0])
            parts = measure_parts(flow, [stage.tokens(misses) for _ in range(rounds)])
            slow = stage.flow(tls, SLOW_PATH)
            miss(slow, stage.tokens(1)[0])
            whole, own = measure_added(slow, stage.tokens(misses // 2), stub)
    return Findings(clients, parts, (whole - own) * 1000, describe())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the tables, and write the record if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--misses", type=int, default=400, help="misses, or calls, a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    found = run(misses=options.misses, rounds=options.rounds)
    print(found.as_markdown())
    if options.json:
        options.json.write_text(json.dumps(found.as_json(), indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
