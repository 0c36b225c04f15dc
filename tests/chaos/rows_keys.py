"""FAULT-30 to FAULT-43: keys and discovery."""

from __future__ import annotations

import json
import time
from typing import Any

from kong_token_exchange.sandbox.issuer import SigningKey
from tests.chaos import idp as kinds
from tests.chaos.idp import answering
from tests.chaos.run import Row, Run
from tests.support.gateways import wait_until

SECTION = "Keys and discovery"

# Seconds of the modes `keys` and `cooldown` in the short form; in the long one so many times as much.
REFRESH_S, TTL_S, STALE_S, COOL_DOWN_S = 1.5, 2.5, 8.0, 2.0
LONG_FACTOR = 5
INTERNAL = ("fresh", "warm", "forward")


def constants(mode: str, *, long: bool) -> dict[str, float]:
    """Return the product's times as this mode has them, by name."""
    factor = LONG_FACTOR if long else 1
    module = "kong_token_exchange.shell.key_source."
    times = {"COOL_DOWN_S": COOL_DOWN_S}
    if mode == "keys":
        times |= {"REFRESH_S": REFRESH_S, "TTL_S": TTL_S, "STALE_S": STALE_S, "TROUBLE_S": TTL_S}
        # In proportion: a fetch that hangs must not outlast the sets. The long form's outlast it anyway.
        times |= {} if long else {"FETCH_DEADLINE_S": 1.5}
    return {module + name: value * factor for name, value in times.items()}


async def drop(turn: kinds.Turn) -> bool:
    return False


def break_keys(run: Run, behaviour: kinds.Behaviour = drop, realm: str = "internal") -> None:
    for endpoint in ("jwks", "discovery"):
        run.idp.misbehave(realm, endpoint, behaviour)


def past(run: Run, seconds: float) -> float:
    return run.scaled(seconds, seconds * LONG_FACTOR)


def cold_start(run: Run) -> None:
    break_keys(run)
    run.traffic()
    away = run.begin(500, 503, 504, away=True)
    run.gateway.restart_server()
    wait_until(lambda: run.send("other", "/second").status == 200, timeout_s=20)
    run.over(away)
    fault = run.begin(503, 504, keyless=True, kinds=INTERNAL)
    window = run.go(run.scaled(1.5, 10))
    window.only("fresh", 503, 504).only("other", 200)
    run.idp.behave()
    run.end(fault, 5.0)


def down_while_fresh(run: Run) -> None:
    break_keys(run)
    run.traffic()
    run.go(run.scaled(1.5, 30)).only("fresh", 200).only("cached", 200)


def down_past_ttl(run: Run) -> None:
    run.traffic()
    run.go(0.3)
    break_keys(run)
    window = run.go(past(run, TTL_S + 1.0))
    window.only("fresh", 200).only("cached", 200).only("forward", 200)
    run.require(run.idp.count("internal", "discovery") > 0, "nobody asked for the keys")


def down_past_stale(run: Run) -> None:
    run.traffic()
    break_keys(run)
    # The set in memory is at most as old as a refresh when the fault begins.
    fault = run.begin(503, 504, keyless=True, kinds=INTERNAL)
    time.sleep(past(run, STALE_S) + 0.3)
    window = run.go(1.2)
    window.only("fresh", 503).only("other", 200)
    run.idp.behave()
    run.end(fault, 5.0)


def rotate_with_overlap(run: Run) -> None:
    run.traffic()
    run.go(past(run, COOL_DOWN_S) + 0.3)
    began = time.monotonic()
    run.idp.issuers["internal"].rotate("ES256")
    run.go(1.2).only("fresh", 200)
    count = run.idp.count("internal", "jwks", began)
    run.require(count == 1, f"{count} fetches of the keys, expected 1")


def old_key_removed(run: Run) -> None:
    issuer = run.idp.issuers["internal"]
    # First the overlap, until the new key is known; then the old one goes.
    key = SigningKey.generate("ES256")
    issuer.keys = [*issuer.keys, key]
    run.traffic(20)
    run.go(past(run, TTL_S))
    run.quiet()
    old = [run.wallet.fresh("/orders") for _ in range(4)]
    run.retired.add("old")
    fault = run.begin(401, kinds=("old",))
    for token in old:
        run.require(run.send("old", "/orders", token).status == 200, "the old key does not work before")
    issuer.keys = [issuer.key("RS256"), key]
    run.wallet.forget_warm()
    removed = time.monotonic()
    statuses: list[tuple[float, int]] = []
    limit = past(run, TTL_S) + 1.2
    while time.monotonic() < removed + limit + 0.5:
        at = time.monotonic() - removed
        # Beyond the TTL it is a bad token like any other.
        sent = run.send("old", "/orders", old[len(statuses) % 4], good=at <= limit)
        statuses.append((at, sent.status))
        run.require(run.send("fresh", "/orders").status == 200, "a token of the new key was refused")
        time.sleep(0.1)
    run.over(fault)
    last = max((at for at, status in statuses if status == 200), default=0.0)
    run.require(statuses[-1][1] == 401, f"old tokens end with {statuses[-1][1]}")
    run.note(f"an old token last succeeded {last:.1f} s after the removal (TTL {past(run, TTL_S):g} s)")


def signed_too_early(run: Run) -> None:
    issuer = run.idp.issuers["internal"]
    key = SigningKey.generate("ES256")
    run.retired.add("early")
    run.traffic(20)
    run.go(past(run, COOL_DOWN_S) + 0.2)
    fault = run.begin(401, 503, kinds=("early",))
    before = [run.send("early", "/orders", run.wallet.fresh("/orders", key=key)).status for _ in range(3)]
    run.require(set(before) <= {401, 503}, f"before the key is published: {before}")
    issuer.keys = [*issuer.keys, key]
    published = time.monotonic()
    ok = wait_until(
        lambda: run.send("early", "/orders", run.wallet.fresh("/orders", key=key)).status == 200,
        timeout_s=past(run, COOL_DOWN_S) + 10,
    )
    took = time.monotonic() - published
    run.over(fault)
    run.require(ok, "never accepted after publishing")
    run.recoveries.append((took, past(run, COOL_DOWN_S) + 1.0))
    run.note("the exception to I4: it cannot be told from an unknown key")


def spray(run: Run, seconds: float, rate: float = 80.0) -> None:
    """Send tokens with made-up key ids beside the stream."""
    began = time.monotonic()
    sent = 0
    while time.monotonic() < began + seconds:
        batch = [
            run.wallet.make("unknown-kid", "/orders", run.wallet.unknown_kid("/orders"), good=False)
            for _ in range(int(rate / 10))
        ]
        run.client.send_all(batch)
        sent += len(batch)
        time.sleep(max(0.0, began + sent / rate - time.monotonic()))


def kid_spray(run: Run) -> None:
    run.traffic(40)
    before = run.go(1.0)
    began = time.monotonic()
    spray(run, past(run, COOL_DOWN_S) * 1.5)
    seconds = time.monotonic() - began
    during = run.window(began)
    during.only("unknown-kid", 401).only("fresh", 200).only("cached", 200)
    fetches = run.idp.count("internal", "jwks", began)
    allowed = int(seconds / past(run, COOL_DOWN_S)) + 1
    run.require(fetches <= allowed, f"{fetches} fetches in {seconds:.1f} s, allowed {allowed}")
    run.note(
        f"{len(during.of('unknown-kid')) / seconds:.0f} a second, {fetches} fetches; cached requests: median "
        f"{before.quantile(0.5, 'cached') * 1000:.1f} ms before, "
        f"{during.quantile(0.5, 'cached') * 1000:.1f} ms during"
    )


def kid_spray_without_keys(run: Run) -> None:
    run.traffic(40)
    run.go(past(run, COOL_DOWN_S) + 0.2)
    break_keys(run)
    fault = run.begin(keyless=True, kinds=("nobody-good",))
    began = time.monotonic()
    spray(run, past(run, COOL_DOWN_S) * 1.5)
    seconds = time.monotonic() - began
    during = run.window(began)
    during.only("unknown-kid", 401, 503).only("fresh", 200).only("cached", 200)
    run.over(fault)
    fetches = run.idp.count("internal", "jwks", began) + run.idp.count("internal", "discovery", began)
    run.note(f"{fetches} requests for documents or keys in {seconds:.1f} s")
    run.require(
        fetches <= 2 * (seconds / past(run, COOL_DOWN_S) + 1) + 1, f"{fetches} fetches in {seconds:.1f} s"
    )


def slow_keys(run: Run) -> None:
    run.traffic()
    before = run.go(1.0)
    run.idp.misbehave("internal", "jwks", kinds.after(10.0))
    during = run.go(past(run, TTL_S) + 0.8)
    during.only("fresh", 200).only("cached", 200)
    rise = (during.quantile(0.5, "cached") - before.quantile(0.5, "cached")) * 1000
    run.require(rise < 20, f"median of cached requests rose by {rise:.0f} ms")
    run.require(during.slowest("cached") < 1.3 + run.slack_s, "waited longer than the patience of 1 s")
    run.note(f"cached requests: median {rise:+.1f} ms, slowest {during.slowest('cached') * 1000:.0f} ms")


def other_issuer_broken(run: Run) -> None:
    run.traffic()
    before = run.go(1.0)
    run.idp.misbehave("second", "*", kinds.silence)
    # The fresh ones with which `end` tries that issuer; those of this one are judged below.
    fault = run.begin(503, 504, keyless=True, kinds=("other", "second", "fresh"))
    began = time.monotonic()
    while time.monotonic() < began + past(run, TTL_S) + 2.0:
        run.send("second", "/second", run.wallet.fresh("/second"))
        time.sleep(0.1)
    during = run.window(began)
    internal = during.of("fresh", "warm", "forward")
    run.require(all(sent.status == 200 for sent in internal), "the other issuer's tokens were touched")
    rise = (during.quantile(0.5, "warm") - before.quantile(0.5, "warm")) * 1000
    run.require(rise < 20, f"the other issuer's cached requests are {rise:.0f} ms slower")
    run.idp.behave()
    run.end(fault, 5.0, paths=("/second",))


def garbage_keys(run: Run) -> None:
    empty, huge = json.dumps({"keys": []}).encode(), b'{"keys": [' + b" " * 2 * 2**20 + b"]}"
    answers = [
        answering(200, b"<html></html>", {"Content-Type": "text/html"}),
        answering(200, empty),
        answering(200, huge),
    ]
    turn = iter(range(10**9))
    run.traffic()
    run.go(0.3)
    run.idp.misbehave("internal", "jwks", kinds.sometimes(answers, lambda: next(turn) % len(answers)))
    began = time.monotonic()
    run.go(past(run, TTL_S) + 1.5).only("fresh", 200).only("cached", 200).only("forward", 200)
    run.require(run.idp.count("internal", "jwks", began) >= 2, "nobody asked for the keys")
    run.idp.behave()
    run.go(1.0).only("fresh", 200)


def wrong_keys(run: Run) -> None:
    issuer = run.idp.issuers["internal"]
    public = issuer.jwks()["keys"]
    secret = [
        {"kty": "oct", "kid": key["kid"], "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0", "alg": "HS256"}
        for key in public
    ]
    private = [{**key, "d": "AAAA"} for key in public]
    answers = [answering(200, json.dumps({"keys": keys}).encode()) for keys in (secret, private)]
    turn = iter(range(10**9))
    run.traffic()
    run.idp.misbehave("internal", "jwks", kinds.sometimes(answers, lambda: next(turn) % 2))
    run.go(past(run, TTL_S) + 0.5).only("fresh", 200).only("cached", 200)
    fault = run.begin(503, 504, keyless=True, kinds=INTERNAL)
    time.sleep(past(run, STALE_S - TTL_S))
    window = run.go(1.0)
    window.only("fresh", 503)
    told = run.log()
    run.require("jwks_without_usable_key" in told, "the log does not say jwks_without_usable_key")
    run.idp.behave()
    run.end(fault, 5.0)
    run.note("503 and not 401 once the old set has ended: the caller's token may be good (I4)")


def issuer_renamed(run: Run) -> None:
    document = {**run.idp.issuers["internal"].discovery(), "issuer": "http://keycloak:8080/realms/evil"}
    run.traffic()
    run.go(0.3)
    run.idp.misbehave("internal", "discovery", answering(200, json.dumps(document).encode()))
    run.go(past(run, TTL_S) + 1.5).only("fresh", 200).only("cached", 200)
    told = run.log()
    run.require("metadata_issuer_differs" in told, "the log does not say metadata_issuer_differs")


def _row(number: str, fault: str, expected: str, action: Any, mode: str, **options: Any) -> Row:
    options.setdefault("upstream", "exchanged tokens only")
    return Row(
        id=f"FAULT-{number}",
        section=SECTION,
        fault=fault,
        expected=expected,
        action=action,
        mode=mode,
        **options,
    )


ROWS = (
    _row("31", "keys down, those in memory fresh", "200", down_while_fresh, "plain"),
    _row(
        "30",
        "keys down at a cold start",
        "503 for that issuer, 200 for others; back within 5 s",
        cold_start,
        "keys",
        upstream="the other issuer's only",
    ),
    _row("32", "keys down past their TTL, inside the stale bound", "200", down_past_ttl, "keys"),
    _row(
        "33",
        "keys down past the stale bound",
        "503; back within 5 s",
        down_past_stale,
        "keys",
        upstream="the other issuer's only, after the bound",
    ),
    _row(
        "35",
        "rotation, old key removed",
        "old tokens 401 within the TTL, new ones 200",
        old_key_removed,
        "keys",
    ),
    _row("39", "keys take 10 s to come", "tokens of known keys are not delayed", slow_keys, "keys"),
    _row("40", "all of another issuer silent", "this issuer unchanged", other_issuer_broken, "keys"),
    _row("41", "key set turns to HTML, empty, 2 MB", "the last good set is kept: 200", garbage_keys, "keys"),
    _row(
        "42",
        "key set of symmetric or private keys",
        "refused, alarm; 503 after the old set has ended",
        wrong_keys,
        "keys",
    ),
    _row(
        "43",
        "discovery names another issuer",
        "document refused, the old kept, alarm: 200",
        issuer_renamed,
        "keys",
    ),
    _row("34", "rotation with overlap", "200; one fetch", rotate_with_overlap, "cooldown", ci=True),
    _row(
        "36",
        "token signed before its key is published",
        "401 or 503, then 200 within the cool-down",
        signed_too_early,
        "cooldown",
    ),
    _row(
        "37",
        "spray of made-up key ids",
        "401; one fetch per cool-down; good ones unharmed",
        kid_spray,
        "cooldown",
    ),
    _row(
        "38",
        "the same while the keys are down",
        "401 or 503 for unknown keys, good tokens 200",
        kid_spray_without_keys,
        "cooldown",
    ),
)
