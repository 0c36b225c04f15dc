"""CLM rows: what a verified token says, one change at a time from a good one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from kong_token_exchange.core.claims import (
    Claims,
    check_audience,
    check_bearer,
    check_client,
    check_issuer,
    check_required_claims,
    check_scopes_required,
    check_timestamps,
    check_type,
    forbidden_claim,
    meets_audience_required,
    parse_claims,
)
from kong_token_exchange.core.decision import trusted_issuer
from kong_token_exchange.core.strict_json import parse_json_object
from kong_token_exchange.errors import (
    AccessDeniedError,
    ClaimError,
    InsufficientScopeError,
    KeySelectionError,
    MalformedTokenError,
    SignatureError,
    TimestampError,
    UnknownIssuerError,
)
from kong_token_exchange.protocol.bearer import render
from tests.support.minting import ABSENT, NOW, FakeIssuer, to_json, with_member
from tests.unit.core.pipeline import accept, issuer, refused, stranger, trust

TIMES = ("exp", "nbf", "iat")
HEADER_BYTES = to_json(issuer.header())


def claims_of(**changes: Any) -> Claims:
    return parse_claims(issuer.claims(**changes))


def refused_claim(claim: str, action: Any, *args: Any, **kwargs: Any) -> None:
    error = refused(ClaimError, "jwt_claim", action, *args, **kwargs)
    assert isinstance(error, ClaimError)
    assert (claim, claim) == (error.claim, error.facts["claim"])


def refused_time(claim: str, action: Any, *args: Any, **kwargs: Any) -> None:
    error = refused(TimestampError, "jwt_timestamp", action, *args, **kwargs)
    assert isinstance(error, TimestampError)
    assert (claim, claim) == (error.claim, error.facts["claim"])


def accept_raw(name: str, raw: str) -> Claims:
    """Accept a token whose claim *name* is the JSON text *raw*."""
    return accept(issuer.craft(HEADER_BYTES, with_member(issuer.claims(**{name: ABSENT}), name, raw)))


def test_good_claims_are_read() -> None:
    claims = accept(issuer.mint(nbf=NOW - 1, aud=["api", "other"]))

    assert claims == Claims(
        iss="https://idp.test",
        sub="user-1",
        aud=("api", "other"),
        exp=NOW + 300,
        nbf=NOW - 1,
        iat=NOW,
        client="client-1",
        scopes=frozenset({"openid", "read"}),
        sender_constrained=False,
        members=claims.members,
    )
    assert "jti" in claims.members
    assert "members" not in repr(claims)


# --- times ----------------------------------------------------------------------------


def test_clm_01_exp_is_required_and_the_other_times_are_not() -> None:
    refused_claim("exp", accept, issuer.mint(exp=ABSENT))
    claims = accept(issuer.mint(iat=ABSENT, nbf=ABSENT))
    assert (claims.iat, claims.nbf) == (None, None)


BAD_TIMES = {
    "CLM-02-number-as-text": '"1800000300"',
    "CLM-02-blanks-around": '" 1800000300 "',
    "CLM-02-underscore": '"1_800_000_300"',
    "CLM-02-full-width-digits": '"\uff11\uff18\uff10\uff10\uff10\uff10\uff10\uff13\uff10\uff10"',
    "CLM-02-date": '"2027-01-15T08:00:00Z"',
    "CLM-02-empty": '""',
    "CLM-03-true": "true",
    "CLM-03-false": "false",
    "CLM-05-30-digits": "9" * 30,
    "CLM-05-400-digits": "9" * 400,
    "CLM-05-4300-digits": "9" * 4300,
    "CLM-05-2-to-53": str(2**53),
    "CLM-05-1e300": "1e300",
    "CLM-06-negative": "-1",
    "CLM-06-very-negative": "-" + "9" * 400,
    "CLM-06-zero": "0",
    "CLM-06-minus-zero": "-0",
    "CLM-06-float-zero": "0.0",
    "CLM-07-null": "null",
    "CLM-07-list": "[]",
    "CLM-07-list-of-one": "[1800000300]",
    "CLM-07-object": "{}",
}


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("raw", [pytest.param(raw, id=row) for row, raw in BAD_TIMES.items()])
def test_time_that_is_no_sensible_number_is_refused(name: str, raw: str) -> None:
    refused_claim(name, accept_raw, name, raw)


NO_JSON_TIMES = {
    "CLM-05-5000-digits": "9" * 5000,
    "CLM-07-nan": "NaN",
    "CLM-07-infinity": "Infinity",
    "CLM-07-minus-infinity": "-Infinity",
    "CLM-07-1e400": "1e400",
    "CLM-07-minus-1e400": "-1e400",
    "CLM-07-hex": "0x6B49D200",
    "CLM-07-leading-zero": "01800000300",
    "CLM-07-plus": "+1800000300",
}


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("raw", [pytest.param(raw, id=row) for row, raw in NO_JSON_TIMES.items()])
def test_time_that_is_no_json_number_is_refused(name: str, raw: str) -> None:
    refused(MalformedTokenError, "jws_payload", accept_raw, name, raw)


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize(
    "value",
    [pytest.param(v, id=f"CLM-07-{v!r}") for v in (float("nan"), float("inf"), float("-inf"), 10**400)],
)
def test_claims_refuse_such_times_without_the_json_reader_too(name: str, value: float) -> None:
    refused_claim(name, claims_of, **{name: value})


def test_clm_04_fractions_of_seconds_are_read() -> None:
    claims = accept_raw("exp", "1800000000.5")
    assert claims.exp == 1800000000.5
    assert accept_raw("exp", "1.8000003e9").exp == NOW + 300
    check_timestamps(claims, now=NOW + 0.4, leeway=0)
    refused_time("exp", check_timestamps, claims, now=NOW + 0.5, leeway=0)


def test_clm_05_largest_time_is_read() -> None:
    assert accept(issuer.mint(exp=2**53 - 1)).exp == 2**53 - 1


@pytest.mark.parametrize("leeway", [0, 1, 30.5])
def test_clm_08_token_expires_at_exp_and_not_a_moment_later(leeway: float) -> None:
    claims = claims_of(exp=NOW, iat=ABSENT)
    end = NOW + leeway

    check_timestamps(claims, now=end - 1, leeway=leeway)
    check_timestamps(claims, now=end - 0.001, leeway=leeway)
    refused_time("exp", check_timestamps, claims, now=end, leeway=leeway)
    refused_time("exp", check_timestamps, claims, now=end + 1, leeway=leeway)


@pytest.mark.parametrize(
    ("exp", "good"),
    [
        pytest.param(NOW - 1, False, id="CLM-08-invalid-expired-exp"),
        pytest.param(NOW, False, id="CLM-08-exp-now"),
        pytest.param(NOW + 1, True, id="CLM-08-exp-next-second"),
    ],
)
def test_border_of_exp(exp: int, good: bool) -> None:
    if good:
        assert accept(issuer.mint(exp=exp, iat=ABSENT)).exp == exp
    else:
        refused_time("exp", accept, issuer.mint(exp=exp, iat=ABSENT))
        assert accept(issuer.mint(exp=exp, iat=ABSENT), leeway=2).exp == exp


@pytest.mark.parametrize("name", [pytest.param("nbf", id="CLM-09-nbf"), pytest.param("iat", id="CLM-10-iat")])
@pytest.mark.parametrize("leeway", [0, 1, 30.5])
def test_token_from_the_future_is_refused(name: str, leeway: float) -> None:
    claims = claims_of(**{name: NOW})
    start = NOW - leeway

    check_timestamps(claims, now=start + 1, leeway=leeway)
    check_timestamps(claims, now=start, leeway=leeway)
    refused_time(name, check_timestamps, claims, now=start - 0.001, leeway=leeway)
    refused_time(name, check_timestamps, claims, now=start - 1, leeway=leeway)


@pytest.mark.parametrize("leeway", [0, 5])
def test_clm_11_old_token_is_refused_where_an_age_is_set(leeway: float) -> None:
    claims = claims_of(iat=NOW, exp=NOW + 10**6)
    oldest = NOW + 600 + leeway

    check_timestamps(claims, now=oldest - 1, leeway=leeway, max_age=600)
    check_timestamps(claims, now=oldest, leeway=leeway, max_age=600)
    refused_time("iat", check_timestamps, claims, now=oldest + 1, leeway=leeway, max_age=600)
    # iat-is-week-in-past: nothing against it where no age is set.
    check_timestamps(claims, now=NOW + 7 * 86400, leeway=leeway)


def test_clm_11_token_without_iat_is_refused_where_an_age_is_set() -> None:
    refused_time("iat", accept, issuer.mint(iat=ABSENT), entry=trust(max_age=600))
    assert accept(issuer.mint(), entry=trust(max_age=600)).iat == NOW
    refused_time("iat", accept, issuer.mint(iat=NOW - 1), entry=trust(max_age=0))


# --- issuer ---------------------------------------------------------------------------


def test_clm_12_token_without_iss_is_refused() -> None:
    refused(UnknownIssuerError, "issuer_unknown", accept, issuer.mint(iss=ABSENT))
    refused_claim("iss", claims_of, iss=ABSENT)


def test_clm_12_issuer_cannot_speak_for_another() -> None:
    other = FakeIssuer("https://other.test", label="stranger")
    entries = (trust(), trust(issuer=other.issuer))
    # The other configured issuer signs, with its own key, what our issuer would say.
    refused(KeySelectionError, "key_not_found", accept, other.mint(iss=issuer.issuer))
    kid = issuer.keys["RS256"].kid
    refused(SignatureError, "jwt_signature", accept, other.mint(iss=issuer.issuer, header={"kid": kid}))
    # Even with keys mixed up, the claims are held against the issuer whose key it was.
    assert trusted_issuer(other.issuer, issuers=entries, target=entries[0]) is entries[1]
    refused_claim("iss", check_issuer, claims_of(iss=other.issuer), expected=issuer.issuer)


NEAR_ISSUERS = {
    "CLM-13-slash": "https://idp.test/",
    "CLM-13-case-of-host": "https://IDP.test",
    "CLM-13-case-of-scheme": "HTTPS://idp.test",
    "CLM-13-port": "https://idp.test:443",
    "CLM-13-scheme": "http://idp.test",
    "CLM-13-trailing-dot": "https://idp.test.",
    "CLM-13-userinfo": "https://idp.test@thief.test",
    "CLM-13-user": "https://a@idp.test",
    "CLM-13-dot-segment": "https://idp.test/.",
    "CLM-13-query": "https://idp.test?",
    "CLM-13-fragment": "https://idp.test#",
    "CLM-13-blank-after": "https://idp.test ",
    "CLM-13-blank-before": " https://idp.test",
    "CLM-13-newline": "https://idp.test\n",
    "CLM-13-percent": "https://idp%2etest",
    "CLM-14-homoglyph": "https://\u0456dp.test",
    "CLM-14-punycode": "https://xn--dp-kkc.test",
    "CLM-14-nul": "https://idp.test\0",
    "CLM-14-zero-width": "https://idp\u200b.test",
    "CLM-14-full-width": "https://\uff49\uff44\uff50.test",
    "CLM-14-full-width-dot": "https://idp\uff0etest",
    "CLM-14-soft-hyphen": "https://i\u00addp.test",
    "CLM-14-direction": "\u202ehttps://idp.test",
    "CLM-15-list": ["https://idp.test"],
    "CLM-15-object": {"https://idp.test": 1},
    "CLM-15-number": 1,
    "CLM-15-true": True,
    "CLM-15-null": None,
    "CLM-15-empty-list": [],
    "CLM-16-empty": "",
    "CLM-16-prefix": "https://idp.tes",
    "CLM-16-longer": "https://idp.test.thief.test",
    "CLM-16-path": "https://idp.test/realm",
    "CLM-16-inside": "idp.test",
    "CLM-16-letter": "h",
}


@pytest.mark.parametrize("iss", [pytest.param(iss, id=row) for row, iss in NEAR_ISSUERS.items()])
def test_issuer_is_compared_exactly(iss: object) -> None:
    refused(UnknownIssuerError, "issuer_unknown", accept, issuer.mint(iss=iss))
    if isinstance(iss, str) and iss and iss.isprintable():
        refused_claim("iss", check_issuer, claims_of(iss=iss), expected=issuer.issuer)
    elif not isinstance(iss, str) or not iss:
        refused_claim("iss", claims_of, iss=iss)


# --- audience -------------------------------------------------------------------------

BAD_AUDIENCES = {
    "CLM-17-null": None,
    "CLM-17-empty": "",
    "CLM-17-empty-list": [],
    "CLM-17-empty-member": ["api", ""],
    "CLM-17-mixed": ["api", 1],
    "CLM-17-null-member": ["api", None],
    "CLM-17-true": True,
    "CLM-17-number": 1,
    "CLM-17-object": {"api": True},
    "CLM-18-nested": [["api"]],
    "CLM-18-nested-beside": ["api", ["api"]],
    "CLM-18-object-inside": [{"aud": "api"}],
    "CLM-18-line-break": "api\nother",
    "CLM-18-surrogate": ["\ud800"],
}


@pytest.mark.parametrize("aud", [pytest.param(aud, id=row) for row, aud in BAD_AUDIENCES.items()])
def test_audience_of_another_type_is_refused_whether_or_not_one_is_asked_for(aud: object) -> None:
    refused_claim("aud", claims_of, aud=aud)
    if aud != ["\ud800"]:
        refused_claim("aud", accept, issuer.mint(aud=aud))
        refused_claim("aud", accept, issuer.mint(aud=aud), entry=trust(audience=("api",)))


def test_clm_17_absent_audience_is_nobody_and_meets_no_requirement() -> None:
    claims = accept(issuer.mint(aud=ABSENT))

    assert claims.aud == ()
    refused_claim("aud", accept, issuer.mint(aud=ABSENT), entry=trust(audience=("api",)))
    assert not meets_audience_required(claims, alternatives=(frozenset({"api"}),))


@pytest.mark.parametrize(
    "aud",
    [
        pytest.param("billing", id="CLM-19-invalid-aud"),
        pytest.param(["billing", "mail"], id="CLM-19-others-in-a-list"),
        pytest.param("api2", id="CLM-20-longer"),
        pytest.param("ap", id="CLM-20-prefix"),
        pytest.param("my-api", id="CLM-20-suffix"),
        pytest.param("API", id="CLM-20-aud-case"),
        pytest.param("api ", id="CLM-20-blank"),
        pytest.param("api,billing", id="CLM-20-joined-by-comma"),
        pytest.param("api billing", id="CLM-20-joined-by-blank"),
        pytest.param(["api billing"], id="CLM-20-joined-in-a-list"),
        pytest.param("\uff41\uff50\uff49", id="CLM-20-full-width"),
        pytest.param("*", id="CLM-20-wildcard"),
    ],
)
def test_audience_is_compared_exactly(aud: object) -> None:
    refused_claim("aud", accept, issuer.mint(aud=aud), entry=trust(audience=("api", "gateway")))
    assert not meets_audience_required(claims_of(aud=aud), alternatives=(frozenset({"api"}),))


@pytest.mark.parametrize("aud", ["api", ["api"], ["billing", "api"], ["gateway"]])
def test_clm_19_any_accepted_audience_is_enough(aud: object) -> None:
    assert accept(issuer.mint(aud=aud), entry=trust(audience=("api", "gateway"))).aud
    check_audience(claims_of(aud="billing"), accepted=())


@pytest.mark.parametrize(
    ("alternatives", "met"),
    [
        ((), True),
        ((frozenset({"a"}),), True),
        ((frozenset({"a", "b"}),), True),
        ((frozenset({"a", "c"}),), False),
        ((frozenset({"c"}), frozenset({"b"})), True),
        ((frozenset({"c"}), frozenset({"a", "d"})), False),
        ((frozenset(),), False),
        ((frozenset(), frozenset({"a"})), True),
    ],
)
def test_required_values_mean_all_of_one_alternative_and_nothing_is_vacuously_true(
    alternatives: tuple[frozenset[str], ...],
    met: bool,
) -> None:
    assert met is meets_audience_required(claims_of(aud=["a", "b"]), alternatives=alternatives)
    with_scopes = claims_of(scope="a b")
    if met:
        check_scopes_required(with_scopes, alternatives=alternatives)
    else:
        with pytest.raises(InsufficientScopeError) as caught:
            check_scopes_required(with_scopes, alternatives=alternatives)
        assert ("scopes_required", 403) == (caught.value.reason, caught.value.status)


def test_challenge_names_the_scopes_of_the_first_alternative() -> None:
    with pytest.raises(InsufficientScopeError) as caught:
        check_scopes_required(claims_of(), alternatives=(frozenset({"write", "admin"}), frozenset({"x"})))
    assert render(caught.value).headers["WWW-Authenticate"] == (
        'Bearer realm="kong", error="insufficient_scope",'
        ' error_description="the token lacks a required scope", scope="admin write"'
    )


def test_audience_may_stand_elsewhere() -> None:
    token = issuer.mint(aud="billing", target={"services": ["api"]})
    path = ("target", "services")

    assert accept(token, audience_claim=path).aud == ("api",)
    assert accept(issuer.mint(target={"other": 1}), audience_claim=path).aud == ()
    assert accept(issuer.mint(), audience_claim=path).aud == ()
    for wrong in ("api", ["services"], None, 1, {"services": None}):
        refused_claim("aud", accept, issuer.mint(target=wrong), audience_claim=path)


# --- subject --------------------------------------------------------------------------

BAD_IDENTIFIERS: dict[str, Any] = {
    "CLM-21-empty": "",
    "CLM-21-null": None,
    "CLM-21-number": 1,
    "CLM-21-true": True,
    "CLM-21-list": ["user-1"],
    "CLM-21-object": {},
    "CLM-22-line-break": "user-1\r\nAdmin: yes",
    "CLM-22-newline": "user-1\n",
    "CLM-22-nul": "user-1\0",
    "CLM-22-tab": "user\t1",
    "CLM-22-escape": "\x1b[2J",
    "CLM-22-delete": "user\x7f",
    "CLM-22-c1-control": "user\x9b31m",
    "CLM-22-next-line": "user\x851",
    "CLM-22-line-separator": "user\u20281",
    "CLM-22-paragraph-separator": "user\u20291",
    "CLM-22-64-kb": "u" * 65536,
    "CLM-22-1025-characters": "u" * 1025,
}


@pytest.mark.parametrize("value", [pytest.param(value, id=row) for row, value in BAD_IDENTIFIERS.items()])
def test_identifier_that_is_no_printable_text_is_refused(value: object) -> None:
    refused_claim("sub", accept, issuer.mint(sub=value), max_token=10**6)
    refused_claim("iss", claims_of, iss=value)
    for member in ("azp", "client_id", "cid", "appid"):
        refused_claim(
            member, accept, issuer.mint(**dict[str, Any]({"azp": ABSENT, member: value})), max_token=10**6
        )


def test_clm_21_absent_subject_is_refused() -> None:
    refused_claim("sub", accept, issuer.mint(sub=ABSENT))


@pytest.mark.parametrize("sub", [chr(0xD800), "user" + chr(0xDCFF), chr(0xDFFF)])
def test_clm_22_lone_surrogates_are_refused(sub: str) -> None:
    refused_claim("sub", claims_of, sub=sub)
    refused(MalformedTokenError, "jws_payload", accept, issuer.mint(sub=sub))


@pytest.mark.parametrize(
    "sub", ["1", "ünïcode", "a b", "auth0|5f7c", "client@clients", "u" * 1023, "u" * 1024]
)
def test_clm_22_ordinary_subjects_are_accepted(sub: str) -> None:
    assert accept(issuer.mint(sub=sub)).sub == sub


# --- client ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "client"),
    [
        pytest.param({"azp": "c"}, "c", id="CLM-23-azp"),
        pytest.param({"azp": ABSENT, "client_id": "c"}, "c", id="CLM-23-client_id"),
        pytest.param({"azp": ABSENT, "cid": "c"}, "c", id="CLM-23-cid"),
        pytest.param({"azp": ABSENT, "appid": "c"}, "c", id="CLM-23-appid"),
        pytest.param({"azp": "c", "client_id": "d", "cid": "e", "appid": "f"}, "c", id="CLM-23-azp-first"),
        pytest.param({"azp": ABSENT, "appid": "d", "client_id": "c"}, "c", id="CLM-23-client_id-next"),
        pytest.param({"azp": ABSENT}, None, id="CLM-23-none"),
    ],
)
def test_client_is_read_and_allowed(members: Mapping[str, Any], client: str | None) -> None:
    token = issuer.mint(**members)

    assert accept(token).client == client
    for allowed in (("d",), ("C",), ("cc",), ("c d",)):
        error = refused(AccessDeniedError, "client_not_allowed", accept, token, entry=trust(clients=allowed))
        assert error.facts == {}
    if client is None:
        refused(AccessDeniedError, "client_not_allowed", accept, token, entry=trust(clients=("c",)))
    else:
        assert accept(token, entry=trust(clients=("x", "c"))).client == "c"


def test_clm_23_claim_of_another_type_does_not_hand_over_to_the_next_one() -> None:
    refused_claim("azp", accept, issuer.mint(azp=None, client_id="c"))
    refused_claim("azp", accept, issuer.mint(azp=["c"], client_id="c"))
    check_client(claims_of(azp=ABSENT), allowed=())


# --- scope ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "scopes"),
    [
        pytest.param("read", {"read"}, id="CLM-24-one"),
        pytest.param("read write", {"read", "write"}, id="CLM-24-text"),
        pytest.param("read read", {"read"}, id="CLM-24-repeated"),
        pytest.param(["read", "write"], {"read", "write"}, id="CLM-24-list"),
        pytest.param([], set(), id="CLM-24-empty-list"),
        pytest.param("", set(), id="CLM-24-empty"),
        pytest.param(ABSENT, set(), id="CLM-24-absent"),
        pytest.param("a\u00a0b", {"a\u00a0b"}, id="CLM-24-no-break-space-separates-nothing"),
        pytest.param("read,write", {"read,write"}, id="CLM-24-comma-separates-nothing"),
        pytest.param("READ", {"READ"}, id="CLM-24-case"),
    ],
)
def test_scopes_are_read(scope: object, scopes: set[str]) -> None:
    assert accept(issuer.mint(scope=scope)).scopes == scopes
    assert accept(issuer.mint(scope=ABSENT, scp=scope), scopes_claim=("scp",)).scopes == scopes


BAD_SCOPES = {
    "CLM-24-null": None,
    "CLM-24-true": True,
    "CLM-24-number": 1,
    "CLM-24-object": {"read": True},
    "CLM-24-two-blanks": "read  write",
    "CLM-24-blank-before": " read",
    "CLM-24-blank-after": "read ",
    "CLM-24-blank-alone": " ",
    "CLM-24-tab": "read\twrite",
    "CLM-24-newline": "read\nwrite",
    "CLM-24-nul": "read\0",
    "CLM-24-member-number": ["read", 1],
    "CLM-24-member-null": [None],
    "CLM-24-member-empty": ["read", ""],
    "CLM-24-member-with-blank": ["read write"],
    "CLM-24-member-list": [["read"]],
}


@pytest.mark.parametrize("scope", [pytest.param(scope, id=row) for row, scope in BAD_SCOPES.items()])
def test_scope_of_another_shape_is_refused(scope: object) -> None:
    refused_claim("scope", accept, issuer.mint(scope=scope))
    refused_claim("scope", accept, issuer.mint(scp=scope))
    refused_claim("scope", accept, issuer.mint(scope=ABSENT, scp=scope), scopes_claim=("scp",))


def test_clm_24_one_claim_is_configured_and_other_spellings_meet_no_requirement() -> None:
    token = issuer.mint(scope="read", scp=["read", "admin"])

    claims = accept(token)
    assert (set(claims.scopes), set(claims.other_scopes)) == ({"read"}, {"admin"})
    with pytest.raises(InsufficientScopeError):
        check_scopes_required(claims, alternatives=(frozenset({"admin"}),))
    claims = accept(token, scopes_claim=("scp",))
    assert (set(claims.scopes), set(claims.other_scopes)) == ({"read", "admin"}, set())
    claims = accept(issuer.mint(scope=ABSENT, scp="admin"))
    assert (set(claims.scopes), set(claims.other_scopes)) == (set(), {"admin"})


def test_clm_24_scopes_may_stand_elsewhere() -> None:
    path = ("realm_access", "roles")

    claims = accept(issuer.mint(realm_access={"roles": ["admin"]}), scopes_claim=path)
    assert (set(claims.scopes), set(claims.other_scopes)) == ({"admin"}, {"openid", "read"})
    for wrong in ("roles", ["roles"], None, {"roles": None}, {"roles": {"admin": 1}}):
        refused_claim("scope", accept, issuer.mint(realm_access=wrong), scopes_claim=path)


# --- what kind of token ---------------------------------------------------------------

OTHER_KINDS = {
    "CLM-26-keycloak-id": {"typ": "ID"},
    "CLM-26-keycloak-id-case": {"typ": "id"},
    "CLM-26-keycloak-serialized-id": {"typ": "Serialized-ID"},
    "CLM-26-keycloak-refresh": {"typ": "Refresh"},
    "CLM-26-keycloak-offline": {"typ": "Offline"},
    "CLM-26-keycloak-logout": {"typ": "Logout"},
    "CLM-26-keycloak-dpop": {"typ": "DPoP"},
    "CLM-26-keycloak-registration": {"typ": "RegistrationAccessToken"},
    "CLM-26-keycloak-initial-access": {"typ": "InitialAccessToken"},
    "CLM-26-typ-list": {"typ": ["ID"]},
    "CLM-26-typ-empty-list": {"typ": []},
    "CLM-26-typ-object": {"typ": {}},
    "CLM-26-typ-null": {"typ": None},
    "CLM-26-typ-true": {"typ": True},
    "CLM-26-cognito-id": {"token_use": "id"},
    "CLM-26-token-use-case": {"token_use": "Access"},
    "CLM-26-token-use-null": {"token_use": None},
    "CLM-26-token-use-list": {"token_use": ["access"]},
    "CLM-26-token-use-object": {"token_use": {}},
    "CLM-26-at_hash": {"at_hash": "77QmUPtjPfzWtF2AnpK9RQ"},
    "CLM-26-c_hash": {"c_hash": "LDktKdoQak3Pk0cnXxCltA"},
    "CLM-26-hash-null": {"at_hash": None},
    "CLM-26-logout-events": {"events": {"http://schemas.openid.net/event/backchannel-logout": {}}},
}


@pytest.mark.parametrize("members", [pytest.param(members, id=row) for row, members in OTHER_KINDS.items()])
def test_token_that_says_it_is_no_access_token_is_refused(members: Mapping[str, Any]) -> None:
    refused_claim("token_use", accept, issuer.mint(**members))
    # Listing its header does not make an access token of it.
    listed = trust(typ=("at+jwt",))
    refused_claim("token_use", accept, issuer.mint(**members), entry=listed)


@pytest.mark.parametrize(
    "members",
    [
        pytest.param({"typ": "Bearer"}, id="CLM-26-keycloak-access"),
        pytest.param({"typ": "at+jwt"}, id="CLM-26-typ-at+jwt"),
        pytest.param({"typ": "my-own-word"}, id="CLM-26-typ-private"),
        pytest.param({"token_use": "access"}, id="CLM-26-cognito-access"),
        # Keycloak put it into access tokens until version 24.
        pytest.param({"nonce": "n-0S6_WzA2Mj"}, id="CLM-26-nonce"),
    ],
)
def test_access_token_that_says_so_is_accepted(members: Mapping[str, Any]) -> None:
    assert accept(issuer.mint(**members)).sub == "user-1"


@pytest.mark.parametrize(
    ("typ", "members", "good"),
    [
        pytest.param("JWT", {}, True, id="CLM-26-unmarked"),
        pytest.param(None, {}, True, id="CLM-26-without-typ"),
        pytest.param("JWT", {"typ": "ID", "at_hash": "x", "c_hash": "y"}, True, id="CLM-26-keycloak"),
        pytest.param("JWT", {"token_use": "id"}, True, id="CLM-26-cognito"),
        pytest.param("at+jwt", {}, False, id="CLM-26-access-by-header"),
        pytest.param("logout+jwt", {}, False, id="CLM-26-logout-by-header"),
        pytest.param("JWT", {"typ": "Bearer"}, False, id="CLM-26-access-by-payload"),
        pytest.param("JWT", {"typ": ["ID"]}, False, id="CLM-26-list"),
        pytest.param("JWT", {"token_use": "access"}, False, id="CLM-26-access-by-use"),
        pytest.param("JWT", {"events": {}}, False, id="CLM-26-logout-by-events"),
    ],
)
def test_id_token_is_accepted_only_where_one_is_declared(
    typ: str | None,
    members: Mapping[str, Any],
    good: bool,
) -> None:
    claims = claims_of(**members)
    if good:
        check_type(claims, typ=typ, accepted=(), id_token=True)
    else:
        with pytest.raises(ClaimError):
            check_type(claims, typ=typ, accepted=(), id_token=True)


@pytest.mark.parametrize(
    "cnf",
    [
        pytest.param(cnf, id=f"CLM-27-{cnf!r}")
        for cnf in (
            {"jkt": "0ZcOCORZNYy"},
            {"x5t#S256": "bwcK0esc3ACC"},
            {},
            [],
            "",
            "x",
            0,
            False,
            True,
            None,
        )
    ],
)
def test_sender_constrained_token_is_no_bearer_token(cnf: object) -> None:
    refused_claim("cnf", accept, issuer.mint(cnf=cnf))
    refused_claim("cnf", check_bearer, claims_of(cnf=cnf))


# --- the payload as a whole -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        pytest.param("exp", "1900000000", id="CLM-29-exp"),
        pytest.param("sub", '"admin"', id="CLM-29-sub"),
        pytest.param("sub", '"user-1"', id="CLM-29-same-value"),
        pytest.param("aud", '["api"]', id="CLM-29-aud"),
        pytest.param("iss", '"https://idp.test"', id="CLM-29-iss"),
        pytest.param("scope", '"admin"', id="CLM-29-scope"),
    ],
)
def test_claim_named_twice_is_refused(name: str, raw: str) -> None:
    last = with_member(issuer.claims(), name, raw)
    first = f'{{"{name}":{raw},'.encode() + to_json(issuer.claims())[1:]
    for payload in (first, last):
        error = refused(MalformedTokenError, "jws_payload", accept, issuer.craft(HEADER_BYTES, payload))
        assert error.facts == {"json": "duplicate_member"}


def test_clm_29_same_name_at_different_levels_is_no_duplicate() -> None:
    assert accept(issuer.mint(nested={"sub": "other", "aud": 1})).sub == "user-1"


@pytest.mark.parametrize("value", ["x", 0, False, [], {}, ""])
def test_required_claims_must_be_there(value: object) -> None:
    asked = trust(required_claims=("tenant", "sub"))

    assert accept(issuer.mint(tenant=value), entry=asked).sub == "user-1"
    refused_claim("tenant", accept, issuer.mint(), entry=asked)
    refused_claim("tenant", accept, issuer.mint(tenant=None), entry=asked)


NESTED = {
    "realm_access": {"roles": ["admin"], "none": None},
    "https://a.example/b": 1,
    "x.y": 2,
    "x": {"y": 3},
}


@pytest.mark.parametrize("name", ["realm_access.roles", "https://a.example/b", "x.y", "x"])
def test_a_required_claim_may_be_inside_an_object(name: str) -> None:
    check_required_claims(parse_claims(issuer.claims(**NESTED)), required=(name,))


@pytest.mark.parametrize(
    "name",
    ["realm_access.none", "realm_access.role", "realm_access.roles.admin", "sub.x", ".", "x.", ".x", "a..b"],
)
def test_a_required_claim_at_another_path_is_missed(name: str) -> None:
    with pytest.raises(ClaimError) as caught:
        check_required_claims(parse_claims(issuer.claims(**NESTED)), required=("sub", name))

    assert name == caught.value.claim


FORBIDDEN = ["realm_access.roles", "realm_access.none", "realm_access", "https://a.example/b", "x.y"]


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_forbidden_claim_is_found_whatever_its_value(name: str) -> None:
    assert name == forbidden_claim(parse_claims(issuer.claims(**NESTED)), forbidden=("absent", name))


def test_a_forbidden_claim_is_found_by_either_reading_of_its_name() -> None:
    for changes in ({"x.y": None}, {"x": {"y": None}}):
        assert "x.y" == forbidden_claim(parse_claims(issuer.claims(**changes)), forbidden=("x.y",))


@pytest.mark.parametrize("name", ["y", "realm_access.admin", "realm_access.roles.admin", "sub.x", "x.y.z"])
def test_a_claim_that_is_not_there_is_not_forbidden(name: str) -> None:
    assert forbidden_claim(parse_claims(issuer.claims(**NESTED)), forbidden=(name,)) is None


# --- tokens of the providers people use -----------------------------------------------

PROVIDERS: dict[str, dict[str, Any]] = {
    # Shapes only; every value is made up here.
    "keycloak": {
        "members": {
            "typ": "Bearer",
            "auth_time": NOW - 9,
            "acr": "1",
            "sid": "a-b-c",
            "realm_access": {"roles": ["offline_access"]},
            "resource_access": {"account": {"roles": ["view-profile"]}},
            "allowed-origins": ["*"],
            "email_verified": False,
            "preferred_username": "alice",
            "aud": ["api", "account"],
        },
        "header": {"typ": "JWT"},
    },
    "keycloak-service-account-without-audience": {
        "members": {"typ": "Bearer", "aud": ABSENT, "client_id": "client-1", "clientHost": "10.0.0.1"},
        "header": {"typ": "JWT"},
    },
    "entra-v1": {
        "members": {
            "azp": ABSENT,
            "appid": "client-1",
            "appidacr": "1",
            "scope": ABSENT,
            "scp": "User.Read Mail.Read",
            "aio": "E2Zg",
            "rh": "0.A",
            "uti": "u",
            "ver": "1.0",
            "nbf": NOW,
        },
        "header": {"typ": "JWT", "x5t": "x5t"},
    },
    "okta": {
        "members": {
            "azp": ABSENT,
            "cid": "client-1",
            "uid": "00u",
            "scope": ABSENT,
            "scp": ["openid", "read"],
            "ver": 1,
        },
        "header": {"typ": ABSENT},
    },
    "auth0": {
        "members": {
            "sub": "auth0|5f7c8ec7c33c6c004bbafe82",
            "aud": ["https://api.test", "https://tenant.test/userinfo"],
            "permissions": ["read:items"],
            "gty": "password",
        },
        "header": {"typ": "JWT"},
    },
    "auth0-machine": {
        "members": {"sub": "client-1@clients", "gty": "client-credentials", "scope": ABSENT},
        "header": {"typ": "JWT"},
    },
    "cognito": {
        "members": {
            "azp": ABSENT,
            "client_id": "client-1",
            "token_use": "access",
            "aud": ABSENT,
            "version": 2,
            "cognito:groups": ["a"],
        },
        "header": {"typ": ABSENT},
    },
}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_ordinary_access_tokens_of_common_providers_are_accepted(provider: str) -> None:
    shape = PROVIDERS[provider]
    claims = accept(issuer.mint(header=shape["header"], **shape["members"]))
    assert claims.client == "client-1"


def test_claims_are_frozen() -> None:
    with pytest.raises(AttributeError):
        claims_of().sub = "other"  # type: ignore[misc]
    assert replace(claims_of(), sub="other").sub == "other"


def test_parsed_payload_is_what_the_json_reader_gave() -> None:
    payload = to_json(stranger.claims())
    assert parse_claims(parse_json_object(payload, max_bytes=9999)).members == stranger.claims()
