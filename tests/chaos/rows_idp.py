"""FAULT-01 to FAULT-23: the token endpoint."""

from __future__ import annotations

import dataclasses
import gzip
import random
import ssl
import time
import warnings
from typing import Any, Self

from tests.chaos import idp as kinds
from tests.chaos.idp import EvilHost, answering
from tests.chaos.process import peak_bytes, reset_peak
from tests.chaos.rows_server import set_secret
from tests.chaos.run import Row, Run, Window
from tests.chaos.stage import BREAKER_OPEN_MS

SECTION = "Token endpoint"
# The breaker's probe comes this long after its opening, and a moment later all is well.
RECOVERY_S = BREAKER_OPEN_MS / 1000 + 1.0
HTML = b"<html><body>It works, somewhere else</body></html>"
_HTML_HEADERS = {"Content-Type": "text/html"}


def retry_afters(window: Window, kind: str = "fresh") -> set[str | None]:
    return {sent.retry_after for sent in window.of(kind) if sent.status == 503}


def check_retry_after(run: Run, window: Window) -> None:
    found = retry_afters(window)
    good = all(value is not None and value.isdigit() and 1 <= int(value) <= 30 for value in found)
    run.require(good, f"Retry-After of the 503: {sorted(map(str, found))}")


def calls_per_request(run: Run, window: Window) -> float:
    """Return how often the issuer was called for each request that needed it, inside the window."""
    began = min((sent.sent_at for sent in window.requests), default=0.0)
    ended = max((sent.ended_at for sent in window.requests), default=0.0)
    calls = sum(began <= at <= ended for at, *what in list(run.idp.asks) if what == ["internal", "token"])
    return calls / max(1, len(window.of("fresh")))


def endpoint_fault(
    run: Run, behaviour: kinds.Behaviour, *statuses: int, bound_s: float = RECOVERY_S, cached: bool = True
) -> Window:
    """Let the token endpoint misbehave for a while, and judge what good requests got."""
    run.traffic()
    run.go(0.3)
    fault = run.begin(*statuses, kinds=("fresh",))
    run.idp.misbehave("internal", "token", behaviour)
    time.sleep(0.1)
    window = run.go(run.scaled(1.2, 10.0))
    window.only("fresh", *statuses).only("forward", 200)
    if cached:
        window.only("cached", 200)
    run.idp.behave()
    run.end(fault, bound_s)
    return window


def down_uncached(run: Run) -> None:
    run.traffic()
    run.go(0.3)
    fault = run.begin(503, kinds=("fresh",))
    run.idp.down()
    window = run.go(run.scaled(2.0, 20.0))
    window.only("fresh", 503).only("cached", 200).only("forward", 200)
    check_retry_after(run, window)
    run.require(window.quantile(0.99, "fresh") < 1.2 + run.slack_s, "p99 of the refused above 1.2 s")
    run.idp.up()
    run.end(fault, RECOVERY_S)
    run.note(f"p99 of the 503: {window.quantile(0.99, 'fresh') * 1000:.0f} ms")
    expect_breaker(run)


def expect_breaker(run: Run) -> None:
    told = run.log()
    if "breaker_open" not in told:
        run.missing("a breaker that opens after 5 faults", "each request tries")


def down_cached(run: Run) -> None:
    """Exchanged tokens of 9 s, handed out for 4 s of them; then the outage shows."""
    issuer = run.idp.issuers["internal"]
    before = issuer.realm
    clients = dict(before.clients)
    clients["client-2"] = dataclasses.replace(clients["client-2"], token_life_s=9)
    issuer.realm = dataclasses.replace(before, clients=clients)
    tokens = [run.wallet.fresh("/orders") for _ in range(5)]
    for token in tokens:
        run.send("short", "/orders", token)
    filled = time.monotonic()
    run.traffic(30, (("forward", "/orders"), ("other", "/second"), ("opaque", "/orders")))
    fault = run.begin(503, kinds=("short", "other", "fresh"))
    run.idp.down()
    statuses = []
    while time.monotonic() < filled + 7:
        statuses += [
            (time.monotonic() - filled, run.send("short", "/orders", token).status) for token in tokens
        ]
        time.sleep(0.15)
    run.require(all(status == 200 for at, status in statuses if at < 2.5), "not served from the cache")
    run.require(all(status == 503 for at, status in statuses if at > 4.5), "served beyond its end")
    issuer.realm = before
    run.idp.up()
    run.end(fault, RECOVERY_S)
    last = max((at for at, status in statuses if status == 200), default=0.0)
    run.note(f"a token of 9 s was last handed out {last:.1f} s after its exchange (margin 5 s)")


def black_hole(run: Run) -> None:
    run.traffic()
    run.go(0.3)
    fault = run.begin(503, kinds=("fresh",))
    run.idp.black_hole()
    time.sleep(0.1)
    window = run.go(run.scaled(2.5, 20.0))
    window.only("fresh", 503).only("cached", 200)
    run.require(window.slowest("fresh") < 1.5 + run.slack_s, "later than the connect timeout of 1 s")
    run.idp.up()
    run.end(fault, RECOVERY_S)
    run.note(f"median of the 503: {window.quantile(0.5, 'fresh') * 1000:.0f} ms")
    expect_breaker(run)


def slow_inside(run: Run) -> None:
    run.traffic()
    before = run.go(run.scaled(1.5, 10))
    run.idp.misbehave("internal", "token", kinds.after(run.scaled(1.0, 0.75 * run.deadline_s)))
    during = run.go(run.scaled(3.0, 30))
    during.only("fresh", 200).only("cached", 200)
    rise = [
        (during.quantile(part, "cached") - before.quantile(part, "cached")) * 1000 for part in (0.5, 0.99)
    ]
    run.require(rise[0] < 10, f"median of cached requests rose by {rise[0]:.0f} ms")
    run.note(f"cached requests: median {rise[0]:+.1f} ms, p99 {rise[1]:+.1f} ms against before")


def too_slow(run: Run) -> None:
    base = run.measure_base()
    window = endpoint_fault(run, kinds.after(30.0), 503, 504)
    check_deadline(run, window)
    run.quiet()
    run.settle(base, len(window.requests))


def check_deadline(run: Run, window: Window) -> None:
    late = [sent.took_s for sent in window.of("fresh") if sent.status == 504]
    run.require(bool(late), "nobody was answered 504")
    limit = run.deadline_s + 1 + run.slack_s
    run.require(
        all(run.deadline_s - 0.1 < took < limit for took in late), f"504 after {max(late, default=0):.1f} s"
    )


def drip(run: Run) -> None:
    check_deadline(run, endpoint_fault(run, kinds.dripping(run.scaled(0.2, 1.0)), 503, 504))


def limited_with_hint(run: Run) -> None:
    rest_s = int(run.scaled(3, 7))
    window = endpoint_fault(
        run, answering(429, b"{}", {"Retry-After": str(rest_s)}), 503, bound_s=rest_s + 1.0
    )
    check_retry_after(run, window)
    values = {value for value in retry_afters(window) if value}
    if not all(1 <= int(value) <= rest_s for value in values) or max(map(int, values)) < rest_s - 1:
        run.missing(f"Retry-After from the issuer, at most {rest_s}", f"Retry-After {sorted(values)}")
    if calls_per_request(run, window) > 0.1:
        run.missing(f"no call for {rest_s} s", f"{calls_per_request(run, window):.1f} calls a request")


def limited_without_hint(run: Run) -> None:
    answers = [
        answering(429, b"slow down", {"Retry-After": value} if value else {})
        for value in ("", "soon", "-5", "999999999999")
    ]
    turn = iter(range(10**9))
    window = endpoint_fault(
        run, kinds.sometimes(answers, lambda: next(turn) % len(answers)), 503, bound_s=31.0
    )
    check_retry_after(run, window)
    if calls_per_request(run, window) > 0.3:
        run.missing(
            "back-off from 1 s, doubling, with jitter",
            f"{calls_per_request(run, window):.1f} calls a request",
        )


def server_errors(run: Run) -> None:
    answers = [answering(status, HTML, _HTML_HEADERS) for status in (500, 502, 503, 504)]
    turn = iter(range(10**9))
    window = endpoint_fault(run, kinds.sometimes(answers, lambda: next(turn) % len(answers)), 503)
    check_retry_after(run, window)
    run.require(
        calls_per_request(run, window) <= 1.2, f"{calls_per_request(run, window):.2f} calls a request"
    )


def flapping(run: Run) -> None:
    coin = random.Random(10)
    behaviour = kinds.sometimes(
        [kinds.behave, answering(500, HTML, _HTML_HEADERS)], lambda: coin.randrange(2)
    )
    run.traffic()
    run.go(0.3)
    fault = run.begin(503, kinds=("fresh",))
    run.idp.misbehave("internal", "token", behaviour)
    time.sleep(0.1)
    window = run.go(run.scaled(2.0, 20.0))
    window.only("fresh", 200, 503).only("cached", 200)
    run.require(0.0 < window.share("fresh", 200) < 1.0, f"{window.share('fresh', 200):.0%} succeeded")
    run.require(
        calls_per_request(run, window) <= 1.2, f"{calls_per_request(run, window):.2f} calls a request"
    )
    run.idp.behave()
    run.end(fault, RECOVERY_S)


# --- TLS ------------------------------------------------------------------------------

SECURE_MIX = (("fresh", "/secure"), ("warm", "/orders"), ("opaque", "/secure"), ("fresh", "/secure"))


def tls_fault(run: Run, context: ssl.SSLContext | None, label: str) -> str:
    """Serve with another TLS context for a moment; return what was logged meanwhile."""
    fault = run.begin(503, kinds=("fresh",))
    run.stage.secure_idp.set_tls(context)
    time.sleep(0.05)
    window = run.go(run.scaled(0.6, 3.0))
    secure = [sent for sent in window.of("fresh") if sent.path == "/secure"]
    wrong = sorted({sent.status for sent in secure} - {503})
    run.require(bool(secure) and not wrong, f"{label}: {wrong or 'no requests'}")
    run.stage.secure_idp.set_tls(run.stage.good_tls)
    run.end(fault, RECOVERY_S, paths=("/secure",))
    return run.log()


def tls_certificates(run: Run) -> None:
    stage = run.stage
    old = stage.tls("old")
    with warnings.catch_warnings():
        # What Python warns of is what the client must refuse.
        warnings.simplefilter("ignore", DeprecationWarning)
        old.minimum_version = ssl.TLSVersion.TLSv1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    contexts = {
        "expired": stage.tls("expired", expired=True),
        "wrong host": stage.tls("host", host="other.chaos.test"),
        "unknown authority": stage.tls("stranger", authority=stage.stranger),
        "TLS 1.1": old,
    }
    run.traffic(30, SECURE_MIX)
    run.go(0.3)
    told = ""
    for label, context in contexts.items():
        told += tls_fault(run, context, label)
    run.require("tls_refused" in told, "the log does not say tls_refused")


def tls_broken(run: Run) -> None:
    run.traffic(30, SECURE_MIX)
    run.go(0.3)
    tls_fault(run, None, "plain HTTP on the port")
    fault = run.begin(503, kinds=("fresh",))
    run.stage.secure_idp.down()
    with ResettingListener(run.stage.secure_idp.address):
        window = run.go(run.scaled(0.8, 3.0))
    run.stage.secure_idp.up()
    secure = {sent.status for sent in window.of("fresh") if sent.path == "/secure"}
    run.require(secure == {503}, f"handshake reset: {sorted(secure)}")
    run.end(fault, RECOVERY_S, paths=("/secure",))


class ResettingListener:
    """Accepts, takes the first bytes of a handshake, and resets."""

    def __init__(self, address: tuple[str, int]) -> None:
        import socket
        import threading

        self._listener = socket.create_server(address)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        import socket

        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    def _accept(self) -> None:
        import socket

        while True:
            try:
                sock, _ = self._listener.accept()
                sock.settimeout(1)
                sock.recv(16)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                sock.close()
            except TimeoutError:
                continue
            except OSError:
                return


# --- names ----------------------------------------------------------------------------


def no_such_name(run: Run) -> None:
    run.traffic(30, (("warm", "/orders"), ("opaque", "/nodns"), ("nodns", "/nodns"), ("fresh", "/reports")))
    fault = run.begin(503, 504, kinds=("nodns",), keyless=True)
    window = run.go(run.scaled(2.5, 10))
    window.only("nodns", 503, 504).only("cached", 200).only("fresh", 200)
    run.over(fault)
    run.note("SERVFAIL, a silent name server and the recovery need a resolver of the test's own: not run")


# --- answers --------------------------------------------------------------------------


def cut_body(run: Run) -> None:
    answers = [kinds.cut_after(10, reset=True), kinds.cut_after(10, reset=False)]
    turn = iter(range(10**9))
    endpoint_fault(run, kinds.sometimes(answers, lambda: next(turn) % 2), 503)


def nonsense(run: Run) -> None:
    answers = [
        answering(200, HTML, _HTML_HEADERS),
        answering(200, HTML),
        answering(200, b'{"access_token":'),
        answering(200, b"[1,2,3]"),
        answering(200, b'{"access_token": {"a": 1}, "token_type": "Bearer"}'),
        answering(200, b'{"access_token": "no-jwt", "token_type": "Bearer", "expires_in": 60}'),
    ]
    turn = iter(range(10**9))
    window = endpoint_fault(
        run, kinds.sometimes(answers, lambda: next(turn) % len(answers)), 502, bound_s=1.0
    )
    run.require(
        calls_per_request(run, window) <= 1.05, f"{calls_per_request(run, window):.2f} calls a request"
    )


def redirects(run: Run) -> None:
    evil = EvilHost()
    try:
        location = {"Location": "http://{}:{}/token".format(*evil.address)}
        answers = [answering(status, b"", location) for status in (301, 302, 303, 307, 308)]
        turn = iter(range(10**9))
        endpoint_fault(run, kinds.sometimes(answers, lambda: next(turn) % len(answers)), 502, bound_s=1.0)
        run.require(
            evil.connections == 0, f"the evil host got {evil.connections} connections, {evil.received} bytes"
        )
    finally:
        evil.stop()


def bombs(run: Run) -> None:
    base = run.measure_base()
    (pid, *_) = run.gateway.pids()
    bomb = gzip.compress(b"\0" * 100 * 2**20, 9)
    chunked = b"HTTP/1.1 200 X\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def endless(turn: kinds.Turn) -> bool:
        await turn.send(chunked)
        for _ in range(32):
            await turn.send(b"10000\r\n" + b" " * 65536 + b"\r\n")
        return False

    answers = [
        answering(200, b" " * 2 * 2**20),
        answering(200, bomb, {"Content-Type": "application/json", "Content-Encoding": "gzip"}),
        endless,
    ]
    turn = iter(range(10**9))
    reset_peak(pid)
    before = peak_bytes(pid)
    window = endpoint_fault(
        run, kinds.sometimes(answers, lambda: next(turn) % len(answers)), 502, bound_s=1.0
    )
    growth = (peak_bytes(pid) - before) / 2**20
    run.require(growth < 16, f"resident memory grew by {growth:.0f} MB")
    run.note(f"peak of resident memory {growth:+.1f} MB")
    run.quiet()
    run.settle(base, len(window.requests))


def secret_refused(run: Run) -> None:
    run.traffic()
    run.go(0.3)
    fault = run.begin(500, kinds=("fresh",))
    set_secret(run.idp, "another-secret")
    window = run.go(run.scaled(1.0, 5))
    window.only("fresh", 500).only("cached", 200)
    set_secret(run.idp, None)
    run.end(fault, 1.0)
    told = run.log()
    run.require("client_refused" in told, "the log does not say client_refused")


def other_subject(run: Run) -> None:
    endpoint_fault(run, kinds.swap_subject, 502, bound_s=1.0)
    told = run.log()
    run.require("subject_differs" in told, "the log does not say subject_differs")


def idle_closed(run: Run) -> None:
    run.idp.misbehave("internal", "token", kinds.closing_when_idle(0.03))
    run.traffic(20)
    # One after the other, each longer after the last than the issuer keeps a connection.
    fault = run.begin(503, kinds=("fresh",))
    window = run.go(run.scaled(2.5, 20))
    run.over(fault)
    spaced = []
    run.quiet()
    for _ in range(10):
        spaced.append(run.send("fresh", "/orders").status)
        time.sleep(0.1)
    run.require(set(spaced) == {200}, f"after an idle close: {sorted(set(spaced))}")
    raced = sum(sent.status != 200 for sent in window.of("fresh"))
    run.require(raced <= 0.05 * len(window.of("fresh")) + 1, f"{raced} lost the race with the close")
    run.note(
        f"{raced} of {len(window.of('fresh'))} met the close in mid-flight, where a POST may not be repeated"
    )


def clients_leave(run: Run) -> None:
    base = run.measure_base()
    run.idp.misbehave("internal", "token", kinds.after(1.0))
    run.traffic(20, (("warm", "/orders"), ("opaque", "/orders"), ("forward", "/orders")))
    rounds = int(run.scaled(3, 50))
    for _ in range(rounds):
        batch = [run.wallet.make("left", "/orders", run.wallet.fresh("/orders")) for _ in range(100)]
        run.client.send_all(batch, abort_after_s=0.4)
        time.sleep(0.7)
    run.idp.behave()
    run.quiet()
    run.settle(base, rounds * 100)


def back_after_outage(run: Run) -> None:
    run.traffic(20)
    run.idp.down()
    fault = run.begin(503, kinds=("fresh", "herd"))
    run.go(run.scaled(2.0, 60))
    crowd = int(run.scaled(200, 1000))
    tokens = [run.wallet.fresh("/orders") for _ in range(crowd)]
    run.idp.up()
    run.idp.forget()
    back = time.monotonic()
    run.client.send_all([run.wallet.make("herd", "/orders", token) for token in tokens])
    run.end(fault, 5.0)
    calls = run.idp.count("internal", "token", back)
    first = [sent.status for sent in run.requests if sent.kind == "herd"]
    run.require(set(first) <= {200, 503}, f"{sorted(set(first))}")
    run.note(f"{first.count(200)} of {crowd} at once succeeded, {calls} calls until all was well")
    if calls >= crowd:
        run.missing("a single probe, then a ramp", f"{calls} calls at once")


def _row(number: str, fault: str, expected: str, action: Any, **options: Any) -> Row:
    return Row(
        id=f"FAULT-{number}", section=SECTION, fault=fault, expected=expected, action=action, **options
    )


_CACHED = "cached and forwarded ones only"

ROWS = (
    _row(
        "01",
        "issuer down (port closed), token not cached",
        "503 with Retry-After, p99 below 1.2 s; back within 5 s",
        down_uncached,
        upstream=_CACHED,
        ci=True,
    ),
    _row(
        "02",
        "issuer down, exchanged token cached",
        "200 until its end less the margin, then 503",
        down_cached,
        upstream="exchanged tokens only",
    ),
    _row(
        "03",
        "black hole: connections are never accepted",
        "503 at the connect timeout of 1 s",
        black_hole,
        upstream=_CACHED,
    ),
    _row(
        "04",
        "slow but inside the limits",
        "200; cached requests are not slower",
        slow_inside,
        upstream="exchanged tokens only",
    ),
    _row("05", "too slow (30 s)", "504 at the deadline; no thread left behind", too_slow, upstream=_CACHED),
    _row("06", "drip: one byte at a time", "504 at the deadline", drip, upstream=_CACHED),
    _row(
        "07",
        "429 with Retry-After: 7",
        "503 with Retry-After at most 7; no call for 7 s",
        limited_with_hint,
        upstream=_CACHED,
    ),
    _row(
        "08",
        "429 without Retry-After, or with a bad one",
        "503 with Retry-After; back-off",
        limited_without_hint,
        upstream=_CACHED,
    ),
    _row(
        "09",
        "500, 502, 503, 504 with HTML",
        "503; at most 1.2 calls a request",
        server_errors,
        upstream=_CACHED,
    ),
    _row(
        "10",
        "half of the calls 500 (seeded)",
        "200 or 503, never 401; at most 1.2 calls a request",
        flapping,
        upstream="exchanged tokens only",
    ),
    _row(
        "11",
        "TLS: expired, wrong host, unknown authority, TLS 1.1",
        "503, the log says why; back within 5 s",
        tls_certificates,
        upstream="nothing on that route",
        ci=True,
    ),
    _row(
        "12",
        "TLS: handshake reset; plain HTTP on the port",
        "503; back within 5 s",
        tls_broken,
        upstream="nothing on that route",
    ),
    _row(
        "13", "DNS: no such name", "503; within the deadline", no_such_name, upstream="nothing on that route"
    ),
    _row(
        "14",
        "DNS answer changes",
        "200 from the new address",
        None,
        reason="needs a resolver of the test's own; `--resolve` is fixed for the life of the server",
    ),
    _row(
        "15",
        "body cut off: RST after 10 bytes, or end of file",
        "503; partial JSON is never used",
        cut_body,
        upstream=_CACHED,
    ),
    _row(
        "16",
        "200 with HTML, or with wrong JSON",
        "502; not cached, not retried",
        nonsense,
        upstream=_CACHED,
        ci=True,
    ),
    _row("17", "redirects, 301 to 308", "502; the other host gets no byte", redirects, upstream=_CACHED),
    _row(
        "18",
        "2 MB, endless chunks, 100 MB as gzip",
        "502; memory grows by less than 16 MB",
        bombs,
        upstream=_CACHED,
    ),
    _row(
        "19",
        "client secret refused",
        "500 and an alarm in the log, never 401",
        secret_refused,
        upstream=_CACHED,
    ),
    _row(
        "20",
        "a good token of another subject",
        "502 and a security event",
        other_subject,
        upstream=_CACHED,
        ci=True,
    ),
    _row(
        "21",
        "idle connection closed by the issuer",
        "200, one silent reconnect",
        idle_closed,
        upstream="exchanged tokens only",
    ),
    _row(
        "22",
        "clients leave while the exchange runs",
        "threads and sockets back",
        clients_leave,
        upstream="what was asked for",
    ),
    _row(
        "23",
        "issuer back after an outage, a crowd waiting",
        "200 or 503; single probe, then a ramp",
        back_after_outage,
        upstream="exchanged tokens only",
    ),
)
