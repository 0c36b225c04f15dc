"""The second level in the flow: asked on a first-level miss alone, and believed in nothing."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from kong_token_exchange.errors import IssuerUnavailableError, TokenExchangeError
from kong_token_exchange.flow import REUSE_MARGIN_S, Flow
from kong_token_exchange.ports import ExchangedToken, NotInMemoryError
from tests.support.fakes import error_response, form_of, token_response
from tests.support.minting import LIFETIME, NOW
from tests.unit.test_flow import CONFIG, ENDPOINT, Bench, config_with, forger, partner, result_token, target
from tests.unit.test_flow_refresh import SURE, Renewal


class FakeShared:
    """A dict that several flows share; keeps why something was not taken."""

    def __init__(self, refused_by: list[str] | None = None) -> None:
        self.entries: dict[bytes, bytes] = {}
        self.asked: list[bytes] = []
        self.refused: list[str] = []
        self.forgotten: list[bytes] = []

    def exchange_once(
        self,
        key: bytes,
        *,
        exchange: Callable[[], tuple[ExchangedToken, bytes]],
        prove: Callable[[bytes], ExchangedToken],
        deadline: float,
    ) -> tuple[ExchangedToken, bool]:
        self.asked.append(key)
        if key in self.entries:
            try:
                return prove(self.entries[key]), False
            except TokenExchangeError as error:
                self.refused.append(error.reason)
        exchanged, self.entries[key] = exchange()
        return exchanged, True

    def forget(self, key: bytes) -> None:
        self.forgotten.append(key)
        self.entries.pop(key, None)


class Node(Bench):
    """One process with a first level of its own."""

    def __init__(self, shared: FakeShared, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.flow = Flow(
            self.config,
            sender=self.sender,
            keys=self.keys,
            cache=self.cache,
            clock=self.clock,
            audit=self.audit,
            metrics=self.metrics,
            proofs=self.proofs,
            shared=shared,
        )


def tampered(shared: FakeShared, **members: Any) -> None:
    for key, data in shared.entries.items():
        shared.entries[key] = json.dumps({**json.loads(data), **members}).encode()


def test_cache_22_one_exchange_serves_two_nodes() -> None:
    shared = FakeShared()
    one, two = Node(shared), Node(shared)
    token = partner.mint()

    assert one.token(token) == two.token(token)
    assert (1, 0) == (one.sender.count(ENDPOINT), two.sender.count(ENDPOINT))
    assert ["exchange"] == [event.outcome for event in one.audit.events]
    assert [] == two.audit.events  # the exchange was made and told elsewhere


def test_the_first_level_answers_before_the_second_is_asked() -> None:
    shared = FakeShared()
    node = Node(shared)
    token = partner.mint()
    node.token(token)

    node.token(token)
    node.token(token, within=None)

    assert 1 == len(shared.asked)


def test_the_loop_never_asks_the_second_level() -> None:
    shared = FakeShared()
    node = Node(shared)

    with pytest.raises(NotInMemoryError):
        node.run(partner.mint(), within=None)

    assert [] == shared.asked


def test_cache_14_a_cache_that_is_off_asks_no_second_level() -> None:
    shared = FakeShared()
    node = Node(shared, config_with(cache={"enabled": False}))

    node.token(partner.mint())

    assert [] == shared.asked
    assert 1 == node.sender.count(ENDPOINT)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (forger.mint(aud="orders"), "result_key_not_found"),
        (forger.mint(aud="orders", header={"kid": "issuer-RS256"}), "result_jwt_signature"),
        (target.mint(iss="https://other.test"), "result_jwt_claim"),
        (target.mint(exp=NOW), "result_jwt_timestamp"),
        ("opaque", "result_token_opaque"),
        (target.mint(cnf={"jkt": "x"}), "result_jwt_claim"),
    ],
    ids=["unknown-key", "forged", "issuer", "expired", "opaque", "sender-constrained"],
)
def test_cache_19_what_is_found_is_proven_like_a_strangers_answer(result: str, reason: str) -> None:
    shared = FakeShared()
    token = partner.mint()
    Node(shared).token(token)
    tampered(shared, access_token=result)
    node = Node(shared)

    assert result_token() == node.token(token)
    assert 1 == node.sender.count(ENDPOINT)
    assert [reason] == shared.refused


def test_cache_19_another_subjects_result_is_not_taken() -> None:
    shared = FakeShared()
    raw = config_with(result={"same_subject": "sub"})
    token = partner.mint()
    Node(shared, raw).token(token)
    tampered(shared, access_token=result_token(sub="somebody-else"))
    node = Node(shared, raw)

    assert result_token() == node.token(token)
    assert ["subject_differs"] == shared.refused


def test_cache_19_a_result_wider_than_policy_is_not_taken_and_leaves_no_note() -> None:
    shared = FakeShared()
    raw = config_with(result={"allowed_scopes": ["openid", "read"], "same_subject": "sub"})
    token = partner.mint()
    Node(shared, raw).token(token)
    tampered(shared, access_token=result_token(scope="admin"))
    node = Node(shared, raw)

    assert result_token() == node.token(token)
    assert ["result_wider_than_policy"] == shared.refused
    assert "notes" not in node.audit.events[0].facts


def test_the_callers_own_token_is_not_taken_for_a_result() -> None:
    shared = FakeShared()
    token = partner.mint()
    Node(shared).token(token)
    tampered(shared, access_token=token)

    assert result_token() == Node(shared).token(token)
    assert ["subject_token_echoed"] == shared.refused


def test_cache_13_what_is_found_ends_when_it_would_have_ended_where_it_was_made() -> None:
    shared = FakeShared()
    token = partner.mint(exp=NOW + 10_000)
    answer = token_response(result_token(exp=NOW + 10_000), expires_in=LIFETIME)
    one, two = Node(shared, answer=answer), Node(shared, answer=answer)
    made = one.run(token).exchanged
    two.clock.advance(100)

    found = two.run(token).exchanged

    assert made is not None
    assert found is not None
    assert NOW + LIFETIME - REUSE_MARGIN_S == made.reuse_until == found.reuse_until
    assert two.clock.monotonic() + 200 - REUSE_MARGIN_S == found.reuse_until_monotonic


def test_cache_23_a_clock_that_is_ahead_elsewhere_lengthens_nothing() -> None:
    shared = FakeShared()
    token = partner.mint(exp=NOW + 10_000)
    answer = token_response(result_token(exp=NOW + 10_000), expires_in=LIFETIME)
    Node(shared, answer=answer).token(token)
    tampered(shared, sent_at=NOW + 5_000)

    found = Node(shared, answer=answer).run(token).exchanged

    assert found is not None
    assert NOW + LIFETIME - REUSE_MARGIN_S == found.reuse_until


def test_cache_13_limits_of_this_configuration_bound_what_is_found() -> None:
    shared = FakeShared()
    raw = config_with(cache={"ttl": 60})
    token = partner.mint()
    Node(shared, raw).token(token)
    tampered(shared, expires_in=86_400)

    found = Node(shared, raw).run(token).exchanged

    assert found is not None
    assert NOW + 60 - REUSE_MARGIN_S == found.reuse_until


def test_cache_24_what_the_issuer_takes_back_is_taken_back_from_everybody() -> None:
    shared = FakeShared()
    it = Renewal(error_response("invalid_grant"), token_response(result_token()))
    it.flow._shared = shared
    it.cache._exchanged.clear()
    it.sender.script[ENDPOINT] = [
        token_response(result_token(exp=NOW + 900)),
        error_response("invalid_grant"),
    ]
    it.sender._asked.clear()
    it.token(it.subject)
    assert 1 == len(shared.entries)

    it.clock.advance(SURE)
    it.hit()
    it.refresher.run()

    assert {"refused": 1} == it.renewals
    assert shared.asked == shared.forgotten
    assert "subject_token_refused" == it.refusal(it.subject).reason


@pytest.mark.parametrize(
    "answer", [IssuerUnavailableError(reason="unreachable"), token_response(result_token(jti="second"))]
)
def test_a_renewal_that_is_not_refused_leaves_what_is_shared(answer: Any) -> None:
    shared = FakeShared()
    it = Renewal(answer)
    it.flow._shared = shared

    it.clock.advance(SURE)
    it.hit()
    it.refresher.run()

    assert [] == shared.forgotten


def test_cache_01_11_configurations_that_differ_ask_under_other_keys() -> None:
    shared = FakeShared()
    token = partner.mint()
    for raw in (CONFIG, config_with({"client_id": ["other"]}), config_with(request={"audience": ["x"]})):
        Node(shared, raw).token(token)

    assert 3 == len(set(shared.asked))


def test_a_fault_of_the_issuer_is_told_as_without_a_second_level() -> None:
    shared = FakeShared()
    node = Node(shared, answer=IssuerUnavailableError(reason="unreachable"))

    assert "unreachable" == node.refusal(partner.mint()).reason
    assert {} == shared.entries


def test_nothing_of_an_answer_but_what_was_judged_is_shared() -> None:
    shared = FakeShared()
    node = Node(shared, answer=token_response(result_token(), refresh_token="MARKrefresh", id_token="MARKid"))
    token = partner.mint()

    node.token(token)

    (entry,) = shared.entries.values()
    assert b"MARK" not in entry
    assert token.encode() not in entry
    assert token == dict(form_of(node.sender.requests[0]))["subject_token"]
