"""Sender-constrained tokens through the pipeline: nothing is exchanged, cached or shared without a proof."""

import threading
from typing import Any

import pytest

from kong_token_exchange.core.possession import Evidence
from kong_token_exchange.errors import (
    ExchangedTokenError,
    PossessionError,
    ProofError,
    TokenExchangeError,
)
from kong_token_exchange.flow import FlowResult
from kong_token_exchange.ports import NotInMemoryError
from tests.support.fakes import PATIENCE_S, run_in_threads, token_response
from tests.support.minting import NOW
from tests.support.proofs import METHOD, Holder
from tests.unit.protocol.test_certificate import DIGEST
from tests.unit.test_flow import Bench, config_with, partner, result_token, target

ORIGIN = "https://api.test:443"

holder, thief = Holder(), Holder(label="thief")
TOKEN = target.mint(aud="gateway", cnf=holder.cnf)
PLAIN = target.mint(aud="gateway")


def evidence(proof: str, **changes: Any) -> Evidence:
    members: dict[str, Any] = {
        "scheme": "dpop", "proof": proof, "method": METHOD, "path": "/orders", "origins": frozenset({ORIGIN})
    }  # fmt: skip
    return Evidence(**{**members, **changes})


def bench(mode: str = "optional", **changes: Any) -> Bench:
    return Bench(config_with({"proof_of_possession_dpop": mode, **changes}))


def refusal(made: Bench, token: str, brought: Evidence, *, within: float | None = 5.0) -> TokenExchangeError:
    with pytest.raises(TokenExchangeError) as caught:
        made.run(token, within=within, evidence=brought)
    return caught.value


@pytest.mark.parametrize("mode", ["optional", "strict"])
def test_a_proven_token_is_exchanged_for_a_bearer_token(mode: str) -> None:
    made = bench(mode)

    result = made.run(TOKEN, evidence=evidence(holder.prove(TOKEN)))

    assert ("exchange", "miss", 1) == (result.decision, result.cache, made.sender.count())


def test_clm_30_the_very_same_request_is_refused_once_its_answer_is_cached() -> None:
    made = bench()
    brought = evidence(holder.prove(TOKEN))
    made.run(TOKEN, evidence=brought)

    for within in (5.0, None):
        error = refusal(made, TOKEN, brought, within=within)
        assert (ProofError, "dpop_replayed") == (type(error), error.reason)
    assert ["exchange", "refuse", "refuse"] == [event.outcome for event in made.audit.events]
    assert 1 == made.sender.count()


def test_a_hit_uses_its_proof_up_and_another_proof_gets_another_hit() -> None:
    made = bench()
    made.run(TOKEN, evidence=evidence(holder.prove(TOKEN)))
    second, third = evidence(holder.prove(TOKEN)), evidence(holder.prove(TOKEN))

    assert "hit" == made.run(TOKEN, within=None, evidence=second).cache
    assert "dpop_replayed" == refusal(made, TOKEN, second, within=None).reason
    assert "hit" == made.run(TOKEN, within=None, evidence=third).cache


def test_being_sent_to_the_pool_does_not_use_a_proof_up() -> None:
    made = bench()
    brought = evidence(holder.prove(TOKEN))

    with pytest.raises(NotInMemoryError):
        made.run(TOKEN, within=None, evidence=brought)

    assert "miss" == made.run(TOKEN, evidence=brought).cache


def test_clm_30_of_requests_with_one_proof_a_single_one_gets_an_answer() -> None:
    made = bench()
    brought = evidence(holder.prove(TOKEN))

    results = run_in_threads(lambda: made.run(TOKEN, evidence=brought), 8)

    assert 1 == sum(isinstance(result, FlowResult) for result in results)
    assert {"dpop_replayed"} == {result.reason for result in results if isinstance(result, ProofError)}
    assert 1 == made.sender.count()


def test_nobody_without_a_proof_joins_an_exchange_under_way() -> None:
    made = bench()
    results: list[FlowResult] = []
    first = threading.Thread(
        target=lambda: results.append(made.run(TOKEN, evidence=evidence(holder.prove(TOKEN)))), daemon=True
    )
    with made.sender.held() as hold:
        first.start()
        assert hold.entered.wait(PATIENCE_S)
        error = refusal(made, TOKEN, evidence(thief.prove(TOKEN)))
    first.join(PATIENCE_S)

    assert "dpop_key_differs" == error.reason
    assert ["miss"] == [result.cache for result in results]


BROUGHT: dict[str, tuple[Evidence, str]] = {
    "bearer": (Evidence(scheme="bearer", proof=holder.prove(TOKEN)), "scheme_not_for_this_token"),
    "no-proof": (evidence(""), "dpop_missing"),
    "two-proofs": (evidence(", ".join((holder.prove(TOKEN), holder.prove(TOKEN)))), "dpop_repeated"),
    "another-key": (evidence(thief.prove(TOKEN)), "dpop_key_differs"),
    "another-token": (evidence(holder.prove(PLAIN)), "dpop_claim"),
    "another-method": (evidence(holder.prove(TOKEN), method="POST"), "dpop_claim"),
    "another-path": (evidence(holder.prove(TOKEN), path="/invoices"), "dpop_claim"),
    "another-host": (evidence(holder.prove(TOKEN), origins=frozenset({"https://b.test:443"})), "dpop_claim"),
    "old": (evidence(holder.prove(TOKEN, iat=NOW - 300)), "dpop_claim"),
}


@pytest.mark.parametrize("mode", ["optional", "strict"])
@pytest.mark.parametrize("cached", [False, True], ids=["fresh", "cached"])
@pytest.mark.parametrize(("brought", "reason"), BROUGHT.values(), ids=BROUGHT)
def test_clm_27_31_a_bound_token_without_its_proof_is_refused_cached_or_not(
    brought: Evidence, reason: str, cached: bool, mode: str
) -> None:
    made = bench(mode)
    if cached:
        made.run(TOKEN, evidence=evidence(holder.prove(TOKEN)))

    for within in (5.0, None):
        error = refusal(made, TOKEN, brought, within=within)
        assert (reason, 401) == (error.reason, error.status)
    assert int(cached) == made.sender.count()
    told = f"{made.audit.events}{made.metrics.counts}"
    assert not [part for part in brought.proof.split(".") if part and part in told]


def test_an_unbound_token_is_a_bearer_token_where_proofs_are_optional() -> None:
    assert "miss" == bench().run(PLAIN).cache
    error = refusal(bench(), PLAIN, evidence(holder.prove(PLAIN)))
    assert (PossessionError, "scheme_not_for_this_token") == (type(error), error.reason)


@pytest.mark.parametrize("token", [PLAIN, partner.mint()], ids=["target", "foreign"])
def test_strict_takes_no_unbound_token(token: str) -> None:
    made = bench("strict")

    assert "token_not_bound" == refusal(made, token, Evidence()).reason
    assert "token_not_bound" == refusal(made, token, evidence(holder.prove(token))).reason
    assert 0 == made.sender.count()


def test_a_proof_is_looked_at_only_once_the_token_is_proven() -> None:
    forged = TOKEN[:-4] + ("AAAA" if TOKEN[-4:] != "AAAA" else "BBBB")

    assert "jwt_signature" == refusal(bench(), forged, evidence("not-a-proof")).reason


def test_a_token_that_is_forwarded_is_proven_too() -> None:
    token = target.mint(aud="api", cnf=holder.cnf)
    made = bench()
    brought = evidence(holder.prove(token))

    assert "forward" == made.run(token, within=None, evidence=brought).decision
    assert "dpop_replayed" == refusal(made, token, brought, within=None).reason


def test_exc_21_a_result_that_is_bound_stays_refused() -> None:
    made = Bench(
        config_with({"proof_of_possession_dpop": "optional"}),
        token_response(result_token(cnf=holder.cnf)),
    )

    error = refusal(made, TOKEN, evidence(holder.prove(TOKEN)))

    assert (ExchangedTokenError, "result_jwt_claim") == (type(error), error.reason)


def test_the_configured_lifetime_counts() -> None:
    made = bench(dpop_proof_lifetime=30)

    assert made.run(TOKEN, evidence=evidence(holder.prove(TOKEN, iat=NOW - 29)))
    assert "dpop_claim" == refusal(made, TOKEN, evidence(holder.prove(TOKEN, iat=NOW - 30))).reason


def test_clm_27_nothing_is_proven_where_nothing_is_configured() -> None:
    made = Bench()

    assert "jwt_claim" == refusal(made, TOKEN, evidence(holder.prove(TOKEN))).reason
    assert "miss" == made.run(PLAIN).cache


# --- certificates ---------------------------------------------------------------------

CERTIFIED = target.mint(aud="gateway", cnf={"x5t#S256": DIGEST})


def by_certificate(mode: str = "optional", **changes: Any) -> Bench:
    return Bench(config_with({"proof_of_possession_mtls": mode, **changes}))


def test_a_token_comes_with_the_certificate_that_it_is_bound_to() -> None:
    made = by_certificate("strict")

    assert "miss" == made.run(CERTIFIED, evidence=Evidence(x5t_s256=DIGEST)).cache
    # A certificate is no proof of a single request: the same one counts each time.
    assert "hit" == made.run(CERTIFIED, within=None, evidence=Evidence(x5t_s256=DIGEST)).cache


@pytest.mark.parametrize("cached", [False, True], ids=["fresh", "cached"])
@pytest.mark.parametrize(
    ("x5t_s256", "reason"), [(None, "certificate_missing"), ("A" * 43, "certificate_differs")]
)
def test_clm_27_a_stolen_token_is_refused_cached_or_not(
    x5t_s256: str | None, reason: str, cached: bool
) -> None:
    made = by_certificate()
    if cached:
        made.run(CERTIFIED, evidence=Evidence(x5t_s256=DIGEST))

    for within in (5.0, None):
        error = refusal(made, CERTIFIED, Evidence(x5t_s256=x5t_s256), within=within)
        assert (PossessionError, reason, 401) == (type(error), error.reason, error.status)
    assert int(cached) == made.sender.count()


def test_strict_takes_no_token_without_a_certificate() -> None:
    assert "token_not_bound" == refusal(by_certificate("strict"), PLAIN, Evidence(x5t_s256=DIGEST)).reason
    assert "miss" == by_certificate().run(PLAIN).cache


def test_a_token_that_is_bound_to_both_needs_both() -> None:
    token = target.mint(aud="gateway", cnf={**holder.cnf, "x5t#S256": DIGEST})
    made = by_certificate(proof_of_possession_dpop="optional")

    for brought, reason in (
        (Evidence(x5t_s256=DIGEST), "scheme_not_for_this_token"),
        (evidence(holder.prove(token)), "certificate_missing"),
        (evidence("", x5t_s256=DIGEST), "dpop_missing"),
    ):
        assert reason == refusal(made, token, brought).reason
    assert made.run(token, evidence=evidence(holder.prove(token), x5t_s256=DIGEST))


def test_the_audit_says_what_was_proven() -> None:
    made = by_certificate(proof_of_possession_dpop="optional")
    both = target.mint(aud="gateway", cnf={**holder.cnf, "x5t#S256": DIGEST})
    made.run(PLAIN)
    made.run(CERTIFIED, evidence=Evidence(x5t_s256=DIGEST))
    made.run(both, evidence=evidence(holder.prove(both), x5t_s256=DIGEST))

    assert [None, "x5t#S256", "jkt,x5t#S256"] == [event.facts.get("proven") for event in made.audit.events]
