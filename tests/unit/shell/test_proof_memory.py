"""A proof is used once: in one thread, in many, and in another process."""

import fcntl
import hashlib
import os
import signal
from pathlib import Path

import pytest

from kong_token_exchange.core.dpop import PROOF_SKEW_S
from kong_token_exchange.errors import IssuerUnavailableError, ProofError, TokenExchangeError
from kong_token_exchange.shell.proof_memory import MAX_LIFETIME_S, WINDOW, SharedProofMemory
from tests.support.fakes import run_in_threads
from tests.support.minting import NOW


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()[:16]


def memory(**options: int) -> SharedProofMemory:
    return SharedProofMemory(now=NOW - 10, **options)


def refusal(
    proofs: SharedProofMemory, number: int, *, iat: float = NOW, now: float = NOW
) -> TokenExchangeError:
    with pytest.raises(TokenExchangeError) as caught:
        proofs.use(key(number), iat=iat, now=now)
    return caught.value


def test_a_proof_is_used_once() -> None:
    proofs = memory()

    proofs.use(key(1), iat=NOW, now=NOW)
    proofs.use(key(2), iat=NOW, now=NOW)

    error = refusal(proofs, 1)
    assert (ProofError, "dpop_replayed", 401) == (type(error), error.reason, error.status)
    assert "dpop_replayed" == refusal(proofs, 1, now=NOW + MAX_LIFETIME_S).reason


def test_it_is_remembered_for_as_long_as_any_configuration_takes_it() -> None:
    proofs = memory(slots=1)
    proofs.use(key(1), iat=NOW + 5, now=NOW)

    assert "dpop_replayed" == refusal(proofs, 1, now=NOW + 5 + MAX_LIFETIME_S).reason
    proofs.use(key(1), iat=NOW + 5, now=NOW + 12 + MAX_LIFETIME_S)


def test_of_threads_that_bring_one_proof_a_single_one_is_let_through() -> None:
    proofs = memory()

    results = run_in_threads(lambda: proofs.use(key(1), iat=NOW, now=NOW), 16)

    assert 1 == results.count(None)
    assert 15 == sum(isinstance(result, ProofError) for result in results)


def test_clm_30_processes_share_one_memory() -> None:
    proofs = memory()
    proofs.use(key(1), iat=NOW, now=NOW)

    child = os.fork()
    if child == 0:
        status = 9
        try:
            proofs.use(key(2), iat=NOW, now=NOW)
            proofs.use(key(1), iat=NOW, now=NOW)
        except ProofError:
            status = 0
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)

    assert 0 == os.waitstatus_to_exitcode(ended)
    assert "dpop_replayed" == refusal(proofs, 2).reason


def test_a_full_memory_takes_nothing_until_something_is_over() -> None:
    proofs = memory(slots=1)
    for number in range(WINDOW):
        proofs.use(key(number), iat=NOW, now=NOW)

    error = refusal(proofs, WINDOW)

    assert (IssuerUnavailableError, "dpop_memory_full", 503) == (type(error), error.reason, error.status)
    assert "dpop_replayed" == refusal(proofs, WINDOW - 1).reason
    proofs.use(key(WINDOW), iat=NOW + 400, now=NOW + 400)


def test_clm_30_a_clock_that_is_ahead_takes_no_proof_beyond_a_restart() -> None:
    before, after = SharedProofMemory(now=NOW - 100), SharedProofMemory(now=NOW + 1)
    before.use(key(1), iat=NOW + PROOF_SKEW_S, now=NOW)

    assert "dpop_memory_too_young" == refusal(after, 1, iat=NOW + PROOF_SKEW_S, now=NOW + 2).reason


@pytest.mark.parametrize(("iat", "known"), [(NOW - 11, False), (NOW - 5, False), (NOW - 4, True)])
def test_a_proof_from_before_the_memory_cannot_be_judged(iat: int, known: bool) -> None:
    proofs = memory()

    if known:
        proofs.use(key(1), iat=iat, now=NOW)
    else:
        assert ("dpop_memory_too_young", 503) == (refusal(proofs, 1, iat=iat).reason, 503)


def test_a_process_that_never_lets_go_of_the_lock_costs_milliseconds_and_a_503() -> None:
    proofs = memory()
    ready, hold = os.pipe()
    child = os.fork()
    if child == 0:
        fcntl.lockf(proofs._file, fcntl.LOCK_EX)
        os.write(hold, b"1")
        signal.pause()
        os._exit(9)
    try:
        assert b"1" == os.read(ready, 1)
        assert "dpop_memory_busy" == refusal(proofs, 1).reason
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(hold)
    proofs.use(key(1), iat=NOW, now=NOW)


def test_what_is_forgotten_gives_its_memory_back() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))

    for _ in range(20):
        memory()

    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
