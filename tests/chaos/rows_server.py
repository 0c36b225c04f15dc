"""FAULT-80 to FAULT-98: the plugin server, its socket, and the gateway."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.chaos.gateways import READ_TIMEOUT_S, RefusedConfigurationError, serve_has
from tests.chaos.hooked_server import STEPS
from tests.chaos.idp import ChaosIdp, after
from tests.chaos.process import limited, status
from tests.chaos.run import Row, Run
from tests.chaos.traffic import Sent
from tests.support.gateways import wait_until

SECTION = "Plugin server and Kong"

# What Kong 3.9 says after it has waited 10 s for a start of its own that had failed (plugin.lua).
LOST_CLAIM = "Could not claim instance_id"

# Two routes with one token each way, and nothing else: any mix-up of configurations shows at once.
TWO_ROUTES = (("warm", "/orders"), ("warm", "/reports"), ("fresh", "/orders"), ("fresh", "/reports"))


def kill_idle(run: Run) -> None:
    run.traffic()
    for _ in range(int(run.scaled(3, 60))):
        run.go(0.4)
        fault = run.begin(500, 503, away=True)
        run.gateway.signal_server(signal.SIGKILL)
        run.end(fault, 2.0)


def called(run: Run, count: int) -> Callable[[], bool]:
    return lambda: run.idp.count("internal", "token") >= count


def kill_in_flight(run: Run) -> None:
    run.idp.misbehave("internal", "token", after(0.8))
    run.traffic()
    for _ in range(int(run.scaled(2, 20))):
        before = run.idp.count("internal", "token")
        wait_until(called(run, before + 4), timeout_s=10)
        fault = run.begin(500, 503, away=True)
        run.gateway.signal_server(signal.SIGKILL)
        run.end(fault, 2.0 + 0.8)


def kill_in_dense_traffic(run: Run) -> None:
    """
    Kill where requests are met at every step, and a start that Kong loses would show.

    A Kong that starts an instance over a pooled connection which has died just then keeps its claim
    on it for 10 s: with an end of file in mid-event that was one kill in four at this rate.
    """
    run.idp.misbehave("internal", "token", after(0.005))
    run.traffic(2 * run.rate, TWO_ROUTES)
    for _ in range(int(run.scaled(10, 100))):
        run.go(0.3)
        fault = run.begin(500, 503, away=True)
        run.gateway.signal_server(signal.SIGKILL)
        run.end(fault, 2.0)
    run.require(LOST_CLAIM not in run.log(), "Kong lost its claim on an instance")


def never_the_other_route(run: Run) -> None:
    run.traffic(run.rate, TWO_ROUTES)
    for _ in range(int(run.scaled(5, 50))):
        run.go(0.3)
        fault = run.begin(500, 503, away=True)
        run.gateway.signal_server(signal.SIGKILL)
        run.end(fault, 2.0)


def stop_and_continue(run: Run) -> None:
    run.traffic(20)
    run.go(0.5)
    fault = run.begin(500, 503, away=True)
    stopped = run.gateway.signal_server(signal.SIGSTOP)
    window = run.go(run.scaled(READ_TIMEOUT_S + 2, 60))
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    run.end(fault, 10.0)
    early = [sent for sent in window.requests if sent.status == 500 and sent.sent_at < fault.began + 1]
    run.require(bool(early), "no 500 at the gateway's read timeout")
    run.require(set(stopped) == set(run.gateway.pids()), "the plugin server was restarted")


def out_of_memory(run: Run) -> None:
    run.traffic()
    run.go(0.3)
    (pid, *_) = run.gateway.pids()
    fault = run.begin(500, 503, 504, away=True)
    with limited(pid, resource.RLIMIT_AS, status(pid)["VmSize"] * 1024 + 2**20):
        run.go(run.scaled(2.0, 10.0))
    run.end(fault, 2.0)
    # What the kernel does in the end.
    fault = run.begin(500, 503, away=True)
    run.gateway.signal_server(signal.SIGKILL)
    run.end(fault, 2.0)


# Exceptions that each step raises in turn; in the long form every step raises them all.
EXCEPTIONS = (
    "RuntimeError",
    "KeyError",
    "UnicodeDecodeError",
    "SystemExit",
    "RecursionError",
    "MemoryError",
    "KeyboardInterrupt",
    "OSError",
    "TypeError",
    "GeneratorExit",
)


def exception_at_every_step(run: Run) -> None:
    run.traffic()
    for number, step in enumerate(STEPS):
        chosen = EXCEPTIONS if run.long else (EXCEPTIONS[number % len(EXCEPTIONS)],)
        for name in chosen:
            spring(run, step, f"raise:{name}")


def spring(run: Run, step: str, do: str, *, bound_s: float = 1.0) -> None:
    """Set a trap for a moment while requests flow, and see everything well again after it."""
    fault = run.begin(500, 503, away=True)
    run.gateway.write_hooks(trap={"step": step, "do": do})
    run.gateway.made[_TRAPS[do.partition(":")[0]]] += 1
    if step == "plugin.start":
        # An instance starts when there is a configuration that no other has.
        run.gateway.apply(run.stage.config(orders={"leeway": 1}, reports={"leeway": 1}))
    window = run.go(0.3)
    run.gateway.write_hooks()
    if step == "plugin.start":
        run.gateway.apply(run.stage.config())
    run.end(fault, bound_s, streak=1)
    if all(sent.status < 500 for sent in window.requests) and step not in QUIET_STEPS:
        run.note(f"{step} {do}: nobody was answered 5xx")


# What a trap is called where faults are counted.
_TRAPS = {"raise": "exceptions", "recurse": "exceptions", "exit": "exits"}

# Steps that the requests of the stream do not take.
QUIET_STEPS = ("keys.newer_keys",)


def ends_of_the_process(run: Run) -> None:
    run.traffic()
    for step in ("cache.verified", "sender.send", "clock.now"):
        for do in ("raise:SystemExit", "exit:3", "recurse:", "raise:MemoryError"):
            spring(run, step, do, bound_s=2.0)


def handler_hangs(run: Run) -> None:
    base = run.measure_base()
    hang_s = run.scaled(14, 60)
    run.traffic(10)
    run.go(0.5)
    fault = run.begin(504, limit_s=10.0 + 1.0, kinds=("fresh",))
    run.gateway.write_hooks(trap={"step": "sender.send", "do": f"hang:{hang_s:g}"})
    run.gateway.made["hangs"] += 1
    window = run.go(2.0)
    run.gateway.write_hooks()
    window.only("fresh", 504, at_least=2)
    run.require(window.slowest("fresh") < READ_TIMEOUT_S, "the gateway gave up before the watchdog")
    run.end(fault, 1.0)
    run.quiet()
    # The handlers that hung come back some time; their threads are used again or let go.
    time.sleep(max(0.0, fault.began + hang_s + 2.5 - time.monotonic()))
    run.settle(base, len(run.requests))


def crash_loop(run: Run) -> None:
    run.traffic()
    run.go(0.3)
    fault = run.begin(500, 503, away=True)
    run.gateway.change_mode(crash=True)
    before = len(run.log())
    run.gateway.signal_server(signal.SIGKILL)
    began = time.monotonic()
    window = run.go(run.scaled(4.0, 30.0))
    told = run.log()[before:]
    seconds = time.monotonic() - began
    starts = told.count("chaos: this start fails")
    run.gateway.change_mode(crash=False)
    run.end(fault, 2.0)
    window.only("fresh", 500, 503)
    run.require(1 <= starts <= seconds + 1, f"{starts} starts in {seconds:.0f} s")
    sent = len(window.requests)
    run.require(len(told) < 4000 * sent, f"{len(told)} bytes of log for {sent} requests")
    run.note(f"{starts} starts in {seconds:.0f} s, {len(told) / max(1, sent):.0f} bytes of log a request")


def socket_deleted(run: Run) -> None:
    run.traffic()
    run.go(0.3)
    fault = run.begin(500, 503, away=True)
    run.gateway.socket_path.unlink()
    run.go(1.0)
    run.gateway.socket_path.write_text("no socket")
    run.go(0.7)
    run.gateway.socket_path.unlink()
    run.gateway.signal_server(signal.SIGTERM)
    run.end(fault, 3.0)


def worker_dies(run: Run) -> None:
    """Kill one of two workers: those who were on its connections may see 500, nobody else."""
    everybody = len(run.gateway.pids())
    run.traffic()
    for _ in range(int(run.scaled(4, 20))):
        run.go(0.4)
        workers = run_workers(run)
        fault = run.begin(500, 503, away=True)
        run.gateway.signal([random.Random(89).choice(workers)], signal.SIGKILL)
        killed = time.monotonic()
        whole = wait_until(lambda: len(run.gateway.pids()) == everybody, timeout_s=10)
        run.require(whole, "the worker was not replaced")
        took = time.monotonic() - killed
        run.require(took < 2.0 + run.slack_s, f"replaced after {took:.1f} s")
        run.end(fault, 2.0)
    inside = [sent for sent in run.requests if any(fault.overlaps(sent) for fault in run.faults)]
    served = sum(sent.status < 500 for sent in inside) / max(1, len(inside))
    run.require(served > 0.5, f"only {served:.0%} served while one of two was away")
    run.note(f"{served:.1%} of all requests were served as ever while one of two workers was away")


def run_workers(run: Run) -> list[int]:
    pids = run.gateway.pids()
    return [pid for pid in pids if parent_of(pid) in pids]


# From the last report of a worker to its end, and until another is ready (docs/plugin-server.md).
STUCK_BOUND_S = 5.5 + 2.0


def replaced(run: Run, before: Sequence[int], since: float) -> None:
    """Wait until one worker of *before*, stuck *since*, has given way to another."""
    wait_until(lambda: len(set(before) - set(run.gateway.pids())) == 1, timeout_s=20)
    wait_until(lambda: len(run_workers(run)) == len(before), timeout_s=20)
    took = time.monotonic() - since
    run.require(len(set(run_workers(run)) - set(before)) == 1, "the worker was not replaced")
    run.require(took < STUCK_BOUND_S + run.slack_s, f"replaced after {took:.1f} s")
    run.note(f"replaced after {took:.1f} s")


def worker_stopped(run: Run) -> None:
    """Stop one of two workers: who is on its connections waits for its end, nobody else."""
    run.traffic(20)
    for _ in range(int(run.scaled(1, 10))):
        run.go(0.5)
        before = run_workers(run)
        fault = run.begin(500, 503, away=True)
        run.gateway.signal(before[:1], signal.SIGSTOP)
        stopped = time.monotonic()
        time.sleep(3.0)
        # By now it gets no new connection, and those that Kong had pooled have a request each.
        window = run.go(1.5)
        replaced(run, before, stopped)
        run.end(fault, 2.0)
        late = [sent for sent in window.requests if sent.took_s > 1.0 + run.slack_s]
        run.require(
            len(late) < max(2, len(window.requests) / 4), f"{len(late)} of {len(window.requests)} waited"
        )


def worker_spins(run: Run) -> None:
    """Let one `warm` never come back: its loop is stuck with all that is on it."""
    run.traffic(20)
    for number in range(int(run.scaled(1, 10))):
        run.go(0.5)
        before = run_workers(run)
        fault = run.begin(500, 503, away=True)
        mark = run.gateway.folder / f"spun-{number}"
        run.gateway.write_hooks(trap={"step": "instance.warm", "do": f"spin:{mark}"})
        run.gateway.made["hangs"] += 1
        run.require(wait_until(mark.exists, timeout_s=10), "nothing has spun")
        replaced(run, before, time.monotonic())
        run.gateway.write_hooks()
        run.end(fault, 2.0)
    run.require("in spring" in run.log(), "the log does not tell where it was")


def parent_of(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def bytes_flood(run: Run) -> None:
    base = run.measure_base()
    run.traffic(20)
    rounds = int(run.scaled(10, 200))
    good = run.wallet.fresh("/orders")
    for number in range(rounds):
        evil = bytes([0x80 + (number * 7 + offset) % 0x80 for offset in range(1 + number % 5)]).decode(
            "latin-1"
        )
        bad = [run.wallet.make("bytes-credential", "/orders", f"evil{evil}", good=False) for _ in range(10)]
        bad += [run.wallet.make("bytes-credential", "/orders", good + evil, good=False) for _ in range(5)]
        query = [run.wallet.make("bytes-query", f"/orders?x={evil}", good) for _ in range(10)]
        run.client.send_all([*bad, *query])
        run.client.send(
            run.wallet.make("bytes-header", "/orders", good), f"X-Any: {evil}\r\n".encode("latin-1")
        )
    run.take()
    run.quiet()
    by_kind: dict[str, set[int]] = {}
    for sent in run.requests:
        by_kind.setdefault(sent.kind, set()).add(sent.status)
    run.require({400} == by_kind["bytes-credential"], f"credential: {by_kind['bytes-credential']}")
    run.require({200} == by_kind["bytes-header"] == by_kind["bytes-query"], "another header or the query")
    run.settle(base, rounds)


def gateway_worker_killed(run: Run) -> None:
    run.traffic()
    for _ in range(int(run.scaled(2, 20))):
        run.go(0.4)
        fault = run.begin(500, 503, away=True, gateway_away=True)
        run.gateway.signal(run.gateway.worker_pids(), signal.SIGKILL)
        run.end(fault, 2.0)
    wait_until(lambda: len(run.gateway.pids()) == 1, timeout_s=5)
    orphans = sorted(run.gateway.pids(), key=started_at)[:-1]
    if orphans:
        run.missing(
            "the plugin server of a killed Kong worker to end", f"{len(orphans)} of them left running"
        )
    for pid in orphans:
        os.kill(pid, signal.SIGTERM)
    fault = run.begin(500, 503, away=True)
    wait_until(lambda: not set(orphans) & set(run.gateway.pids()), timeout_s=10)
    run.end(fault, 2.0)


def started_at(pid: int) -> int:
    """Return when a process was started, in clock ticks since boot."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def reload_under_load(run: Run) -> None:
    run.traffic()
    run.go(0.3)
    count = int(run.scaled(5, 100)) if run.gateway.worker_pids() else int(run.scaled(50, 500))
    fault = run.begin(500, 503, away=True)
    began = time.monotonic()
    for _ in range(count):
        run.gateway.reload()
        run.gateway.made["reloads"] += 1
        time.sleep(0.2)
    window = run.window(began)
    run.end(fault, 2.0)
    bad = [sent for sent in window.requests if sent.status >= 500 or sent.status < 0]
    share = len(bad) / max(1, len(window.requests))
    run.require(
        share <= 0.001 or len(bad) <= 1, f"{len(bad)} of {len(window.requests)} failed, allowed 0.1 %"
    )
    run.note(f"{count} reloads, {len(bad)} of {len(window.requests)} requests failed")
    run.quiet()
    # Old workers of the gateway end when their connections do, and their plugin servers with them.
    wait_until(lambda: len(run.gateway.pids()) == 1, timeout_s=60)
    left = len(run.gateway.pids()) - 1
    if left:
        run.missing("one plugin server after the reloads", f"{left} more of earlier workers")


def gateway_restarted(run: Run) -> None:
    run.traffic()
    run.go(0.3)
    fault = run.begin(500, 503, away=True, gateway_away=True)
    run.gateway.halt()
    run.go(0.5)
    run.gateway.resume()
    run.end(fault, 2.0)


def changed_in_flight(run: Run) -> None:
    """Turn one route's audience from a to b and back while its requests flow."""
    run.upstream.flexible.add("/toggle")
    run.traffic(
        run.rate, (("warm", "/orders"), ("fresh", "/toggle"), ("warm", "/toggle"), ("forged", "/toggle"))
    )
    seen: list[str] = []
    try:
        for number in range(int(run.scaled(6, 60))):
            audience, scope = (("reports-api", "reports"), ("orders-api", "orders"))[number % 2]
            run.gateway.apply(run.stage.config(toggle={"audience": audience, "scope": scope}))
            applied = time.monotonic()
            time.sleep(1.0)
            settled = time.monotonic()
            run.go(0.4)
            late = [
                names
                for at, path, names in list(run.upstream.audiences)
                if path == "/toggle" and at > settled
            ]
            changed = [
                at
                for at, path, names in list(run.upstream.audiences)
                if path == "/toggle" and at > applied and names == audience
            ]
            run.require(bool(late), "no request to tell by")
            run.require(set(late) == {audience}, f"after the change to {audience}: {sorted(set(late))}")
            seen.append(f"{(min(changed) - applied) * 1000:.0f}" if changed else "-")
    finally:
        run.gateway.apply(run.stage.config())
        time.sleep(1.0)
        run.upstream.flexible.clear()
    run.note(f"first new token upstream after {'/'.join(seen)} ms")


def invalid_configuration(run: Run) -> None:
    run.traffic()
    run.go(0.3)
    refused = run.stage.config(orders={"config": {"no_such_field": 1}})
    try:
        run.gateway.apply(refused)
        run.fail("a configuration with an unknown field was accepted")
    except RefusedConfigurationError:
        pass
    run.go(0.5)
    # What the schema cannot see: the instance answers the constant 500, and only it.
    run.gateway.apply(run.stage.config(toggle={"config": {"issuer": "ftp://keycloak:8080/realms/internal"}}))
    fault = run.begin(500, kinds=("toggle",))
    for _ in range(10):
        sent = run.send("toggle", "/toggle", run.wallet.fresh("/toggle"))
        run.require(sent.status == 500, f"the invalid route answered {sent.status}")
    run.gateway.apply(run.stage.config())
    wait_until(lambda: run.send("toggle", "/toggle", run.wallet.fresh("/toggle")).status == 200, timeout_s=5)
    run.end(fault, 1.0, paths=("/toggle",))


def secret_rotated(run: Run) -> None:
    run.traffic()
    run.go(0.3)
    fault = run.begin(500, kinds=("fresh",))
    set_secret(run.idp, "MARKsecretNewB8c")
    window = run.go(0.7)
    window.only("fresh", 500).only("cached", 200)
    changes: dict[str, Any] = {"secret": "MARKsecretNewB8c"}
    run.gateway.apply(run.stage.config(orders=changes, reports=changes))
    run.end(fault, 1.0)
    fault = run.begin(500)
    set_secret(run.idp, None)
    run.gateway.apply(run.stage.config())
    run.end(fault, 1.0)


def set_secret(idp: ChaosIdp, secret: str | None) -> None:
    from tests.chaos.idp import SECRET

    issuer = idp.issuers["internal"]
    clients = dict(issuer.realm.clients)
    clients["client-2"] = dataclasses.replace(clients["client-2"], secret=secret or SECRET)
    issuer.realm = dataclasses.replace(issuer.realm, clients=clients)


def switched_off(run: Run) -> None:
    """A route whose plugin is switched off: the operator's decision, whole and reversible."""
    run.traffic(run.rate)
    toggle: list[Sent] = []

    def ask(count: int) -> Sequence[Sent]:
        made = [run.send("toggle", "/toggle", run.wallet.fresh("/toggle")) for _ in range(count)]
        toggle.extend(made)
        return made

    ask(5)
    raw_before = run.upstream.raw_seen
    run.require(raw_before == run.upstream.raw_seen, "untouched before")
    run.upstream.open_paths.add("/toggle")
    try:
        run.gateway.apply(run.stage.config(toggle={"enabled": False}))
        time.sleep(1.0)
        made = ask(5)
        off = run.upstream.raw_seen - raw_before
        run.require(off == 5 and all(sent.status == 200 for sent in made), f"{off} of 5 untouched while off")
        run.gateway.apply(run.stage.config())
        time.sleep(1.0)
    finally:
        run.upstream.open_paths.clear()
    ask(5)
    run.note("while it is off Kong proxies that route as it came; a second after switching on none does")


def _row(number: str, fault: str, expected: str, action: Any, **options: Any) -> Row:
    return Row(
        id=f"FAULT-{number}",
        section=SECTION,
        fault=fault,
        expected=expected,
        action=action,
        both=True,
        **options,
    )


ROWS = (
    _row(
        "80", "SIGKILL of an idle plugin server", "500/503 until it is back, within 2 s", kill_idle, ci=True
    ),
    _row("81", "SIGKILL with exchanges under way", "500/503, back within 2 s", kill_in_flight),
    _row(
        "81d",
        "SIGKILL in dense traffic with short exchanges",
        "500/503, back within 2 s; Kong loses no start of an instance",
        kill_in_dense_traffic,
    ),
    _row(
        "80r",
        "two routes with audiences of their own, server killed again and again",
        "never a token of the other route's configuration",
        never_the_other_route,
    ),
    _row(
        "82",
        "SIGSTOP beyond the gateway's read timeout, then SIGCONT",
        f"500 at the read timeout ({READ_TIMEOUT_S:g} s); back within 10 s, same process",
        stop_and_continue,
    ),
    _row(
        "82w",
        "SIGSTOP of one worker process of several",
        f"others serve; replaced within {STUCK_BOUND_S:g} s",
        worker_stopped,
        mode="workers",
    ),
    _row(
        "83",
        "no more memory (address space limited while running), then the kernel's SIGKILL",
        "500/503/504, back within 2 s",
        out_of_memory,
    ),
    _row(
        "84",
        "an exception at every step of the handler, its text full of the step's arguments",
        "500; the next request is normal",
        exception_at_every_step,
        mode="hooked",
    ),
    _row(
        "85",
        "sys.exit, os._exit, endless recursion, MemoryError, on the loop and in a thread",
        "500/503, back within 2 s",
        ends_of_the_process,
        mode="hooked",
    ),
    _row(
        "86",
        "the handler hangs",
        "504 by the server's own watchdog at 10 s, before the gateway's; others 200",
        handler_hangs,
        mode="hooked",
        upstream="cached and forwarded ones only",
    ),
    _row(
        "86w",
        "the loop of one worker process of several never comes back",
        f"others serve; replaced within {STUCK_BOUND_S:g} s; the log tells where it was",
        worker_spins,
        mode="hookedworkers",
    ),
    _row(
        "87",
        "crash loop at start",
        "500/503; starts at least 1 s apart; log bounded; back within 2 s",
        crash_loop,
    ),
    _row(
        "88",
        "socket deleted, then a plain file in its place, then the server restarted",
        "500/503 on new connections; back within 3 s of the restart",
        socket_deleted,
    ),
    _row(
        "89",
        "one worker process of several dies",
        "others serve; replaced within 2 s",
        worker_dies if serve_has("--workers") else None,
        mode="workers",
        reason=""
        if serve_has("--workers")
        else "the server has one process so far; runs as soon as `serve` has --workers",
    ),
    _row(
        "90",
        "bytes above ASCII in credential, header and query, as a flood",
        "400 in the credential, no effect elsewhere; threads flat",
        bytes_flood,
        upstream="exchanged ones of good tokens",
        ci=True,
    ),
    _row(
        "91",
        "SIGKILL of the gateway's worker",
        "connections under way break; back within 2 s",
        gateway_worker_killed,
        only="kong",
    ),
    _row(
        "92",
        "reload again and again under load",
        "at most 0.1 % 500/503, never 200 for a bad token",
        reload_under_load,
        upstream="exchanged tokens only",
    ),
    _row(
        "93", "gateway stopped and started", "connections refused; normal after the start", gateway_restarted
    ),
    _row(
        "94",
        "one route's audience changed and changed back under load",
        "each request wholly old or new; no old audience 1 s after the change",
        changed_in_flight,
        upstream="exchanged tokens only",
    ),
    _row(
        "95",
        "an invalid configuration",
        "schema: refused, the old one goes on; else constant 500 of that route",
        invalid_configuration,
        upstream="nothing on that route",
    ),
    _row(
        "96",
        "the client's secret changes at the issuer, then in the configuration",
        "500 for new exchanges, never 401; right with the new configuration within 1 s",
        secret_rotated,
        upstream="cached and forwarded ones only",
    ),
    _row(
        "97",
        "latch missing",
        "not applicable",
        None,
        reason="the latch belongs to kong-pdk's own server; over ProtoBuf:1 Kong itself fails closed",
    ),
    _row(
        "98",
        "plugin switched off on a route while it runs, and on again",
        "documented: that route is proxied as it came; no half state",
        switched_off,
        upstream="that route untouched, while it is off",
    ),
)
