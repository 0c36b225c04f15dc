"""
Five thousand made-up key ids through the flow and the real key source, on a clock that the test moves.

The same through a server of its own, at 5,000 a second: `make soak`.
"""

from __future__ import annotations

from collections import Counter

import pytest

from kong_token_exchange.errors import IssuerUnavailableError, KeySelectionError, TokenExchangeError
from kong_token_exchange.ports import NotInMemoryError
from kong_token_exchange.protocol.http_message import HttpResponse
from kong_token_exchange.shell.key_source import COOL_DOWN_S, JUST_FETCHED_S, IssuerKeySource
from tests.support.fakes import FakeClock
from tests.unit.test_flow import TARGET, Bench, config_with, target

JWKS = f"{TARGET}/keys"
DOWN = IssuerUnavailableError(reason="connect_failed", facts={"host": "idp.test"})
GOOD_SET = HttpResponse(status=200, body=target.jwks())

TOKENS = 5000
# Seconds that the spray lasts: more than two cool-downs.
LASTS_S = 70.0
GOOD_EVERY = 50


class Spray:
    """A flow over a key source whose fetches end before the caller goes on."""

    def __init__(self, *later: HttpResponse | TokenExchangeError) -> None:
        bench = Bench(config_with({"jwks_endpoint": JWKS}))
        self.clock: FakeClock = bench.clock
        self.sender = bench.sender
        self.sender.script[JWKS] = [GOOD_SET, *later]
        self.flow = bench.flow
        # In the place of the fake: the real one, over the same sender.
        keys = IssuerKeySource(self.sender, self.clock, submit=lambda fetch: fetch())
        self.flow._keys = self.flow._verifier._keys = keys
        self.outcomes: Counter[str] = Counter()
        self.good = 0

    def send_good(self, number: int) -> None:
        token = target.mint(aud="gateway", jti=f"good-{number}", iat=self.now(), exp=self.now() + 300)
        assert self.run(token) == "exchange"
        self.good += 1

    def send_made_up(self, number: int) -> None:
        token = target.mint(key="EdDSA", header={"kid": f"made-up-{number}"})
        try:
            self.outcomes[self.run(token)] += 1
        except (IssuerUnavailableError, KeySelectionError) as error:
            self.outcomes[str(error.status)] += 1

    def run(self, token: str) -> str:
        """On the loop first, and in the pool where memory does not suffice."""
        try:
            return self.flow.run(token, deadline=None).decision
        except NotInMemoryError:
            return self.flow.run(token, deadline=self.clock.monotonic() + 5.0).decision

    def now(self) -> int:
        return int(self.clock.now())


@pytest.mark.parametrize(
    ("later", "told"),
    [(DOWN, "503"), (GOOD_SET, "401")],
    ids=["KEY-13-FAULT-38-keys-down", "KEY-12-FAULT-37-keys-up"],
)
def test_five_thousand_unknown_keys_cost_one_fetch_for_each_cool_down(
    later: HttpResponse | TokenExchangeError, told: str
) -> None:
    it = Spray(later)
    it.send_good(-1)
    it.clock.advance(JUST_FETCHED_S)
    assert 1 == it.sender.count(JWKS)

    for number in range(TOKENS):
        it.send_made_up(number)
        if number % GOOD_EVERY == 0:
            it.send_good(number)
        it.clock.advance(LASTS_S / TOKENS)

    cool_downs = int(LASTS_S // COOL_DOWN_S) + 1
    assert 1 + cool_downs == it.sender.count(JWKS)
    assert TOKENS // GOOD_EVERY + 1 == it.good
    # 401 as well in the second in which a set counts as just fetched.
    assert TOKENS == it.outcomes.total()
    assert {told} <= set(it.outcomes) <= {"401", told}
    assert it.outcomes[told] > TOKENS * 0.9
