"""
One row of the suite at work: faults, windows, expectations, and the invariants over every request.

A row says when its fault begins and ends, and what good requests may get meanwhile. All the rest
is judged for it: whatever was sent outside a fault must be answered as if there were none, and the
invariants hold inside it too.

    I1  the upstream sees no request whose token was not accepted
    I2  it never sees the caller's own token where an exchange is required
    I3  it sees only tokens issued for that very subject token, for that route's audience
    I4  no 4xx for a good token because of a fault; no 5xx for a bad one while the server lives
    I5  every request is answered, within the deadline and a second (the gateway's own limit where
        the server is stopped)
    I6  no mark of a token or a secret in a log or in an error's body
    I7  after the fault good requests succeed again, without a restart by hand
    I8  threads, descriptors and memory of the plugin server come back to where they were
"""

from __future__ import annotations

import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tests.chaos.gateways import READ_TIMEOUT_S
from tests.chaos.idp import after
from tests.chaos.process import Usage, usage
from tests.chaos.stage import Stage
from tests.chaos.traffic import BAD_STATUS, GARBAGE, MIX, WORDS, Sent
from tests.support.gateways import wait_until

GROUPS = {"fresh": ("fresh",), "cached": ("warm", "other"), "forward": ("forward",), "bad": tuple(BAD_STATUS)}

VERDICTS = {"pass": "passed", "fail": "failed", "not yet": "not yet", "not run": "not run with a reason"}

# Beyond the deadline, as I5 has it.
GRACE_S = 1.0
# What a cached pair of tokens takes at the plugin server, measured: it is no leak.
BYTES_PER_TOKEN = 16 * 1024
RSS_SLACK = 6 * 2**20
SETTLE_S = 15.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: what is done and what must come of it."""

    id: str
    section: str
    fault: str
    expected: str
    upstream: str = "nothing"
    action: Callable[[Run], None] | None = None
    reason: str = ""
    mode: str = "plain"
    both: bool = False
    only: str = ""
    ci: bool = False


@dataclass(slots=True)
class Fault:
    """A stretch of time in which good requests may fail in a named way."""

    began: float
    allowed: frozenset[int]
    away: bool
    gateway_away: bool
    keyless: bool
    limit_s: float
    kinds: frozenset[str]
    ended: float = math.inf
    # The base of I8 is measured inside it: not what the row is about.
    base: bool = False

    def overlaps(self, sent: Sent) -> bool:
        return sent.ended_at >= self.began and sent.sent_at <= self.ended


@dataclass
class Result:
    """What the report tells of one row on one gateway."""

    row: Row
    gateway: str
    verdict: str
    seen: str = ""
    upstream: str = ""
    recovery: str = ""
    sent: int = 0
    seconds: float = 0.0
    remarks: list[str] = field(default_factory=list)
    # Faults of each kind: kills, stops, exceptions, reloads, ...
    made: dict[str, int] = field(default_factory=dict)


class Window:
    """What was sent in a stretch of time, once it has been answered."""

    def __init__(self, run: Run, requests: Sequence[Sent]) -> None:
        self._run = run
        self.requests = list(requests)

    def of(self, *kinds: str) -> list[Sent]:
        names = {name for kind in kinds for name in GROUPS.get(kind, (kind,))}
        return [sent for sent in self.requests if sent.kind in names]

    def only(self, kind: str, *statuses: int, at_least: int = 1) -> Window:
        """Require that all requests of a kind got one of these statuses."""
        found = Counter(sent.status for sent in self.of(kind))
        wrong = {status: count for status, count in found.items() if status not in statuses}
        if wrong:
            self._run.mismatch(f"{kind}: expected {_either(statuses)}, saw {_counts(wrong)}")
        if sum(found.values()) < at_least:
            self._run.fail(f"{kind}: only {sum(found.values())} requests, too few to tell")
        return self

    def share(self, kind: str, status: int) -> float:
        chosen = self.of(kind)
        return sum(sent.status == status for sent in chosen) / max(1, len(chosen))

    def slowest(self, *kinds: str) -> float:
        return max((sent.took_s for sent in self.of(*kinds)), default=0.0)

    def quantile(self, part: float, *kinds: str) -> float:
        times = sorted(sent.took_s for sent in self.of(*kinds))
        return times[min(len(times) - 1, int(part * len(times)))] if times else 0.0


def _either(statuses: Iterable[int]) -> str:
    return " or ".join(str(status) for status in statuses)


def _counts(found: Counter[int] | dict[int, int]) -> str:
    return " ".join(f"{WORDS.get(status, status)}x{count}" for status, count in sorted(found.items()))


def _told(text: str, requests: Sequence[Sent]) -> str:
    worst = max(requests, key=lambda sent: sent.took_s)
    kinds = Counter(sent.kind for sent in requests).most_common(3)
    names = ", ".join(f"{kind} x{count}" for kind, count in kinds)
    slowest = f"slowest {worst.took_s:.1f} s, {WORDS.get(worst.status, worst.status)}"
    return f"{text} ({len(requests)} times: {names}; {slowest})"


class Run:
    """One row on one gateway."""

    def __init__(self, row: Row, stage: Stage, *, long: bool, rate: float) -> None:
        self.row, self.stage, self.long = row, stage, long
        self.rate = rate
        self.idp, self.client, self.gateway = stage.idp, stage.client, stage.gateway
        self.wallet, self.upstream = stage.wallet, stage.upstream
        self.failures: list[str] = []
        self.not_yet: list[str] = []
        self.notes: list[str] = []
        self.faults: list[Fault] = []
        self.recoveries: list[tuple[float, float]] = []
        self.requests: list[Sent] = []
        self.retired: set[str] = set()
        self._began = time.monotonic()
        self._made_before = Counter(self.gateway.made)
        self._log = ""

    # --- saying what is wrong ---------------------------------------------------------

    def fail(self, text: str) -> None:
        self.failures.append(text)

    def mismatch(self, text: str) -> None:
        self.failures.append(text)

    def missing(self, expected: str, saw: str) -> None:
        """Note what a later version is to do; not a failure of the run."""
        self.not_yet.append(f"expected {expected}, saw {saw}: not yet")

    def require(self, condition: bool, text: str) -> None:
        if not condition:
            self.mismatch(text)

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def slack_s(self) -> float:
        """What a time may be late by, on a machine that has more to run than it has processors."""
        overload = max(0.0, os.getloadavg()[0] / (os.cpu_count() or 1) - 1.0)
        return 2 * self.client.worst_lag_s + 0.5 * overload

    def scaled(self, short: float, long: float) -> float:
        return long if self.long else short

    @property
    def deadline_s(self) -> float:
        return self.stage.deadline_ms / 1000

    # --- traffic ----------------------------------------------------------------------

    def traffic(self, rate: float | None = None, mix: Sequence[tuple[str, str]] = MIX) -> None:
        self.client.stream(rate or self.rate, self.wallet.make, mix)

    def quiet(self) -> None:
        """Send no more, and wait until all is answered."""
        self.client.quiet()
        wait_until(lambda: self.client.in_flight == 0, timeout_s=40)
        self.take()

    def take(self) -> None:
        """Note what has been answered."""
        done = self.client.done
        while done:
            self.requests.append(done.popleft())

    def go(self, seconds: float) -> Window:
        """Let traffic flow, and return what was sent meanwhile once it is answered."""
        began = time.monotonic()
        time.sleep(seconds)
        return self.window(began)

    def window(self, began: float, ended: float | None = None) -> Window:
        """Return what was sent since *began* (until *ended*), once it is answered."""
        until = time.monotonic() if ended is None else ended

        def pending() -> bool:
            return any(
                sent.ended_at == 0.0
                for sent in self._recent()
                if began <= sent.sent_at <= until and sent.kind != "left"
            )

        wait_until(lambda: not pending(), timeout_s=40)
        self.take()
        return Window(self, [sent for sent in self.requests if began <= sent.sent_at <= until])

    def _recent(self) -> list[Sent]:
        sent = self.stage.books.sent
        return [sent[key] for key in list(sent)[-5000:] if key in sent]

    def send(self, kind: str, path: str = "/orders", token: str | None = None, **options: bool) -> Sent:
        """Send one request and wait for its answer."""
        sent = self.client.send(self.wallet.make(kind, path, token, **options))
        self.take()
        return sent

    # --- faults -----------------------------------------------------------------------

    def begin(
        self,
        *allowed: int,
        away: bool = False,
        gateway_away: bool = False,
        keyless: bool = False,
        limit_s: float = 0.0,
        kinds: Iterable[str] = (),
    ) -> Fault:
        """
        Open a fault: call it before the fault is made.

        Args:
            allowed: What good requests may be answered beside 200.
            away: The plugin server may be absent: the gateway's own 500 to anybody.
            gateway_away: Connections may be refused or broken.
            keyless: Keys may be missing: tokens that need them may get 503.
            limit_s: In place of deadline + 1 s.
            kinds: Only these kinds of good requests are touched; all when empty.
        """
        fault = Fault(
            time.monotonic(), frozenset(allowed), away, gateway_away, keyless, limit_s, frozenset(kinds)
        )
        self.faults.append(fault)
        return fault

    def end(
        self, fault: Fault, bound_s: float, *, paths: Sequence[str] = ("/orders", "/reports"), streak: int = 4
    ) -> float:
        """
        Close a fault: call it after the fault was taken away; waits until good requests succeed.

        Args:
            fault: What `begin` returned.
            bound_s: Within how many seconds.
            paths: Where new tokens are tried.
            streak: How many must succeed in a row.
        """
        lifted = time.monotonic()
        recovered, run = math.inf, 0
        while run < streak * len(paths):
            sent = self.send("fresh", paths[run % len(paths)])
            if sent.status == 200:
                recovered = min(recovered, sent.ended_at - lifted)
                run += 1
            else:
                recovered, run = math.inf, 0
                if time.monotonic() - lifted > min(bound_s, 60) + 40:
                    break
                time.sleep(0.05)
        fault.ended = time.monotonic()
        self.recoveries.append((recovered, bound_s))
        if math.isinf(recovered):
            self.fail(f"I7: no recovery within {min(bound_s, 60) + 40:.0f} s")
        elif recovered > bound_s:
            load = os.getloadavg()[0]
            text = f"recovered after {recovered:.1f} s, expected {bound_s:g} s"
            if load > (os.cpu_count() or 1) and recovered < bound_s + 10:
                self.note(f"{text}; the machine was overloaded (load {load:.1f})")
            else:
                self.mismatch(text)
        return recovered

    def log(self) -> str:
        """Return what has been logged since the row began, after a look for marks (I6)."""
        new = self.gateway.new_log()
        self.stage.books.look_for_marks("the log", new)
        self._log += new
        return self._log

    def _reasons(self) -> str:
        """Tell the commonest reasons of 5xx in the log: where to look when a row fails."""
        found = Counter(re.findall(r'"reason":"(\w+)","status":5', self.log()))
        return ", ".join(f"{reason} x{count}" for reason, count in found.most_common(4))

    def over(self, fault: Fault) -> None:
        """Close a fault that needs no recovery."""
        fault.ended = time.monotonic()

    # --- begin and end of the row -----------------------------------------------------

    def ready(self) -> None:
        """Put everything right and see that it is; traffic flows from here."""
        for idp in self.stage.idps[:2]:
            idp.behave()
        deadline = time.monotonic() + 60
        while any(self.client.send(sent).status != 200 for sent in self._health()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"not healthy before the row\n{self.gateway.log_tail(1500)}")
            time.sleep(0.1)
        self.take()
        self.requests.clear()
        self.stage.books.take_complaints()
        self.gateway.new_log()
        self.client.worst_lag_s = 0.0
        self._began = time.monotonic()

    def _health(self) -> Iterable[Sent]:
        """All tokens that are sent again and again, so that they are cached, and a new one of each issuer."""
        yield from self.wallet.prime()
        for path in ("/orders", "/reports", "/second", "/secure"):
            yield self.wallet.make("fresh", path)

    def measure_base(self, threads: int = 80) -> Usage:
        """Return what the plugin server holds once all its threads and connections have been needed."""
        fault = self.begin(503, 504, kinds=("base", "fresh"), limit_s=10.0)
        fault.base = True
        paths = ("/orders", "/second")
        for realm in ("internal", "second"):
            # Both, because each endpoint has a bound of its own below the number of threads.
            self.idp.misbehave(realm, "token", after(0.5))
        tokens = [(paths[number % 2], self.wallet.fresh(paths[number % 2])) for number in range(threads)]
        self.client.send_all([self.wallet.make("base", path, token) for path, token in tokens])
        self.idp.behave()
        self.end(fault, math.inf)
        self.recoveries.clear()
        self.client.send_all([self.wallet.make("warm", "/reports") for _ in range(20)])
        self.take()
        return self.usage()

    def usage(self) -> Usage:
        return usage(self.gateway.pids(), self.gateway.socket_path)

    def settle(self, base: Usage, tokens: int) -> None:
        """I8: back to where it was; *tokens* were new since the base and may be cached."""
        rss_limit = base.rss_bytes * 1.1 + RSS_SLACK + tokens * BYTES_PER_TOKEN

        def excess() -> list[str]:
            now = self.usage()
            found = []
            if now.threads > base.threads * 1.1 + 1:
                found.append(f"{now.threads} threads, base {base.threads}")
            if now.descriptors > base.descriptors * 1.1 + 2:
                found.append(f"{now.descriptors} descriptors, base {base.descriptors}")
            if now.connections > 256 + 16:
                found.append(f"{now.connections} connections, the gateway pools 256")
            if now.rss_bytes > rss_limit:
                found.append(
                    f"{now.rss_bytes >> 20} MB resident, base {base.rss_bytes >> 20}, {tokens} tokens"
                )
            return found

        if not wait_until(lambda: not excess(), timeout_s=60 if self.long else SETTLE_S):
            self.fail("I8: " + "; ".join(excess()))

    def judge(self) -> Result:
        """Lay every request of the row beside the invariants, and make the verdict."""
        self.quiet()
        self.log()
        violations: dict[str, list[Sent]] = {}
        for sent in self.requests:
            for text in self._violations(sent):
                violations.setdefault(text, []).append(sent)
        self.failures += [_told(text, sents) for text, sents in violations.items()]
        self.failures += self.stage.books.take_complaints()
        if self.failures and self._reasons():
            self.notes.append(f"5xx in the log: {self._reasons()}")
        verdict = "fail" if self.failures else "not yet" if self.not_yet else "pass"
        return Result(
            row=self.row,
            gateway=self.gateway.name,
            verdict=verdict,
            seen=self.seen(),
            upstream=self._upstream_saw(),
            recovery=self._recovery_text(),
            sent=len(self.requests),
            seconds=time.monotonic() - self._began,
            remarks=[*self.failures, *self.not_yet, *self.notes],
            made=dict(self.gateway.made - self._made_before),
        )

    def _violations(self, sent: Sent) -> Iterable[str]:
        if sent.kind == "left":
            return
        faults = [fault for fault in self.faults if fault.overlaps(sent)]
        touching = [fault for fault in faults if not fault.kinds or sent.kind in fault.kinds]
        limit = max([self.deadline_s + GRACE_S, *(fault.limit_s for fault in faults)])
        if any(fault.away for fault in faults):
            limit = max(limit, READ_TIMEOUT_S + GRACE_S)
        if sent.took_s > limit + self.slack_s:
            yield f"I5: answered later than {limit:g} s"
        if sent.status < 100:
            if not any(fault.gateway_away for fault in faults):
                yield f"I5: no answer: {WORDS[sent.status]}"
        elif sent.good:
            yield from self._good_violations(sent, touching)
        else:
            yield from self._bad_violations(sent, faults)

    def _good_violations(self, sent: Sent, faults: Sequence[Fault]) -> Iterable[str]:
        if sent.status == 200:
            return
        if sent.status in (400, 401, 403) and sent.kind not in self.retired:
            yield f"I4: {sent.status} for a good request"
        elif not faults:
            yield f"I7: {sent.status} for a good request outside the fault"
        elif sent.status not in {500, 503} | {status for fault in faults for status in fault.allowed} and any(
            fault.away for fault in faults
        ):
            yield f"{sent.status} for a good request while the server is away"
        elif not any(fault.away or sent.status in fault.allowed for fault in faults):
            yield f"{sent.status} for a good request is not among what is expected"

    def _bad_violations(self, sent: Sent, faults: Sequence[Fault]) -> Iterable[str]:
        if sent.status == 200:
            yield "I1: 200 for a bad request"
        elif sent.status >= 500 and not any(fault.away for fault in faults):
            excused = sent.status in (503, 504) and sent.kind not in GARBAGE
            if not (excused and any(fault.keyless for fault in faults)):
                yield f"I4: {sent.status} for a bad request while the server lives"
        elif sent.status < 500 and sent.kind in BAD_STATUS and sent.status != BAD_STATUS[sent.kind]:
            yield f"{sent.status} for a bad request, expected {BAD_STATUS[sent.kind]}"

    # --- words for the table ----------------------------------------------------------

    def seen(self, requests: Sequence[Sent] | None = None) -> str:
        """Tell the statuses by group of requests; those sent inside a fault, if there was one."""
        chosen = requests
        if chosen is None:
            faults = [fault for fault in self.faults if not fault.base]
            inside = [sent for sent in self.requests if any(fault.overlaps(sent) for fault in faults)]
            chosen = [sent for sent in (inside if faults else self.requests) if sent.kind != "base"]
        known = {name: group for group, names in GROUPS.items() for name in names}
        groups: dict[str, Counter[int]] = {}
        for sent in chosen:
            groups.setdefault(known.get(sent.kind, sent.kind), Counter())[sent.status] += 1
        order = [*GROUPS, *sorted(set(groups) - set(GROUPS))]
        return "; ".join(f"{name} {_counts(groups[name])}" for name in order if name in groups)

    def _upstream_saw(self) -> str:
        hits = [sent for sent in self.requests if sent.upstream_hits]
        exchanged = sum(sent.exchanged for sent in hits)
        forwarded = len(hits) - exchanged
        return f"{exchanged} exchanged" + (f", {forwarded} forwarded" if forwarded else "")

    def _recovery_text(self) -> str:
        if not self.recoveries:
            return ""
        worst = max(self.recoveries)
        times = f" (worst of {len(self.recoveries)})" if len(self.recoveries) > 1 else ""
        return f"{worst[0]:.2f} s of {worst[1]:g} s{times}"
