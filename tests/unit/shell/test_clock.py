"""The system clock: two clocks, and only one of them may step back."""

import time

from kong_token_exchange.shell.clock import SystemClock


def test_the_two_clocks_are_the_systems() -> None:
    clock = SystemClock()

    assert time.time() - 1 <= clock.now() <= time.time() + 1
    assert clock.monotonic() <= clock.monotonic() <= time.monotonic()
