"""Who acts for the subject: chains of `act`, `may_act`, and the actor that a result names."""

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kong_token_exchange.core.claims import Claims, parse_claims
from kong_token_exchange.core.delegation import check_actors, is_actor, may_act
from kong_token_exchange.errors import ClaimError
from tests.support.minting import FakeIssuer

issuer, other = FakeIssuer("https://idp.test"), FakeIssuer("https://other.test")


def claims(of: FakeIssuer = issuer, **changes: Any) -> Claims:
    return parse_claims(of.claims(**changes))


AGENT = claims(sub="agent", azp="agent-client", email="agent@idp.test", level=3, admin=True)


def chain(depth: int, innermost: object = None) -> Any:
    act: Any = {"sub": "a0"} if innermost is None else innermost
    for number in range(1, depth):
        act = {"sub": f"a{number}", "act": act}
    return act


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_clm_28_a_chain_within_the_bound_passes(depth: int) -> None:
    check_actors(claims(act=chain(depth)), max_depth=3)


def test_a_token_without_an_actor_passes() -> None:
    check_actors(claims(), max_depth=1)


@pytest.mark.parametrize("depth", [4, 5, 20])
def test_clm_28_a_longer_chain_is_refused(depth: int) -> None:
    with pytest.raises(ClaimError) as caught:
        check_actors(claims(act=chain(depth)), max_depth=3)

    assert ("jwt_claim", "act", 4) == (caught.value.reason, caught.value.claim, caught.value.facts["depth"])


MALFORMED: dict[str, object] = {
    "null": None,
    "text": "agent",
    "list": [{"sub": "agent"}],
    "true": True,
    "empty": {},
    "sub-is-a-number": {"sub": 1},
    "sub-is-empty": {"sub": ""},
    "sub-is-null": {"sub": None},
    "sub-has-a-line-break": {"sub": "a\nb"},
    "sub-is-endless": {"sub": "a" * 2000},
    "iss-is-a-list": {"sub": "agent", "iss": ["https://idp.test"]},
    "client-is-an-object": {"client_id": {}},
}


@pytest.mark.parametrize("act", MALFORMED.values(), ids=[f"CLM-28-act-{name}" for name in MALFORMED])
def test_a_malformed_actor_is_refused_at_any_depth(act: object) -> None:
    for changed in (act, {"sub": "agent", "act": act}):
        with pytest.raises(ClaimError) as caught:
            check_actors(claims(act=changed), max_depth=3)

        assert "act" == caught.value.claim


PERMITTED: dict[str, dict[str, Any]] = {
    "sub": {"sub": "agent"},
    "sub-and-issuer": {"sub": "agent", "iss": "https://idp.test"},
    "client-as-spelled": {"azp": "agent-client"},
    "client-spelled-otherwise": {"client_id": "agent-client"},
    "more-members": {"sub": "agent", "email": "agent@idp.test", "level": 3},
    "members-without-meaning": {"sub": "agent", "exp": 1, "nbf": 1, "aud": "nobody"},
}


@pytest.mark.parametrize("named", PERMITTED.values(), ids=PERMITTED)
def test_clm_28_whoever_is_named_may_act(named: dict[str, Any]) -> None:
    assert may_act(claims(may_act=named), AGENT)


NOT_PERMITTED: dict[str, object] = {
    "empty": {},
    "null": None,
    "text": "agent",
    "list": [{"sub": "agent"}],
    "another-sub": {"sub": "agent-2"},
    "sub-in-another-case": {"sub": "Agent"},
    "sub-is-a-list": {"sub": ["agent"]},
    "empty-sub": {"sub": ""},
    "another-issuer": {"sub": "agent", "iss": "https://other.test"},
    "issuer-alone": {"iss": "https://idp.test"},
    "members-without-meaning-alone": {"aud": "api"},
    "another-client": {"sub": "agent", "client_id": "other"},
    "claim-that-differs": {"sub": "agent", "email": "other@idp.test"},
    "claim-that-the-actor-lacks": {"sub": "agent", "role": "agent"},
    "claim-of-another-type": {"sub": "agent", "level": "3"},
    "flag": {"sub": "agent", "admin": True},
    "nothing-for-nothing": {"sub": "agent", "role": None},
}


@pytest.mark.parametrize(
    "named", NOT_PERMITTED.values(), ids=[f"CLM-28-may-act-{name}" for name in NOT_PERMITTED]
)
def test_nobody_else_may_act(named: object) -> None:
    assert not may_act(claims(may_act=named), AGENT)


def test_clm_28_without_the_claim_nobody_is_permitted() -> None:
    assert not may_act(claims(), AGENT)


def test_clm_28_a_sub_means_that_of_the_subject_tokens_issuer() -> None:
    namesake = claims(other, sub="agent", azp="agent-client")

    assert not may_act(claims(may_act={"sub": "agent"}), namesake)
    assert may_act(claims(may_act={"sub": "agent", "iss": "https://other.test"}), namesake)


SAME: dict[str, dict[str, Any]] = {
    "sub": {"sub": "agent"},
    "sub-and-issuer": {"sub": "agent", "iss": "https://idp.test"},
    "client": {"client_id": "agent-client"},
    "what-is-beside-it": {"sub": "agent", "email": "agent@directory.test"},
    "an-earlier-actor": {"sub": "agent", "act": {"sub": "earlier"}},
}


@pytest.mark.parametrize("act", SAME.values(), ids=SAME)
def test_a_result_names_the_actor(act: dict[str, Any]) -> None:
    assert is_actor(claims(act=act), AGENT)


OTHERS: dict[str, object] = {
    "another-sub": {"sub": "agent-2"},
    "another-issuer": {"sub": "agent", "iss": "https://other.test"},
    "another-client": {"sub": "agent", "client_id": "other"},
    "nobody": {"email": "agent@idp.test"},
    "issuer-alone": {"iss": "https://idp.test"},
    "empty": {},
    "text": "agent",
    "the-actor-inside": {"sub": "other", "act": {"sub": "agent"}},
}


@pytest.mark.parametrize("act", OTHERS.values(), ids=OTHERS)
def test_a_result_that_names_another_actor_is_told_apart(act: object) -> None:
    assert not is_actor(claims(act=act), AGENT)


def test_a_result_without_an_actor_names_nobody() -> None:
    assert not is_actor(claims(), AGENT)


# --- whatever is there ----------------------------------------------------------------

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just("agent")
)
NAMES = st.sampled_from(["iss", "sub", "client_id", "azp", "act", "aud", "exp", "email", "other"])
JSON: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(JSON)
def test_whatever_act_and_may_act_are_they_are_judged_within_the_tree(value: Any) -> None:
    subject = claims(act=value, may_act=value)
    with contextlib.suppress(ClaimError):
        check_actors(subject, max_depth=3)
        assert isinstance(value, dict)
        assert value

    if may_act(subject, AGENT):
        assert value.get("sub", "agent") == "agent"
        assert {"sub", "client_id", "azp"} & set(value)
    if is_actor(subject, AGENT):
        assert value.get("sub", "agent") == "agent"
        assert value.get("iss", "https://idp.test") == "https://idp.test"
