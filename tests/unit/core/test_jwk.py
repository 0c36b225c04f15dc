"""KEY rows: what may stand in a key set, and which one key a token gets."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from kong_token_exchange.core.jwk import (
    MAX_KEYS,
    MAX_RSA_BITS,
    MAX_SET_BYTES,
    MIN_RSA_BITS,
    JwkSet,
    key_fits_algorithm,
    parse_jwk_set,
    select_verification_key,
)
from kong_token_exchange.errors import IssuerUnavailableError, KeySelectionError, SignatureError
from tests.support.minting import ABSENT, FakeIssuer, SigningKey, b64, b64_uint, private_key, to_json
from tests.unit.core.pipeline import accept, issuer, refused, stranger

RSA = issuer.keys["RS256"]
EC = issuer.keys["ES256"]
ED = issuer.keys["EdDSA"]


def key_set(*members: object) -> bytes:
    return to_json({"keys": list(members)})


def kept(*members: object) -> list[str | None]:
    return [key.kid for key in parse_jwk_set(key_set(*members)).keys]


def dropped_for(*members: object) -> tuple[str, ...]:
    """Return the reasons for which members are dropped from a set that also has a good key."""
    jwks = parse_jwk_set(key_set(*members, stranger.keys["EdDSA"].jwk()))
    assert [key.kid for key in jwks.keys] == ["stranger-EdDSA"]
    return jwks.dropped


def test_set_is_read_in_the_order_of_the_document() -> None:
    jwks = parse_jwk_set(issuer.jwks())

    assert [key.alg for key in jwks.keys] == ["RS256", "PS256", "ES256", "ES384", "ES512", "EdDSA"]
    assert [key.crv for key in jwks.keys] == [None, None, "P-256", "P-384", "P-521", "Ed25519"]
    assert jwks.dropped == ()
    assert len({key.fingerprint for key in jwks.keys}) == 6
    assert repr(jwks.keys[2]) == "Jwk(kty='EC', kid='issuer-ES256', alg='ES256', crv='P-256')"


# --- the document ---------------------------------------------------------------------

NO_SETS = {
    "KEY-20-html": b"<!doctype html><title>Sign in</title>",
    "KEY-20-empty": b"",
    "KEY-20-null": b"null",
    "KEY-20-list": b"[]",
    "KEY-20-text": b'"keys"',
    "KEY-20-object": b"{}",
    "KEY-20-keys-null": b'{"keys":null}',
    "KEY-20-keys-object": b'{"keys":{}}',
    "KEY-20-keys-text": b'{"keys":"RSA"}',
    "KEY-20-bom": b"\xef\xbb\xbf" + issuer.jwks(),
    "KEY-20-utf-16": issuer.jwks().decode().encode("utf-16"),
    "KEY-20-no-utf-8": b'{"keys":[],"x":"\xff"}',
    "KEY-20-cut": issuer.jwks()[:-1],
    "KEY-20-deep": b'{"keys":' + b"[" * 100_000,
    "KEY-20-deep-closed": b'{"keys":' + b"[" * 900 + b"]" * 900 + b"}",
    "KEY-20-nan": b'{"keys":[],"x":NaN}',
    "KEY-32-keys-twice": b'{"keys":[],' + issuer.jwks()[1:],
    "KEY-32-kid-twice": issuer.jwks().replace(b'"kid":', b'"kid":"other","kid":', 1),
    "KEY-32-n-twice": issuer.jwks().replace(b'"n":', b'"n":"AQAB","n":', 1),
}


@pytest.mark.parametrize("body", [pytest.param(body, id=row) for row, body in NO_SETS.items()])
def test_what_is_no_key_set_is_an_outage_and_no_verdict_on_a_token(body: bytes) -> None:
    refused(IssuerUnavailableError, "jwks_malformed", parse_jwk_set, body)


@pytest.mark.parametrize(
    "members",
    [
        pytest.param((), id="KEY-20-no-keys"),
        pytest.param((1, None, [], "x"), id="KEY-20-no-objects"),
        pytest.param(({"kty": "oct", "k": "AA"},), id="KEY-20-symmetric-only"),
    ],
)
def test_set_without_one_usable_key_is_an_outage(members: tuple[object, ...]) -> None:
    refused(IssuerUnavailableError, "jwks_without_usable_key", parse_jwk_set, key_set(*members))


@pytest.mark.parametrize(
    "count", [pytest.param(MAX_KEYS + d, id=f"KEY-31-keys-max{d:+}") for d in (-1, 0, 1)]
)
def test_number_of_keys_is_bounded(count: int) -> None:
    members = [ED.jwk(kid=f"k{number}") for number in range(count)]
    if count <= MAX_KEYS:
        assert len(kept(*members)) == count
    else:
        refused(IssuerUnavailableError, "jwks_malformed", parse_jwk_set, key_set(*members))


@pytest.mark.parametrize(
    "size", [pytest.param(MAX_SET_BYTES + d, id=f"KEY-31-size-max{d:+}") for d in (-1, 0, 1)]
)
def test_size_of_a_set_is_bounded(size: int) -> None:
    body = issuer.jwks().ljust(size)
    if size <= MAX_SET_BYTES:
        assert len(parse_jwk_set(body).keys) == 6
    else:
        refused(IssuerUnavailableError, "jwks_malformed", parse_jwk_set, body)


def test_key_31_twenty_thousand_keys_are_refused() -> None:
    body = key_set(*[{"kty": "oct"}] * 20_000)
    refused(IssuerUnavailableError, "jwks_malformed", parse_jwk_set, body)


# --- one key --------------------------------------------------------------------------


def rsa_member(modulus: int, exponent: int = 65537) -> dict[str, Any]:
    return {"kty": "RSA", "kid": "k", "n": b64_uint(modulus), "e": b64_uint(exponent)}


# Where 65537 does not generate every residue (Nemec et al., ACM CCS 2017).
TELLING_PRIMES = (11, 13, 17, 19, 37, 53, 61, 71, 73, 79, 97, 103, 107, 109, 127, 151, 157)


def roca_modulus(*, but_for: int | None = None) -> int:
    """Return a modulus of CVE-2017-15361: a power of 65537 modulo every small prime, *but_for* one."""
    product = 1
    for prime in (
        2,
        3,
        5,
        7,
        11,
        13,
        17,
        19,
        23,
        29,
        31,
        37,
        53,
        61,
        71,
        73,
        79,
        97,
        103,
        107,
        109,
        127,
        151,
        157,
    ):
        product *= prime
    residue = pow(65537, 12345, product)
    if but_for is not None:
        powers = {pow(65537, exponent, but_for) for exponent in range(but_for)}
        while residue % but_for in powers or residue % but_for == 0:
            residue += product // but_for
    return residue + product * (2**2047 // product + 1)


GOOD_N = int(private_key("RS256").public_key().public_numbers().n)  # type: ignore[union-attr]

DROPPED: dict[str, tuple[object, str]] = {
    "KEY-21-number": (1, "not_an_object"),
    "KEY-21-null": (None, "not_an_object"),
    "KEY-21-list": ([RSA.jwk()], "not_an_object"),
    "KEY-21-empty": ({}, "kty_unknown"),
    "KEY-21-kty-unknown": (RSA.jwk(kty="XYZ"), "kty_unknown"),
    "KEY-21-kty-case": (RSA.jwk(kty="rsa"), "kty_unknown"),
    "KEY-21-kty-number": (RSA.jwk(kty=1), "member_type"),
    "KEY-21-kty-list": (RSA.jwk(kty=["RSA"]), "member_type"),
    "KEY-21-kty-of-another": (RSA.jwk(kty="EC"), "curve"),
    "KEY-21-n-missing": (RSA.jwk(n=ABSENT), "malformed"),
    "KEY-21-n-number": (RSA.jwk(n=5), "malformed"),
    "KEY-21-n-list": (RSA.jwk(n=[RSA.jwk()["n"]]), "malformed"),
    "KEY-21-n-null": (RSA.jwk(n=None), "malformed"),
    "KEY-21-n-empty": (RSA.jwk(n=""), "malformed"),
    "KEY-21-e-missing": (RSA.jwk(e=ABSENT), "malformed"),
    "KEY-21-x-number": (ED.jwk(x=1), "malformed"),
    "KEY-21-x-short": (ED.jwk(x=b64(bytes(31))), "malformed"),
    "KEY-21-x-long": (ED.jwk(x=b64(bytes(33))), "malformed"),
    "KEY-21-alg-number": (RSA.jwk(alg=256), "member_type"),
    "KEY-21-alg-list": (RSA.jwk(alg=["RS256"]), "member_type"),
    "KEY-23-use-enc": (RSA.jwk(use="enc"), "use"),
    "KEY-23-use-case": (RSA.jwk(use="SIG"), "use"),
    "KEY-23-use-empty": (RSA.jwk(use=""), "member_type"),
    "KEY-23-use-list": (RSA.jwk(use=["sig"]), "member_type"),
    "KEY-23-key_ops-encrypt": (RSA.jwk(use=ABSENT, key_ops=["encrypt"]), "key_ops"),
    "KEY-23-key_ops-sign": (EC.jwk(use=ABSENT, key_ops=["sign"]), "key_ops"),
    "KEY-23-key_ops-empty": (RSA.jwk(key_ops=[]), "key_ops"),
    "KEY-23-key_ops-text": (RSA.jwk(key_ops="verify"), "key_ops"),
    "KEY-23-key_ops-object": (RSA.jwk(key_ops={"verify": True}), "key_ops"),
    "KEY-23-key_ops-nested": (RSA.jwk(key_ops=[["verify"]]), "key_ops"),
    "KEY-24-oct": ({"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}, "symmetric"),
    "KEY-24-oct-as-rs256": ({"kty": "oct", "k": "c2VjcmV0", "alg": "RS256", "kid": RSA.kid}, "symmetric"),
    "KEY-26-kid-number": (RSA.jwk(kid=1), "member_type"),
    "KEY-26-kid-empty": (RSA.jwk(kid=""), "member_type"),
    "KEY-26-kid-list": (RSA.jwk(kid=["a"]), "member_type"),
    "KEY-26-kid-object": (RSA.jwk(kid={}), "member_type"),
    "KEY-27-rsa-1024": (
        rsa_member(rsa.generate_private_key(65537, 1024).public_key().public_numbers().n),
        "rsa_size",
    ),
    "KEY-27-rsa-2047": (rsa_member(2 ** (MIN_RSA_BITS - 2) + 1), "rsa_size"),
    "KEY-27-rsa-8193": (rsa_member(2**MAX_RSA_BITS + 1), "rsa_size"),
    "KEY-27-rsa-16384": (rsa_member(2**16384 - 1), "rsa_size"),
    "KEY-27-rsa-a-million-bits": (rsa_member(2**1_000_000 - 1), "rsa_size"),
    "KEY-27-modulus-even": (rsa_member(GOOD_N + 1), "rsa_modulus"),
    "KEY-27-exponent-0": (rsa_member(GOOD_N, 0), "malformed"),
    "KEY-27-exponent-1": (rsa_member(GOOD_N, 1), "malformed"),
    "KEY-27-exponent-2": (rsa_member(GOOD_N, 2), "malformed"),
    "KEY-27-exponent-even": (rsa_member(GOOD_N, 65536), "malformed"),
    "KEY-27-exponent-65-bits": (rsa_member(GOOD_N, 2**64 + 1), "rsa_exponent"),
    "KEY-27-exponent-as-long-as-the-modulus": (rsa_member(GOOD_N, GOOD_N - 2), "rsa_exponent"),
    "KEY-27-roca": (rsa_member(roca_modulus()), "roca"),
    "KEY-28-rsa-d": (RSA.jwk(d="AQAB"), "private"),
    "KEY-28-rsa-p": (RSA.jwk(p="AQAB"), "private"),
    "KEY-28-rsa-oth": (RSA.jwk(oth=[]), "private"),
    "KEY-28-d-null": (RSA.jwk(d=None), "private"),
    "KEY-28-ec-d": (EC.jwk(d=b64(bytes(32))), "private"),
    "KEY-28-okp-d": (ED.jwk(d=b64(bytes(32))), "private"),
    "KEY-28-k": (RSA.jwk(k="c2VjcmV0"), "private"),
    "KEY-29-off-curve": (EC.jwk(y=EC.jwk()["x"]), "malformed"),
    "KEY-29-point-at-infinity": (EC.jwk(x=b64(bytes(32)), y=b64(bytes(32))), "malformed"),
    "KEY-29-x-short": (EC.jwk(x=b64(bytes(31))), "malformed"),
    "KEY-29-x-long": (EC.jwk(x=b64(bytes(33))), "malformed"),
    "KEY-29-y-missing": (EC.jwk(y=ABSENT), "malformed"),
    "KEY-29-other-curve": (EC.jwk(crv="P-384"), "malformed"),
    "KEY-29-crv-missing": (EC.jwk(crv=ABSENT), "curve"),
    "KEY-29-crv-case": (EC.jwk(crv="p-256"), "curve"),
    "KEY-29-crv-secp256k1": (EC.jwk(crv="secp256k1"), "curve"),
    "KEY-29-crv-list": (EC.jwk(crv=["P-256"]), "member_type"),
    "KEY-29-x25519": (ED.jwk(crv="X25519"), "curve"),
    "KEY-30-x5c-only": ({"kty": "RSA", "kid": "k", "x5c": ["MIIB"]}, "malformed"),
    "KEY-30-x5c-only-ec": ({"kty": "EC", "crv": "P-256", "kid": "k", "x5c": ["MIIB"]}, "malformed"),
    "KEY-30-x5u-only": ({"kty": "RSA", "kid": "k", "x5u": "https://thief.test"}, "malformed"),
}


@pytest.mark.parametrize(("member", "reason"), [pytest.param(*case, id=row) for row, case in DROPPED.items()])
def test_key_is_dropped_with_a_reason_and_spoils_no_other(member: object, reason: str) -> None:
    assert dropped_for(member) == (reason,)
    jwks = parse_jwk_set(issuer.jwks(extra=(member,)))
    assert (len(jwks.keys), jwks.dropped) == (6, (reason,))
    assert accept(issuer.mint(), jwks=issuer.jwks(extra=(member,))).sub == "user-1"


def test_key_27_borders_of_rsa_keys_are_kept() -> None:
    assert kept(rsa_member(2 ** (MIN_RSA_BITS - 1) + 1)) == ["k"]
    assert kept(rsa_member(2**MAX_RSA_BITS - 1)) == ["k"]
    assert kept(rsa_member(GOOD_N, 3)) == ["k"]
    assert kept(rsa_member(GOOD_N, 2**64 - 1)) == ["k"]


def test_key_27_and_key_31_bounds_are_those_that_were_decided() -> None:
    assert (MIN_RSA_BITS, MAX_RSA_BITS, MAX_KEYS, MAX_SET_BYTES) == (2048, 8192, 100, 256 * 1024)


@pytest.mark.parametrize("prime", [pytest.param(prime, id=f"KEY-27-{prime}") for prime in TELLING_PRIMES])
def test_modulus_that_is_no_power_modulo_one_prime_is_not_of_roca(prime: int) -> None:
    assert kept(rsa_member(roca_modulus(but_for=prime))) == ["k"]


def test_key_27_ordinary_moduli_have_not_the_shape_of_roca() -> None:
    # About one random modulus in 2**27 would: these fifty do not.
    moduli = [GOOD_N + 2 * step for step in range(50)]
    assert len([modulus for modulus in moduli if kept(rsa_member(modulus)) == ["k"]]) == 50


@pytest.mark.parametrize(
    "alg",
    [pytest.param(alg, id=f"KEY-22-{alg}") for alg in ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")],
)
def test_key_without_alg_takes_the_tokens(alg: str) -> None:
    key = SigningKey("k", alg, private_key("RS256"))

    assert accept(issuer.mint(key=key), jwks=key_set(key.jwk(alg=ABSENT))).sub == "user-1"
    refused(
        KeySelectionError,
        "key_not_found",
        accept,
        issuer.mint(key=key),
        jwks=key_set(key.jwk(alg="RSA-OAEP")),
    )


@pytest.mark.parametrize(
    "alg", [pytest.param(alg, id=f"KEY-22-{alg}") for alg in ("ES256", "ES384", "ES512", "EdDSA")]
)
def test_key_without_alg_is_bound_by_its_curve(alg: str) -> None:
    jwks = key_set(
        *[key.jwk(alg=ABSENT, kid="k") for key in issuer.keys.values() if key.alg[:2] in ("ES", "Ed")]
    )
    key = replace(issuer.keys[alg], kid="k")

    assert accept(issuer.mint(key=key), jwks=jwks).sub == "user-1"
    [fitting] = [jwk for jwk in parse_jwk_set(jwks).keys if key_fits_algorithm(jwk, alg)]
    assert not [other for other in issuer.keys if other != alg and key_fits_algorithm(fitting, other)]


@pytest.mark.parametrize(
    "member",
    [
        pytest.param(RSA.jwk(use=ABSENT), id="KEY-23-neither"),
        pytest.param(RSA.jwk(use=ABSENT, key_ops=["verify"]), id="KEY-23-key_ops"),
        pytest.param(RSA.jwk(key_ops=["sign", "verify"]), id="KEY-23-both"),
        pytest.param(RSA.jwk(use=None, key_ops=None), id="KEY-23-null"),
    ],
)
def test_key_for_signatures_is_kept(member: object) -> None:
    assert kept(member) == [RSA.kid]


# --- the same kid more than once ------------------------------------------------------


def test_key_25_different_keys_of_one_kid_are_both_dropped() -> None:
    twin = stranger.keys["RS256"].jwk(kid=RSA.kid)
    for pair in (
        (RSA.jwk(), twin),
        (twin, RSA.jwk()),
        (RSA.jwk(alg=ABSENT), twin),
        (RSA.jwk(), {**twin, "use": "sig"}),
    ):
        assert dropped_for(*pair) == ("duplicate_kid", "duplicate_kid")
        jwks = key_set(*pair, EC.jwk())
        refused(KeySelectionError, "key_not_found", accept, issuer.mint(), jwks=jwks)
        refused(KeySelectionError, "key_not_found", accept, stranger.mint(header={"kid": RSA.kid}), jwks=jwks)
        assert accept(issuer.mint(key="ES256"), jwks=jwks).sub == "user-1"


def test_key_25_three_of_one_kid_leave_none() -> None:
    third = FakeIssuer(label="third").keys["RS256"].jwk(kid=RSA.kid)
    assert dropped_for(RSA.jwk(), stranger.keys["RS256"].jwk(kid=RSA.kid), third) == ("duplicate_kid",) * 3


def test_key_25_key_listed_twice_is_one_key() -> None:
    jwks = parse_jwk_set(key_set(RSA.jwk(), EC.jwk(), RSA.jwk(x5t="other")))

    assert ([key.kid for key in jwks.keys], jwks.dropped) == ([RSA.kid, EC.kid], ("duplicate",))
    assert accept(issuer.mint(), jwks=key_set(RSA.jwk(), RSA.jwk())).sub == "user-1"


def test_key_25_one_kid_for_keys_no_token_could_confuse_is_no_conflict() -> None:
    shared = [key.jwk(kid="shared") for key in issuer.keys.values()]

    for alg in issuer.keys:
        token = issuer.mint(key=replace(issuer.keys[alg], kid="shared"))
        assert accept(token, jwks=key_set(*shared)).sub == "user-1"


def test_key_25_unusable_twin_is_no_conflict() -> None:
    twin = stranger.keys["RS256"].jwk(kid=RSA.kid, use="enc")
    assert accept(issuer.mint(), jwks=key_set(twin, RSA.jwk())).sub == "user-1"


def test_key_26_key_without_kid_is_for_tokens_without_kid() -> None:
    nameless = key_set(RSA.jwk(kid=ABSENT))

    assert accept(issuer.mint(header={"kid": ABSENT}), jwks=nameless).sub == "user-1"
    refused(KeySelectionError, "key_not_found", accept, issuer.mint(), jwks=nameless)
    two = key_set(RSA.jwk(kid=ABSENT), stranger.keys["RS256"].jwk(kid=ABSENT))
    refused(KeySelectionError, "key_ambiguous", accept, issuer.mint(header={"kid": ABSENT}), jwks=two)


@pytest.mark.parametrize("kid", ["", "ISSUER-RS256", "issuer-RS256 ", "issuer-RS25", "issuer-RS2566", "None"])
def test_key_26_kid_is_compared_exactly(kid: str) -> None:
    with pytest.raises(KeySelectionError) as caught:
        select_verification_key(parse_jwk_set(issuer.jwks()), alg="RS256", kid=kid)
    assert ("key_not_found", 401) == (caught.value.reason, caught.value.status)


@pytest.mark.parametrize(
    ("member", "alg"),
    [
        pytest.param(EC.jwk(alg="ES384"), "ES256", id="KEY-30-alg-of-another-curve"),
        pytest.param(EC.jwk(alg="ES384"), "ES384", id="KEY-30-curve-of-another-alg"),
        pytest.param(EC.jwk(alg="ES521"), "ES256", id="KEY-30-alg-misspelt"),
        pytest.param(EC.jwk(alg="RS256"), "RS256", id="KEY-30-alg-of-another-kty"),
        pytest.param(RSA.jwk(alg="ES256", crv="P-256"), "ES256", id="KEY-30-crv-in-rsa"),
        pytest.param(ED.jwk(alg="ES256"), "ES256", id="KEY-30-ec-alg-in-okp"),
        pytest.param(RSA.jwk(alg="HS256"), "HS256", id="KEY-30-hmac"),
        pytest.param(RSA.jwk(alg="none"), "none", id="KEY-30-none"),
    ],
)
def test_key_that_contradicts_itself_fits_nothing(member: object, alg: str) -> None:
    jwks = parse_jwk_set(key_set(member))
    with pytest.raises(KeySelectionError) as caught:
        select_verification_key(jwks, alg=alg, kid=jwks.keys[0].kid)
    assert caught.value.reason == "key_not_found"


def test_key_33_same_kid_at_two_issuers_gives_each_its_own_key() -> None:
    other = FakeIssuer("https://other.test", label="stranger")
    shared = {"kid": "shared"}
    ours = key_set(RSA.jwk(kid="shared"))

    assert accept(issuer.mint(header=shared), jwks=ours).sub == "user-1"
    # The other issuer's key of that kid says our issuer's name; our issuer's set is asked.
    refused(SignatureError, "jwt_signature", accept, other.mint(iss=issuer.issuer, header=shared), jwks=ours)


@pytest.mark.parametrize("select", [lambda jwks: jwks.holds(b""), lambda jwks: jwks.holds(bytes(32))])
def test_set_does_not_hold_what_it_never_had(select: Callable[[JwkSet], bool]) -> None:
    assert select(parse_jwk_set(issuer.jwks())) is False


def test_members_beyond_the_specification_are_ignored() -> None:
    body = json.loads(issuer.jwks())
    body["keys"][0] |= {
        "x5c": ["MIIB"],
        "x5t": "t",
        "nbf": 1,
        "issuer": "https://thief.test",
        "nested": {"kty": "oct"},
    }
    assert len(parse_jwk_set(to_json({**body, "next": "https://thief.test"})).keys) == 6
