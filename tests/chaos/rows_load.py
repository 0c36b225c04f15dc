"""FAULT-110 to FAULT-122: load, exhaustion, and everything at random."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tests.chaos import idp as kinds
from tests.chaos.idp import answering
from tests.chaos.process import limited, usage
from tests.chaos.run import Row, Run
from tests.support.gateways import wait_until

SECTION = "Load and exhaustion"

_HEAD = "GET /orders HTTP/1.1\r\nHost: gateway\r\n"


async def flood(
    address: tuple[str, int], credentials: Sequence[str], seconds: float, connections: int
) -> Counter[int]:
    """Send one request after the other on kept connections; they carry no id, so none may get through."""
    statuses: Counter[int] = Counter()
    until = time.monotonic() + seconds
    turn = iter(range(10**9))

    async def one() -> None:
        while time.monotonic() < until:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError):
                reader, writer = await asyncio.open_connection(*address)
                try:
                    while time.monotonic() < until:
                        credential = credentials[next(turn) % len(credentials)]
                        writer.write(f"{_HEAD}Authorization: Bearer {credential}\r\n\r\n".encode())
                        head = await reader.readuntil(b"\r\n\r\n")
                        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or b"0")
                        await reader.readexactly(length)
                        statuses[int(head.split(b" ", 2)[1])] += 1
                finally:
                    writer.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    return statuses


def flooded(run: Run, credentials: Sequence[str]) -> None:
    base = run.measure_base()
    host, _, port = run.gateway.url.removeprefix("http://").partition(":")
    run.traffic(30)
    before = run.go(1.0)
    seconds = run.scaled(3.0, 60.0)
    began = time.monotonic()
    calls = run.idp.count("internal", "token")
    statuses = run.client.run(flood((host, int(port)), credentials, seconds, 16), seconds + 30)
    during = run.window(began)
    good = during.of("fresh", "cached", "forward")
    share = sum(sent.status == 200 for sent in good) / max(1, len(good))
    run.require(share >= 0.999, f"{share:.2%} of the good ones succeeded")
    run.require(set(statuses) <= {401, 503}, f"the flood got {dict(statuses)}")
    ours = len(during.of("fresh"))
    run.require(run.idp.count("internal", "token") - calls <= ours + 1, "the flood reached the issuer")
    run.quiet()
    run.settle(base, len(run.requests))
    rise = [before.quantile(part, "cached") * 1000 for part in (0.5, 0.99)]
    now = [during.quantile(part, "cached") * 1000 for part in (0.5, 0.99)]
    run.note(
        f"{sum(statuses.values()) / seconds:.0f} a second ({dict(statuses)}), client and issuer on the same "
        f"processors; cached requests: median {rise[0]:.0f} to {now[0]:.0f} ms, "
        f"p99 {rise[1]:.0f} to {now[1]:.0f} ms"
    )


def garbage_flood(run: Run) -> None:
    dice = random.Random(110)
    flooded(run, [dice.randbytes(30).hex() for _ in range(5000)])


def forged_flood(run: Run) -> None:
    flooded(run, [run.wallet.forged("/orders") for _ in range(500)])


def distinct_tokens(run: Run) -> None:
    count = int(run.scaled(1520, 30_000))
    first = run.wallet.fresh("/orders")
    run.send("fresh", "/orders", first)
    base = run.measure_base()
    began = time.monotonic()
    # Fewer at once than one token endpoint is sent (`breaker.MAX_IN_FLIGHT`).
    for _ in range(count // 40):
        run.client.send_all([run.wallet.make("fresh", "/orders") for _ in range(40)])
    run.window(began).only("fresh", 200)
    calls = run.idp.count("internal", "token")
    run.send("fresh", "/orders", first)
    run.require(run.idp.count("internal", "token") == calls + 1, "the first of all is still cached: no bound")
    # The cap is 200 entries in this mode: whatever is kept beyond it would show here.
    run.settle(base, 200)
    seconds = time.monotonic() - began
    run.note(
        f"{count} tokens at {count / seconds:.0f} a second, 200 entries cached at most, {run.usage().text()}"
    )


def herd(run: Run) -> None:
    crowd = 1000
    token = run.wallet.fresh("/orders")
    run.idp.misbehave("internal", "token", kinds.after(0.3))
    run.idp.forget()
    run.traffic(10)
    fault = run.begin(503, 504, kinds=("herd", "fresh"), limit_s=15)
    run.client.send_all([run.wallet.make("herd", "/orders", token) for _ in range(crowd)])
    run.quiet()
    run.over(fault)
    statuses = Counter(sent.status for sent in run.requests if sent.kind == "herd")
    jti = next(sent.jti for sent in run.requests if sent.kind == "herd")
    calls = sum(issued.subject_jti == jti for issued in run.idp.issued.values())
    run.require(calls == 1, f"{calls} exchanges of one token, expected 1")
    run.require(statuses[200] == crowd, f"{dict(statuses)}, expected {crowd} x 200")
    slowest = max(sent.took_s for sent in run.requests if sent.kind == "herd")
    run.note(f"{calls} exchange, {dict(statuses)}, slowest {slowest:.1f} s")


def herd_failing(run: Run) -> None:
    crowd = 1000
    token = run.wallet.fresh("/orders")
    # Half the deadline: time for all of them to be there, since whoever comes after a failure may try again.
    run.idp.misbehave("internal", "token", kinds.after(1.0, answering(500, b"no")))
    run.idp.forget()
    fault = run.begin(503, kinds=("herd",), limit_s=15)
    run.client.send_all([run.wallet.make("herd", "/orders", token) for _ in range(crowd)])
    run.over(fault)
    statuses = Counter(sent.status for sent in run.requests if sent.kind == "herd")
    calls = run.idp.count("internal", "token")
    run.take()
    statuses = Counter(sent.status for sent in run.requests if sent.kind == "herd")
    run.require(set(statuses) == {503}, f"{dict(statuses)}")
    slowest = max(sent.took_s for sent in run.requests if sent.kind == "herd")
    run.require(slowest < 6 + run.slack_s, f"slowest {slowest:.1f} s")
    if calls > 1:
        run.missing("1 call", f"{calls} calls: some of them came only after the first one had failed")
    run.note(f"{calls} calls, {dict(statuses)}, slowest {slowest:.1f} s")


def descriptors_gone(run: Run) -> None:
    run.traffic(40)
    run.go(0.5)
    (pid, *_) = run.gateway.pids()
    fault = run.begin(500, 503, 504, away=True)
    held = usage([pid], run.gateway.socket_path)
    with limited(pid, resource.RLIMIT_NOFILE, held.descriptors + held.connections + 1):
        run.idp.behave()
        # Idle connections to the issuer are dropped so that each exchange wants a descriptor.
        run.idp.down()
        run.idp.up()
        run.go(run.scaled(2.0, 20.0))
    run.end(fault, 5.0)
    run.require([pid] == run.gateway.pids(), "the server ended")


def pool_exhausted(run: Run) -> None:
    base = run.measure_base()
    run.traffic(max(run.rate, 60))
    run.go(0.5)
    fault = run.begin(503, 504, kinds=("fresh", "crowd"))
    run.idp.misbehave("internal", "token", kinds.silence)
    rounds = int(run.scaled(3, 20))
    for _ in range(rounds):
        run.client.send_all(
            [run.wallet.make("crowd", "/orders", run.wallet.fresh("/orders")) for _ in range(180)],
            abort_after_s=0.7,
        )
    window = run.go(1.0)
    window.only("cached", 200).only("forward", 200)
    run.idp.behave()
    run.end(fault, 5.0)
    slowest = max((sent.took_s for sent in run.requests if sent.kind == "fresh"), default=0.0)
    run.note(f"slowest of the refused {slowest:.1f} s")
    run.quiet()
    run.settle(base, rounds * 180)


def disk_full(run: Run) -> None:
    run.gateway.change_mode(output="/dev/full")
    try:
        run.gateway.restart_server()
        run.send("fresh", "/orders")
        wait_until(lambda: run.send("fresh", "/orders").status == 200, timeout_s=10)
        # The restart took the cache with it.
        run.client.send_all(run.wallet.prime())
        run.take()
        run.requests.clear()
        run.traffic()
        run.go(run.scaled(1.5, 10)).only("fresh", 200).only("cached", 200)
        fault = run.begin(503, kinds=("fresh",))
        run.idp.down()
        run.go(0.7).only("fresh", 503)
        run.idp.up()
        run.end(fault, 5.0)
        run.quiet()
    finally:
        run.gateway.change_mode(output=None)
        run.gateway.restart_server()


def slow_clients(run: Run) -> None:
    host, _, port = run.gateway.url.removeprefix("http://").partition(":")
    run.traffic()
    hits = run.upstream.hits

    async def drip() -> str:
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            for byte in b"GET /orders HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer abc" + b"x" * 500:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.1)
                if reader.at_eof():
                    break
            else:
                return "kept"
        except OSError:
            pass
        finally:
            writer.close()
        return "closed"

    async def many() -> Counter[str]:
        tasks = [asyncio.ensure_future(drip()) for _ in range(50)]
        done, pending = await asyncio.wait(tasks, timeout=run.scaled(5.0, 30.0))
        for task in pending:
            task.cancel()
        return Counter(task.result() for task in done)

    began = time.monotonic()
    outcome = run.client.run(many(), 60)
    window = run.window(began)
    window.only("fresh", 200).only("cached", 200)
    run.require(run.upstream.hits - hits <= len(run.requests), "a dripped request got through")
    if run.gateway.worker_pids():
        run.require(outcome["closed"] == 50, f"nginx closed {outcome['closed']} of 50")
    run.note(
        f"{outcome['closed']} of 50 were closed by the gateway after its header timeout of 3 s"
        if run.gateway.worker_pids()
        else "the sandbox has no header timeout"
    )


def cpu_starved(run: Run) -> None:
    run.traffic(20)
    run.go(0.3)
    pids = run.gateway.pids()
    fault = run.begin(500, 503, 504, away=True)
    ended = threading.Event()

    def starve() -> None:
        # A tenth of one processor, by stopping it for nine tenths of the time.
        while not ended.is_set():
            for number, seconds in ((signal.SIGSTOP, 0.09), (signal.SIGCONT, 0.01)):
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                time.sleep(seconds)

    thread = threading.Thread(target=starve, daemon=True)
    thread.start()
    try:
        run.go(run.scaled(3.0, 30.0))
    finally:
        ended.set()
        thread.join(5)
        run.gateway.signal_server(signal.SIGCONT)
    run.end(fault, 2.0)


def gone(run: Run, pids: Sequence[int]) -> Callable[[], bool]:
    return lambda: not set(pids) & set(run.gateway.pids())


def rolling_update(run: Run) -> None:
    run.traffic()
    run.idp.misbehave("internal", "token", kinds.after(0.4))
    for _ in range(int(run.scaled(2, 20))):
        run.go(0.6)
        fault = run.begin(500, 503, 504, away=True)
        asked = time.monotonic()
        pids = run.gateway.signal_server(signal.SIGTERM)
        wait_until(gone(run, pids), timeout_s=20)
        drained = time.monotonic() - asked
        run.end(fault, 2.0)
        run.note(f"ended {drained:.1f} s after SIGTERM")
    run.idp.behave()


def soak(run: Run) -> None:
    base = run.measure_base()
    run.traffic()
    coin = random.Random(118)
    until = time.monotonic() + run.scaled(8.0, 180.0)
    behaviour = kinds.sometimes([kinds.behave, answering(500, b"no")], lambda: int(coin.random() < 0.05))
    fault = run.begin(503, kinds=("fresh",))
    run.idp.misbehave("internal", "token", behaviour)
    begin = run.usage()
    while time.monotonic() < until:
        time.sleep(1.0)
        run.take()
    run.idp.behave()
    run.end(fault, 1.0)
    run.quiet()
    run.settle(base, sum(sent.kind == "fresh" for sent in run.requests))
    now = run.usage()
    run.note(f"{begin.text()}, then {now.text()}; 8 hours were not run")


def at_random(run: Run) -> None:
    """A fault of any kind every few seconds; the seed is in the table."""
    seed = 120
    dice = random.Random(seed)
    until = time.monotonic() + run.scaled(20.0, 180.0)
    run.traffic()
    done: Counter[str] = Counter()
    names: list[str] = []
    while time.monotonic() < until:
        # Round by round, so that no kind is left out for long.
        names = names or dice.sample(sorted(RANDOM_FAULTS), len(RANDOM_FAULTS))
        name = names.pop()
        RANDOM_FAULTS[name](run)
        done[name] += 1
        run.go(0.3)
    run.note(f"seed {seed}: " + ", ".join(f"{name} x{count}" for name, count in sorted(done.items())))


def _killed(run: Run) -> None:
    fault = run.begin(500, 503, away=True)
    run.gateway.signal_server(signal.SIGKILL)
    run.end(fault, 2.0)
    # Its cache went with it; what the next fault may not touch must be cached again.
    run.client.send_all(run.wallet.prime())
    run.take()


def _paused(run: Run) -> None:
    fault = run.begin(500, 503, 504, away=True)
    pids = run.gateway.signal_server(signal.SIGSTOP)
    time.sleep(1.0)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    run.end(fault, 5.0)


def _misbehaving(behaviour: kinds.Behaviour, *statuses: int) -> Callable[[Run], None]:
    def make(run: Run) -> None:
        fault = run.begin(*statuses, kinds=("fresh",))
        run.idp.misbehave("internal", "token", behaviour)
        time.sleep(0.6)
        run.idp.behave()
        run.end(fault, 5.0)

    return make


def _issuer_down(run: Run) -> None:
    # A server that was killed a moment ago may have no keys yet.
    fault = run.begin(503, 504, keyless=True)
    run.idp.down()
    time.sleep(0.6)
    run.idp.up()
    run.end(fault, 31.0, paths=("/orders", "/reports", "/second"))


def _changed(run: Run) -> None:
    fault = run.begin(500, 503, away=True)
    run.gateway.apply(run.stage.config(second={"leeway": 1}))
    run.gateway.apply(run.stage.config())
    run.end(fault, 1.0)


RANDOM_FAULTS: dict[str, Callable[[Run], None]] = {
    "kill": _killed,
    "pause": _paused,
    "issuer down": _issuer_down,
    "issuer slow": _misbehaving(kinds.after(0.8), 503, 504),
    "issuer 500": _misbehaving(answering(500, b"no"), 503),
    "issuer HTML": _misbehaving(answering(200, b"<html>"), 502),
    "issuer drops": _misbehaving(kinds.cut_after(3, reset=True), 503),
    "other subject": _misbehaving(kinds.swap_subject, 502),
    "configuration": _changed,
}


def _row(number: str, fault: str, expected: str, action: Any, **options: Any) -> Row:
    options.setdefault("upstream", "exchanged tokens only")
    return Row(
        id=f"FAULT-{number}", section=SECTION, fault=fault, expected=expected, action=action, **options
    )


ROWS = (
    _row(
        "110",
        "flood of distinct garbage tokens beside good ones",
        "garbage 401; no call to the issuer; good 99.9 % 200",
        garbage_flood,
    ),
    _row("111", "flood of forged signatures with the right key id", "401; good 99.9 % 200", forged_flood),
    _row(
        "112",
        "many distinct valid tokens",
        "each 200; the cache stays at its cap",
        distinct_tokens,
        mode="smallcache",
    ),
    _row("113", "herd: 1,000 at once with one new token", "1 exchange, 1,000 x 200", herd, both=True),
    _row(
        "114",
        "herd while the issuer fails",
        "1 call, 1,000 x 503 within 6 s",
        herd_failing,
        upstream="nothing",
        both=True,
    ),
    _row("115", "no descriptor left", "500/503/504, no crash; back within 5 s", descriptors_gone, both=True),
    _row(
        "116",
        "every thread waits for a silent issuer",
        "503 at once; cached ones still served",
        pool_exhausted,
        upstream="cached and forwarded ones only",
    ),
    _row("117", "log on a full disk", "requests are not affected", disk_full),
    _row("118", "soak with 5 % faults", "memory, threads, descriptors flat", soak),
    _row(
        "119",
        "slow clients: headers byte by byte",
        "the gateway's matter; good ones 200",
        slow_clients,
        both=True,
    ),
    _row("120", "random faults (seeded)", "the invariants hold", at_random, both=True),
    _row("121", "a tenth of a processor", "200 or 500/503/504, never 200 for a bad token", cpu_starved),
    _row(
        "122", "SIGTERM under load", "requests under way answered; back within 2 s", rolling_update, both=True
    ),
)
