"""
Properties on made-up input: nothing leaves the error tree, nothing is read two ways.

Seeded, so that a run repeats; `JWT-34` and `GW-02` are the rows behind the first half.
"""

import base64
import contextlib
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kong_token_exchange.core import claims as claims_module
from kong_token_exchange.core.cache_key import digest_fields
from kong_token_exchange.core.claims import Claims, parse_claims
from kong_token_exchange.core.decision import conditions_match, decide
from kong_token_exchange.core.jwk import key_fits_algorithm, parse_jwk_set, select_verification_key
from kong_token_exchange.core.jws import (
    ASYMMETRIC_ALGORITHMS,
    decode_base64url,
    parse_compact,
    verify_signature,
)
from kong_token_exchange.core.narrowing import check_same_subject, find_widening
from kong_token_exchange.core.policy import ClaimPair, Conditions, ResultPolicy
from kong_token_exchange.core.strict_json import JsonError, parse_json
from kong_token_exchange.errors import (
    InvalidTokenError,
    IssuerUnavailableError,
    MalformedRequestError,
    TokenExchangeError,
)
from kong_token_exchange.protocol.bearer import is_b64token, parse_authorization, parse_token
from tests.support.minting import NOW, b64, to_json
from tests.support.strategies import any_json, any_text, one_of_those_changed, spoilt
from tests.unit.core.pipeline import MAX_TOKEN, accept, issuer

seeded = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

# --- nothing leaves the error tree ----------------------------------------------------


def stays_within(
    kind: type[TokenExchangeError], action: Callable[..., object], *args: Any, **kwargs: Any
) -> None:
    with contextlib.suppress(kind):
        action(*args, **kwargs)


GOOD_TOKEN = issuer.mint(key="ES256")


@seeded
@given(
    st.one_of(any_text, spoilt(GOOD_TOKEN.encode()).map(lambda data: data.decode("utf-8", "surrogateescape")))
)
def test_any_text_is_a_token_or_refused(text: str) -> None:
    stays_within(InvalidTokenError, parse_compact, text, max_bytes=MAX_TOKEN)
    stays_within(InvalidTokenError, parse_compact, f"{text}.{text}.{text}", max_bytes=MAX_TOKEN)


@seeded
@given(
    st.one_of(st.binary(max_size=80), any_json.map(to_json), spoilt(to_json(issuer.header()))), st.booleans()
)
def test_any_bytes_are_a_header_or_payload_or_refused(data: bytes, as_header: bool) -> None:
    header, payload = (data, b"{}") if as_header else (b'{"alg":"ES256"}', data)
    stays_within(InvalidTokenError, parse_compact, f"{b64(header)}.{b64(payload)}.AA", max_bytes=MAX_TOKEN)


@seeded
@given(one_of_those_changed(issuer.header("ES256"), "crit", "jwk", "b64", "zip"))
def test_any_header_is_accepted_or_refused(header: dict[str, Any]) -> None:
    stays_within(
        InvalidTokenError, accept, issuer.craft(to_json(header), to_json(issuer.claims()), key="ES256")
    )


@seeded
@given(
    one_of_those_changed(
        issuer.claims(), "nbf", "scp", "client_id", "cid", "appid", "cnf", "typ", "token_use"
    )
)
def test_any_payload_is_accepted_or_refused(payload: dict[str, Any]) -> None:
    token = issuer.craft(to_json(issuer.header("ES256")), to_json(payload), key="ES256")
    stays_within(InvalidTokenError, accept, token)


@seeded
@given(
    one_of_those_changed(
        issuer.claims(), "nbf", "scp", "client_id", "cid", "appid", "cnf", "typ", "token_use", "events"
    ),
    st.lists(st.one_of(st.sampled_from(["aud", "scope", "nested"]), any_text), max_size=3),
)
def test_claims_of_any_object_are_read_and_judged_or_refused(
    payload: dict[str, Any], path: list[str]
) -> None:
    # Values that the JSON reader would have refused come in here too: nan, lone surrogates.
    try:
        claims = parse_claims(payload, audience_claim=path, scopes_claim=path)
    except InvalidTokenError:
        return
    judge(claims)
    with contextlib.suppress(InvalidTokenError):
        judge(parse_claims(payload))


def judge(claims: Claims) -> None:
    """Run every rule; each answers or raises one of ours."""
    known = frozenset({"api"})
    for rule, arguments in (
        (claims_module.check_timestamps, {"now": NOW, "leeway": 0, "max_age": 600}),
        (claims_module.check_issuer, {"expected": "x"}),
        (claims_module.check_audience, {"accepted": known}),
        (claims_module.check_client, {"allowed": known}),
        (claims_module.check_required_claims, {"required": ("a", "aud", "typ")}),
        (claims_module.check_type, {"typ": "JWT", "accepted": ()}),
        (claims_module.check_type, {"typ": None, "accepted": (), "id_token": True}),
        (claims_module.check_bearer, {}),
        (claims_module.check_scopes_required, {"alternatives": (known,)}),
        (claims_module.meets_audience_required, {"alternatives": (known,)}),
    ):
        stays_within(TokenExchangeError, rule, claims, **arguments)
    conditions = Conditions(has_audience=("api",), missing_scopes=("read",))
    conditions_match(claims, conditions)
    stays_within(TokenExchangeError, decide, claims, issuers=(), target_issuer="x")
    policy = ResultPolicy(
        allowed_scopes=known,
        allowed_audience=known,
        max_lifetime=60,
        same_subject=(ClaimPair(subject_claim="sub", result_claim="jti"),),
    )
    find_widening(policy, subject=claims, result=claims, answered_scopes=None, downscoping=True, now=NOW)
    with contextlib.suppress(TokenExchangeError):
        check_same_subject(policy, relation="cross_issuer", subject=claims, result=claims)


@seeded
@given(
    st.one_of(
        any_text,
        any_text.map(lambda text: f"Bearer {text}"),
        st.binary().map(lambda b: b.decode("utf-8", "surrogateescape")),
    )
)
def test_any_header_value_is_a_credential_none_or_refused(value: str) -> None:
    for read in (parse_authorization, parse_token):
        try:
            token = read(value, max_length=40)
        except MalformedRequestError:
            continue
        assert token is None or (is_b64token(token) and token.isascii() and len(token) <= 40)


KEY_MEMBERS = ("kty", "kid", "alg", "use", "key_ops", "crv", "x", "y", "n", "e", "d", "k", "x5c")
any_key = st.one_of(
    *(
        one_of_those_changed(issuer.keys[alg].jwk(), *KEY_MEMBERS)
        for alg in ("RS256", "ES256", "ES512", "EdDSA")
    ),
    any_json,
)


@seeded
@given(st.one_of(st.binary(max_size=80), any_json.map(to_json), spoilt(issuer.jwks("ES256", "EdDSA"))))
def test_any_bytes_are_a_key_set_or_an_outage(body: bytes) -> None:
    stays_within(IssuerUnavailableError, parse_jwk_set, body)


@seeded
@given(st.lists(any_key, max_size=3), st.sampled_from(ASYMMETRIC_ALGORITHMS), st.one_of(st.none(), any_text))
def test_any_keys_are_used_or_dropped(members: list[Any], alg: str, kid: str | None) -> None:
    good = issuer.keys["PS256"].jwk(kid="good")
    try:
        jwks = parse_jwk_set(to_json({"keys": [*members, good]}))
    except IssuerUnavailableError:
        # Numbers that only Python writes, or a member named "good" as well.
        return
    assert len(jwks.keys) + len(jwks.dropped) == len(members) + 1
    stays_within(InvalidTokenError, select_verification_key, jwks, alg=alg, kid=kid)
    jws = parse_compact(GOOD_TOKEN, max_bytes=MAX_TOKEN)
    for key in jwks.keys:
        assert {key_fits_algorithm(key, name) for name in ("none", "HS256", "RS1", "")} == {False}
        stays_within(InvalidTokenError, verify_signature, jws, key, algorithms=ASYMMETRIC_ALGORITHMS)


# --- nothing is read two ways ---------------------------------------------------------


@seeded
@given(st.binary(max_size=40))
def test_base64url_has_one_spelling(data: bytes) -> None:
    text = base64.urlsafe_b64encode(data).rstrip(b"=").decode()
    assert decode_base64url(text) == data


@seeded
@given(st.one_of(st.text("ABCDwxyz0189-_=+/\n ", max_size=12), any_text))
def test_what_base64url_accepts_is_the_spelling_of_what_it_gives(text: str) -> None:
    try:
        data = decode_base64url(text)
    except InvalidTokenError:
        return
    assert b64(data) == text


def same(one: object, other: object) -> bool:
    """Compare with types, since True is 1 and 1 is 1.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@seeded
@given(
    st.one_of(
        st.binary(max_size=60), any_json.flatmap(lambda value: spoilt(to_json(value))), any_json.map(to_json)
    )
)
def test_strict_json_agrees_with_json_where_it_accepts(data: bytes) -> None:
    try:
        value = parse_json(data, max_bytes=10_000)
    except JsonError:
        return
    assert same(value, json.loads(data))
    # What is accepted can be written again as UTF-8, and means the same.
    assert same(parse_json(json.dumps(value, ensure_ascii=False).encode(), max_bytes=20_000), value)


def is_clean(value: object) -> bool:
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return isinstance(value, int) or math.isfinite(value)
    if isinstance(value, list):
        return all(map(is_clean, value))
    return not isinstance(value, dict) or all(
        is_clean(name) and is_clean(item) for name, item in value.items()
    )


@seeded
@given(any_json)
def test_strict_json_accepts_every_clean_value_and_no_other(value: object) -> None:
    data = to_json(value)
    if is_clean(value):
        assert same(parse_json(data, max_bytes=100_000), value)
    else:
        with pytest.raises(JsonError):
            parse_json(data, max_bytes=100_000)


field = st.one_of(st.none(), st.text("ab\0t", max_size=3), st.lists(st.text("ab\0t", max_size=2), max_size=3))
fields = st.lists(field, max_size=3)


@settings(seeded, max_examples=1000)
@given(fields, fields)
def test_digests_are_equal_only_for_equal_fields(one: list[Any], other: list[Any]) -> None:
    assert (digest_fields(one) == digest_fields(other)) is (one == other)


@seeded
@given(spoilt(GOOD_TOKEN.encode()))
def test_no_spoilt_token_is_accepted(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    if text == GOOD_TOKEN:
        return
    with pytest.raises(InvalidTokenError):
        accept(text)
