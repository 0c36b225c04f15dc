"""DPoP proofs: one good proof, and one thing changed at a time (RFC 9449 section 4.3)."""

from typing import Any

import pytest

from kong_token_exchange.core.dpop import (
    MAX_PROOF_BYTES,
    PROOF_ALGORITHMS,
    PROOF_SKEW_S,
    Proof,
    verify_proof,
)
from kong_token_exchange.core.jwk import parse_public_jwk, thumbprint
from kong_token_exchange.errors import PossessionError, ProofError, TokenExchangeError
from tests.support.minting import (
    ABSENT,
    DEFAULT_ALGORITHMS,
    NOW,
    FakeIssuer,
    SigningKey,
    b64,
    private_key,
    public_pem,
    to_json,
)
from tests.support.proofs import METHOD, Holder

LIFETIME = 60.0
ORIGIN = "https://api.test:443"

holder, thief = Holder(), Holder(label="thief")
TOKEN = FakeIssuer().mint(cnf=holder.cnf)


def verify(proof: str, **changes: Any) -> Proof:
    return verify_proof(
        proof,
        **{
            "access_token": TOKEN,
            "jkt": holder.jkt,
            "method": METHOD,
            "path": "/orders?page=2",
            "origins": {ORIGIN},
            "now": float(NOW),
            "lifetime": LIFETIME,
            **changes,
        },
    )


def refusal(proof: str, **changes: Any) -> TokenExchangeError:
    with pytest.raises(TokenExchangeError) as caught:
        verify(proof, **changes)
    return caught.value


def test_a_good_proof_is_told_from_every_other_by_its_key_and_jti() -> None:
    proof = verify(holder.prove(TOKEN, jti="a"))

    assert (16, float(NOW)) == (len(proof.key), proof.iat)
    assert proof == verify(holder.prove(TOKEN, jti="a"))
    assert proof.key != verify(holder.prove(TOKEN, jti="b")).key
    theirs = FakeIssuer().mint(cnf=thief.cnf)
    other = verify(thief.prove(theirs, jti="a"), access_token=theirs, jkt=thief.jkt)
    assert proof.key != other.key


@pytest.mark.parametrize("alg", DEFAULT_ALGORITHMS)
def test_every_asymmetric_algorithm_may_prove(alg: str) -> None:
    keeper = Holder(alg)
    token = FakeIssuer().mint(cnf=keeper.cnf)

    assert verify(keeper.prove(token), access_token=token, jkt=keeper.jkt)
    assert alg in PROOF_ALGORITHMS


def test_the_thumbprint_is_that_of_rfc_7638() -> None:
    # RFC 7638 section 3.1.
    modulus = (
        "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRX"
        "jBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs"
        "8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_"
        "xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
    )
    key = {"kty": "RSA", "n": modulus, "e": "AQAB", "alg": "RS256", "kid": "2011-04-29"}

    assert "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs" == thumbprint(key)
    # RFC 8037 appendix A.3.
    okp = {"crv": "Ed25519", "kty": "OKP", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}
    assert "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k" == thumbprint(okp)
    assert [None] * 5 == [
        thumbprint(member) for member in (None, "x", {}, {"kty": "oct", "k": "a"}, {**okp, "x": 1})
    ]


def test_the_proof_of_rfc_9449_is_read() -> None:
    # RFC 9449 section 7.1, figure 12: key, token and proof as printed there.
    proof = (
        "eyJ0eXAiOiJkcG9wK2p3dCIsImFsZyI6IkVTMjU2IiwiandrIjp7Imt0eSI6IkVDIiwieCI6Imw4dEZyaHgtMzR0VjNoUklDUkRZ"
        "OXpDa0RscEJoRjQyVVFVZldWQVdCRnMiLCJ5IjoiOVZFNGpmX09rX282NHpiVFRsY3VOSmFqSG10NnY5VERWclUwQ2R2R1JEQSI"
        "sImNydiI6IlAtMjU2In19.eyJqdGkiOiJlMWozVl9iS2ljOC1MQUVCIiwiaHRtIjoiR0VUIiwiaHR1IjoiaHR0cHM6Ly9yZXNvd"
        "XJjZS5leGFtcGxlLm9yZy9wcm90ZWN0ZWRyZXNvdXJjZSIsImlhdCI6MTU2MjI2MjYxOCwiYXRoIjoiZlVIeU8ycjJaM0RaNTNF"
        "c05yV0JiMHhXWG9hTnk1OUlpS0NBcWtzbVFFbyJ9.2oW9RP35yRqzhrtNP86L-Ey71EOptxRimPPToA1plemAgR6pxHF8y6-yqy"
        "Vnmcw6Fy1dqd-jfxSYoMxhAJpLjA"
    )
    found = verify(
        proof,
        access_token="Kz~8mXK1EalYznwH-LC-1fBAo.4Ljp~zsPE_NeO.gxU",
        jkt="0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I",
        path="/protectedresource",
        origins={"https://resource.example.org:443"},
        now=1562262618.0,
    )

    assert 1562262618 == found.iat


CLAIMS: dict[str, tuple[dict[str, Any], str]] = {
    "htm-other": ({"htm": "POST"}, "htm"),
    "htm-case": ({"htm": "get"}, "htm"),
    "htm-absent": ({"htm": ABSENT}, "htm"),
    "htm-list": ({"htm": ["GET"]}, "htm"),
    "htu-host": ({"htu": "https://evil.test/orders"}, "htu"),
    "htu-scheme": ({"htu": "http://api.test/orders"}, "htu"),
    "htu-port": ({"htu": "https://api.test:8443/orders"}, "htu"),
    "htu-path": ({"htu": "https://api.test/order"}, "htu"),
    "htu-path-case": ({"htu": "https://api.test/Orders"}, "htu"),
    "htu-slash": ({"htu": "https://api.test/orders/"}, "htu"),
    "htu-encoded-slash": ({"htu": "https://api.test%2Forders"}, "htu"),
    "htu-relative": ({"htu": "/orders"}, "htu"),
    "htu-absent": ({"htu": ABSENT}, "htu"),
    "htu-number": ({"htu": 1}, "htu"),
    "ath-other": ({"ath": b64(bytes(32))}, "ath"),
    "ath-absent": ({"ath": ABSENT}, "ath"),
    "ath-null": ({"ath": None}, "ath"),
    "ath-beyond-ascii": ({"ath": "\u00fc"}, "ath"),
    "iat-absent": ({"iat": ABSENT}, "iat"),
    "iat-text": ({"iat": str(NOW)}, "iat"),
    "iat-true": ({"iat": True}, "iat"),
    "iat-endless": ({"iat": 10**400}, "iat"),
    "exp-past": ({"exp": NOW}, "exp"),
    "exp-text": ({"exp": "never"}, "exp"),
    "nbf-future": ({"nbf": NOW + PROOF_SKEW_S + 1}, "nbf"),
    "jti-absent": ({"jti": ABSENT}, "jti"),
    "jti-empty": ({"jti": ""}, "jti"),
    "jti-number": ({"jti": 7}, "jti"),
    "jti-long": ({"jti": "a" * 257}, "jti"),
}


@pytest.mark.parametrize(("changes", "claim"), CLAIMS.values(), ids=CLAIMS)
def test_clm_31_a_proof_of_something_else_is_refused(changes: dict[str, Any], claim: str) -> None:
    error = refusal(holder.prove(TOKEN, **changes))

    assert (ProofError, "dpop_claim", claim, 401) == (
        type(error),
        error.reason,
        error.facts["claim"],
        error.status,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"htu": "https://api.test/orders?page=3#top"},
        {"htu": "HTTPS://API.TEST:443/orders"},
        {"htu": "https://api.test/x/../%6frders"},
        {"exp": NOW + 1, "nbf": NOW},
        {"jti": "a" * 256},
        {"nonce": "nobody-asked"},
    ],
)
def test_another_spelling_is_the_same_proof(changes: dict[str, Any]) -> None:
    assert verify(holder.prove(TOKEN, **changes))


@pytest.mark.parametrize(
    ("iat", "good"),
    [
        (NOW - LIFETIME, False),
        (NOW - LIFETIME + 1, True),
        (NOW + PROOF_SKEW_S, True),
        (NOW + PROOF_SKEW_S + 1, False),
    ],
)
def test_a_proof_is_good_for_its_lifetime(iat: float, good: bool) -> None:
    proof = holder.prove(TOKEN, iat=iat)

    assert verify(proof) if good else "iat" == refusal(proof).facts["claim"]


def forged(header: dict[str, Any], *, key: SigningKey | None = None) -> str:
    """Sign a good payload by another key, under a header of choice."""
    issuer = FakeIssuer()
    payload = holder.prove(TOKEN).split(".")[1]
    signing_input = f"{b64(to_json(header))}.{payload}"
    signer = key or issuer.keys["ES256"]
    return f"{signing_input}.{b64(signer.sign(signing_input.encode()))}"


GOOD_HEADER = {"typ": "dpop+jwt", "alg": "ES256", "jwk": holder.jwk}
PRIVATE = {**holder.jwk, "d": b64(bytes(range(32)))}

FORMS: dict[str, tuple[str, str]] = {
    "absent": ("", "dpop_missing"),
    "twice": (", ".join([holder.prove(TOKEN)] * 2), "dpop_repeated"),
    "opaque": ("abc", "dpop_token_opaque"),
    "too-long": ("a" * (MAX_PROOF_BYTES + 1), "dpop_token_too_long"),
    "encrypted": ("a.b.c.d.e", "dpop_token_encrypted"),
    "padding": (holder.prove(TOKEN) + "=", "dpop_jws_base64url"),
    "typ-jwt": (holder.prove(TOKEN, header={"typ": "JWT"}), "dpop_typ"),
    "typ-absent": (holder.prove(TOKEN, header={"typ": ABSENT}), "dpop_typ"),
    "typ-case": (holder.prove(TOKEN, header={"typ": "DPoP+jwt"}), "dpop_typ"),
    "alg-none": (holder.prove(TOKEN, header={"alg": "none"}), "dpop_jwt_algorithm"),
    "alg-hmac": (holder.prove(TOKEN, header={"alg": "HS256"}), "dpop_jwt_algorithm"),
    "alg-not-the-keys": (holder.prove(TOKEN, header={"alg": "ES384"}), "dpop_key"),
    "alg-of-the-key": (holder.prove(TOKEN, header={"jwk": {**holder.jwk, "alg": "ES384"}}), "dpop_key"),
    "key-private": (holder.prove(TOKEN, header={"jwk": PRIVATE}), "dpop_key"),
    "key-for-encryption": (holder.prove(TOKEN, header={"jwk": {**holder.jwk, "use": "enc"}}), "dpop_key"),
    "key-absent": (holder.prove(TOKEN, header={"jwk": ABSENT}), "dpop_key_differs"),
    "key-text": (holder.prove(TOKEN, header={"jwk": "key"}), "dpop_key_differs"),
    "key-symmetric": (
        holder.prove(TOKEN, header={"jwk": {"kty": "oct", "k": b64(public_pem(holder.private))}}),
        "dpop_key_differs",
    ),
    "key-of-another": (thief.prove(TOKEN), "dpop_key_differs"),
    "signature-of-another": (forged(GOOD_HEADER), "dpop_signature"),
    "crit": (holder.prove(TOKEN, header={"crit": ["b64"], "b64": False}), "dpop_jws_header_unsupported"),
}


@pytest.mark.parametrize(("proof", "reason"), FORMS.values(), ids=FORMS)
def test_a_proof_of_another_form_is_refused(proof: str, reason: str) -> None:
    error = refusal(proof)

    assert (reason, 401) == (error.reason, error.status)
    expected = "invalid_token" if reason == "dpop_key_differs" else "invalid_dpop_proof"
    assert expected == error.error
    assert isinstance(error, PossessionError if expected == "invalid_token" else ProofError)


@pytest.mark.parametrize("size", [1024, 5120])
def test_a_key_that_is_weak_or_costs_too_much_proves_nothing(size: int) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa

    private = rsa.generate_private_key(public_exponent=65537, key_size=size)
    keeper = Holder("RS256")
    keeper.private = private
    keeper.jwk = SigningKey(None, "RS256", private).jwk(alg=ABSENT, use=ABSENT)
    token = FakeIssuer().mint(cnf=keeper.cnf)

    assert "dpop_key" == refusal(keeper.prove(token), access_token=token, jkt=keeper.jkt).reason


def test_a_request_without_an_origin_is_nobodys() -> None:
    assert "htu" == refusal(holder.prove(TOKEN), origins=frozenset()).facts["claim"]


def test_a_lone_key_is_read_like_one_of_a_set() -> None:
    assert parse_public_jwk(holder.jwk) is not None
    assert parse_public_jwk(PRIVATE) is None
    assert private_key("ES256", "holder") is holder.private


def test_clm_31_a_proof_with_one_character_changed_is_refused() -> None:
    proof = holder.prove(TOKEN)

    for place, char in enumerate(proof):
        changed = proof[:place] + ("B" if char == "A" else "A") + proof[place + 1 :]
        with pytest.raises((ProofError, PossessionError)):
            verify(changed)
