"""FAULT-50 to FAULT-54: the plugin server's wall clock, moved in its process while it runs."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any

from tests.chaos import idp as kinds
from tests.chaos.run import Row, Run

SECTION = "Clock"
DAY = 86_400


def move(run: Run, seconds: int, *, idp_too: bool) -> None:
    """Put the plugin server's wall clock ahead of the true one, and the issuer's with it if asked for."""
    run.gateway.write_hooks(clock=seconds)
    run.idp.offset_s = run.stage.secure_idp.offset_s = seconds if idp_too else 0.0
    run.wallet.forget_warm()


def flow(run: Run, seconds: float) -> None:
    """Let the whole mix flow for a while; good ones must all succeed."""
    run.traffic()
    run.go(seconds).only("fresh", 200).only("cached", 200).only("forward", 200)
    run.quiet()


def ahead(run: Run) -> None:
    aged = [run.wallet.fresh("/orders", life_s=300) for _ in range(5)]
    for token in aged:
        run.send("aged", "/orders", token)
    move(run, 600, idp_too=True)
    after = [run.send("aged", "/orders", token, good=False).status for token in aged]
    run.require(set(after) == {401}, f"cached tokens past their end: {after}")
    flow(run, 1.0)
    move(run, 0, idp_too=True)
    flow(run, 0.5)


def behind(run: Run) -> None:
    future = [run.wallet.fresh("/orders") for _ in range(5)]
    for token in future:
        run.send("future", "/orders", token)
    move(run, -600, idp_too=False)
    after = [run.send("future", "/orders", token, good=False).status for token in future]
    run.require(set(after) == {401}, f"tokens of the future: {after}")
    move(run, 0, idp_too=False)
    monotonic_end(run)
    flow(run, 0.5)


def monotonic_end(run: Run) -> None:
    """With a leeway that lets the future in, a cached token still ends by the monotonic clock."""
    issuer = run.idp.issuers["internal"]
    before = issuer.realm
    clients = dict(before.clients)
    clients["client-2"] = dataclasses.replace(clients["client-2"], token_life_s=8)
    issuer.realm = dataclasses.replace(before, clients=clients)
    run.gateway.apply(run.stage.config(orders={"leeway": 3600}))
    time.sleep(0.5)
    token = run.wallet.fresh("/orders")
    run.send("short", "/orders", token)
    began = time.monotonic()
    move(run, -600, idp_too=False)
    calls = run.idp.count("internal", "token", began)
    run.send("short", "/orders", token)
    run.require(run.idp.count("internal", "token", began) == calls, "not cached at all")
    time.sleep(3.5)
    run.send("short", "/orders", token)
    run.require(run.idp.count("internal", "token", began) == calls + 1, "handed out beyond its monotonic end")
    issuer.realm = before
    move(run, 0, idp_too=False)
    run.gateway.apply(run.stage.config())
    time.sleep(0.5)


def skewed(run: Run) -> None:
    run.gateway.apply(run.stage.config(orders={"leeway": 30}, reports={"leeway": 30}, second={"leeway": 30}))
    time.sleep(0.5)
    for skew in (25, -25):
        move(run, skew, idp_too=False)
        flow_good(run)
    move(run, 0, idp_too=False)
    run.gateway.apply(run.stage.config())
    time.sleep(0.5)


def flow_good(run: Run) -> None:
    """Without the kind `expired`, whose end lies inside the leeway."""
    run.traffic(
        run.rate, (("fresh", "/orders"), ("warm", "/reports"), ("forged", "/orders"), ("forward", "/orders"))
    )
    run.go(0.8).only("fresh", 200).only("warm", 200).only("forward", 200)
    run.quiet()


def step_back(run: Run) -> None:
    run.gateway.apply(run.stage.config(orders={"leeway": 300}, reports={"leeway": 300}))
    time.sleep(0.5)
    run.idp.misbehave("internal", "token", kinds.after(0.7))
    for step in (-60, 60):
        stepping = threading.Timer(0.3, lambda by=step: move(run, by, idp_too=False))
        stepping.start()
        began = time.monotonic()
        run.client.send_all([run.wallet.make("fresh", "/orders") for _ in range(10)])
        stepping.join()
        run.window(began).only("fresh", 200)
    move(run, 0, idp_too=False)
    run.gateway.apply(run.stage.config())
    run.idp.behave()
    time.sleep(0.5)


def far_future(run: Run) -> None:
    for year in (2038, 2040, 2106):
        away = int((year - 1970) * 365.2425 * DAY + 40 * DAY - time.time())
        move(run, away, idp_too=True)
        flow(run, 0.5)
    move(run, 0, idp_too=True)


def _row(number: str, fault: str, expected: str, action: Any, **options: Any) -> Row:
    return Row(
        id=f"FAULT-{number}",
        section=SECTION,
        fault=fault,
        expected=expected,
        action=action,
        mode="clock",
        upstream="exchanged tokens only",
        **options,
    )


ROWS = (
    _row("50", "wall clock 10 min ahead", "tokens past `exp` 401, cached ones too; right clock: 200", ahead),
    _row(
        "51",
        "wall clock 10 min behind",
        "`iat` in the future 401; no cached token beyond its monotonic end",
        behind,
    ),
    _row("52", "skew of 25 s, leeway 30", "200", skewed),
    _row("53", "clock stepped by 60 s during an exchange, both ways", "no hang; 200", step_back),
    _row("54", "the years 2038, 2040, 2106", "200", far_future),
)
