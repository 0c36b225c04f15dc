"""
Made-up key ids while the keys cannot be fetched: `python -m benchmarks.kid_spray [--seconds 10]`.

The token-exchange plugin in a server of its own, spoken to over its socket as Kong does. First good
tokens alone, then the key set's endpoint begins to fail and tokens of distinct made-up key ids come
beside them. Each of those must be answered 503, since the key may exist; the issuer must be asked at
most once for each cool-down; every good token must pass as before (FAULT-38, KEY-13).
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.arena import Arena, Contender, exchange_config, write_tokens
from benchmarks.native import NoCompilerError, Result
from kong_token_exchange.sandbox.demo import ISSUER_ADDRESS
from kong_token_exchange.sandbox.issuer import Issuer
from kong_token_exchange.sandbox.serving import Fault
from kong_token_exchange.shell.key_source import COOL_DOWN_S, JUST_FETCHED_S

GOOD_RATE, SPRAY_RATE = 200, 5000
_GOOD_TOKENS = 200
_SIGNATURE_BYTES = 256
# Events that may be under way at once, of each kind.
_SOCKETS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Spray:
    """What came of it."""

    before: Result
    during: Result
    spray: Result
    fetches: int
    allowed: int


def made_up_kids(path: Path, issuer: Issuer, count: int) -> Path:
    """Write *count* tokens of the issuer, each with a key id that nobody has, and no signature of anybody."""
    payload = issuer.mint(scopes=["add-client-2-as-audience"]).split(".")[1]
    rows = []
    for number in range(count):
        header = _b64(json.dumps({"alg": "RS256", "typ": "JWT", "kid": f"made-up-{number}"}).encode())
        signature = _b64(secrets.token_bytes(_SIGNATURE_BYTES))
        rows.append(("exit", f"Bearer {header}.{payload}.{signature}", "503"))
    return write_tokens(path, rows)


def measure(arena: Arena, *, seconds: float, rate: int = SPRAY_RATE) -> Spray:
    """
    Run it once.

    Raises:
        RuntimeError: an answer was not the one that is promised.
    """
    with arena.issuer() as (server, issuer):
        good_rows = [
            ("learn", f"Bearer {issuer.mint(scopes=['add-client-2-as-audience'], life_s=7200)}", "")
            for _ in range(_GOOD_TOKENS)
        ]
        good_file = write_tokens(arena.folder / "good", good_rows)
        spray_file = made_up_kids(arena.folder / "spray", issuer, int(rate * seconds) + rate)
        host, port = server.address
        good = Contender(
            name="good",
            server=arena.start("plugin", "--resolve", f"{ISSUER_ADDRESS}={host}:{port}"),
            tokens=good_file,
            plugin="token-exchange",
            config=json.dumps(exchange_config(issuer.issuer)),
            cold_events=2 * _GOOD_TOKENS,
        )
        paced = ("--rate", GOOD_RATE, "--sockets", _SOCKETS)
        # Also puts the key set past the second in which it counts as just fetched.
        before = arena.run(good, *paced, pinned=False, seconds=max(2 * JUST_FETCHED_S, seconds / 3))
        # The requests of the paths that a fetch takes, from here on.
        paths = (server.jwks_path("internal"), server.discovery_path("internal"))
        asked = [server.log.count(path) for path in paths]
        server.set_fault(paths[0], Fault(status=503))
        found: list[Result] = []
        errors: list[BaseException] = []
        bad = replace(good, tokens=spray_file, cold_events=0)

        def spray() -> None:
            try:
                found.append(
                    arena.run(bad, "--rate", rate, "--sockets", _SOCKETS, pinned=False, seconds=seconds)
                )
            except RuntimeError as error:
                errors.append(error)

        began = time.monotonic()
        thread = threading.Thread(target=spray)
        thread.start()
        during = arena.run(good, *paced, pinned=False, seconds=seconds)
        thread.join()
        took = time.monotonic() - began
        if errors:
            raise errors[0]
        fetches = max(server.log.count(path) - count for path, count in zip(paths, asked, strict=True))
        allowed = math.floor(took / COOL_DOWN_S) + 1
        return Spray(before=before, during=during, spray=found[0], fetches=fetches, allowed=allowed)


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit status says whether the issuer was spared."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kid_spray", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=int, default=SPRAY_RATE, help="made-up key ids a second")
    options = parser.parse_args(arguments)
    try:
        with Arena() as arena:
            found = measure(arena, seconds=options.seconds, rate=options.rate)
    except NoCompilerError as exc:
        print(exc, file=sys.stderr)
        return 2
    spray = found.spray
    print(
        f"{spray.exits:,} made-up key ids in {spray.seconds:.1f} s ({spray.events_per_s:,.0f} a second):"
        f" all 503, {spray.cpu_us_per_event:.0f} us of CPU each"
    )
    for name, result in (("before", found.before), ("during", found.during)):
        print(
            f"good tokens {name}: {result.events:,} at {result.events_per_s:.0f} a second, all passed;"
            f" median {result.p50_us / 1000:.2f} ms, p99 {result.p99_us / 1000:.2f} ms"
        )
    print(f"the key set was asked for {found.fetches} times, allowed {found.allowed}")
    return 0 if found.fetches <= found.allowed else 1


if __name__ == "__main__":
    sys.exit(main())
