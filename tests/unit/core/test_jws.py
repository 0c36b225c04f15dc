"""JWT rows: header, encoding and signature of a token, one change at a time from a good one."""

import base64
import contextlib
import hmac
import json
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from jwt.exceptions import InvalidKeyError

from kong_token_exchange.core.jwk import KEY_OF_ALGORITHM, key_fits_algorithm, parse_jwk_set
from kong_token_exchange.core.jws import (
    ASYMMETRIC_ALGORITHMS,
    MAX_HEADER_BYTES,
    check_algorithm,
    decode_base64url,
    parse_compact,
    verify_signature,
)
from kong_token_exchange.core.strict_json import MAX_DEPTH
from kong_token_exchange.errors import (
    ClaimError,
    InvalidTokenError,
    KeySelectionError,
    MalformedTokenError,
    SignatureError,
    TimestampError,
    TokenExchangeError,
    UnsupportedAlgorithmError,
)
from tests.support.minting import (
    ABSENT,
    SigningKey,
    b64,
    private_key,
    public_pem,
    raw_signature,
    to_json,
    with_member,
)
from tests.unit.core.pipeline import MAX_TOKEN, accept, issuer, refused, stranger, trust

GOOD = issuer.mint()
HEAD, BODY, TAIL = GOOD.split(".")
HEADER_BYTES, PAYLOAD_BYTES = to_json(issuer.header()), to_json(issuer.claims())

# What a member may be instead of the text or number that belongs there.
ODD_VALUES: dict[str, Any] = {
    "true": True,
    "false": False,
    "null": None,
    "number": 1,
    "float": 1.5,
    "empty-text": "",
    "list": [],
    "list-of-text": ["RS256"],
    "object": {},
}


def with_header(**changes: Any) -> str:
    return issuer.mint(header=changes)


# --- what must pass -------------------------------------------------------------------


@pytest.mark.parametrize("alg", issuer.keys)
def test_good_token_of_every_algorithm_is_accepted(alg: str) -> None:
    assert accept(issuer.mint(key=alg)).sub == "user-1"


@pytest.mark.parametrize("alg", ["RS384", "RS512", "PS384", "PS512"])
def test_other_rsa_algorithms_are_accepted_where_the_key_does_not_bind_one(alg: str) -> None:
    key = SigningKey("rsa", alg, private_key("RS256"))

    assert accept(issuer.mint(key=key), jwks=to_json({"keys": [key.jwk(alg=ABSENT)]})).sub == "user-1"


def test_tables_of_algorithms_agree() -> None:
    assert tuple(KEY_OF_ALGORITHM) == ASYMMETRIC_ALGORITHMS
    assert not {name for name in ASYMMETRIC_ALGORITHMS if name.startswith("HS") or name.lower() == "none"}


# --- the algorithm --------------------------------------------------------------------


@pytest.mark.parametrize(
    "alg",
    [
        pytest.param(alg, id=f"JWT-01-alg-{alg!r}")
        for alg in ("none", "None", "NONE", "nOnE", "none ", "\u0000none")
    ],
)
def test_alg_none_is_refused(alg: str) -> None:
    refused(UnsupportedAlgorithmError, "jwt_algorithm", accept, with_header(alg=alg))
    refused(MalformedTokenError, "jws_signature_empty", accept, with_header(alg=alg).rpartition(".")[0] + ".")


def test_jwt_01_alg_none_is_refused_even_where_a_policy_lists_it() -> None:
    refused(UnsupportedAlgorithmError, "jwt_algorithm", accept, with_header(alg="none"), algorithms=("none",))
    jws = replace(parse_compact(GOOD, max_bytes=MAX_TOKEN), alg="HS256")
    refused(UnsupportedAlgorithmError, "jwt_algorithm", check_algorithm, jws, algorithms=("HS256",))


@pytest.mark.parametrize(
    "alg",
    [
        pytest.param(value, id=f"JWT-02-alg-{name}")
        for name, value in {**ODD_VALUES, "absent": ABSENT}.items()
    ],
)
def test_alg_of_another_type_is_refused(alg: object) -> None:
    refused(MalformedTokenError, "jws_header_member", accept, with_header(alg=alg))


@pytest.mark.parametrize(
    "alg", [pytest.param(alg, id=f"JWT-02-alg-{alg!r}") for alg in ("rs256", "RS256 ", "\uff32\uff33256")]
)
def test_alg_is_compared_exactly(alg: str) -> None:
    refused(UnsupportedAlgorithmError, "jwt_algorithm", accept, with_header(alg=alg))


def hmac_secrets() -> dict[str, bytes]:
    private = private_key("RS256")
    public = private.public_key()
    encoding, form = serialization.Encoding, serialization.PublicFormat
    return {
        "pem": public_pem(private),
        "pem-stripped": public_pem(private).strip(),
        "pkcs1-pem": public.public_bytes(encoding.PEM, form.PKCS1),
        "der": public.public_bytes(encoding.DER, form.SubjectPublicKeyInfo),
        "ssh": public.public_bytes(encoding.OpenSSH, form.OpenSSH),
        "jwk": to_json(issuer.keys["RS256"].jwk()),
        "empty": b"",
    }


@pytest.mark.parametrize("alg", ["HS256", "HS384", "HS512"])
@pytest.mark.parametrize(
    "form", [pytest.param(form, id=f"JWT-03-hmac-with-{form}") for form in hmac_secrets()]
)
def test_hmac_keyed_with_the_public_key_is_refused(alg: str, form: str) -> None:
    signing_input = f"{b64(to_json(issuer.header(alg=alg)))}.{BODY}"
    mac = hmac.digest(hmac_secrets()[form], signing_input.encode(), f"sha{alg[2:]}")

    refused(UnsupportedAlgorithmError, "jwt_algorithm", accept, f"{signing_input}.{b64(mac)}")


@pytest.mark.parametrize(
    "alg",
    [
        pytest.param(alg, id=f"JWT-04-{alg}")
        for alg in ("RS1", "RS", "RS2567", "ES256K", "ES521", "Ed", "RSA-OAEP", "A128KW", "dir")
    ]
    + [pytest.param("http://www.w3.org/2001/04/xmldsig-more#rsa-sha256", id="JWT-04-uri")],
)
def test_odd_algorithm_is_refused_and_fits_no_key(alg: str) -> None:
    refused(UnsupportedAlgorithmError, "jwt_algorithm", accept, with_header(alg=alg))
    keys = [replace(key, alg=None) for key in parse_jwk_set(issuer.jwks()).keys]
    assert not [key for key in keys if key_fits_algorithm(key, alg)]


@pytest.mark.parametrize(
    ("key", "alg"),
    [
        pytest.param("RS256", "RS512", id="JWT-04-other-hash-than-the-key"),
        pytest.param("RS256", "PS256", id="JWT-04-other-padding-than-the-key"),
        pytest.param("RS256", "ES256", id="JWT-04-other-kty-than-the-key"),
        pytest.param("ES256", "ES384", id="JWT-04-other-curve-than-the-key"),
        pytest.param("EdDSA", "ES256", id="JWT-04-okp-for-ec"),
    ],
)
def test_algorithm_other_than_the_keys_finds_no_key(key: str, alg: str) -> None:
    refused(KeySelectionError, "key_not_found", accept, issuer.mint(key=key, header={"alg": alg}))
    jws = replace(parse_compact(issuer.mint(key=key), max_bytes=MAX_TOKEN), alg=alg)
    [jwk] = parse_jwk_set(issuer.jwks(key)).keys
    refused(SignatureError, "jwt_key_algorithm", verify_signature, jws, jwk, algorithms=ASYMMETRIC_ALGORITHMS)


def test_jwt_04_algorithm_outside_the_issuers_list_is_refused() -> None:
    refused(UnsupportedAlgorithmError, "jwt_algorithm", accept, GOOD, algorithms=("ES256", "PS256"))
    refused(UnsupportedAlgorithmError, "jwt_algorithm", accept, GOOD, algorithms=())
    # Verification asks by itself, whatever was asked before.
    jws, [key] = parse_compact(GOOD, max_bytes=MAX_TOKEN), parse_jwk_set(issuer.jwks("RS256")).keys
    for algorithms in (("ES256",), ()):
        refused(UnsupportedAlgorithmError, "jwt_algorithm", verify_signature, jws, key, algorithms=algorithms)


# --- keys that the token offers -------------------------------------------------------

OWN_KEY = stranger.keys["RS256"]
OFFERED = {
    "JWT-05-jwk": {"jwk": OWN_KEY.jwk()},
    "JWT-05-jwk-not-even-a-key": {"jwk": ["RS256"]},
    "JWT-06-jku": {"jku": "https://thief.test/keys"},
    "JWT-06-x5u": {"x5u": "https://thief.test/chain.pem"},
    "JWT-06-x5c": {"x5c": [base64.b64encode(public_pem(OWN_KEY.private)).decode()]},
}


@pytest.mark.parametrize("offer", [pytest.param(offer, id=name) for name, offer in OFFERED.items()])
def test_key_offered_by_the_token_is_never_used(offer: dict[str, Any]) -> None:
    kid = issuer.keys["RS256"].kid

    refused(SignatureError, "jwt_signature", accept, stranger.mint(header={**offer, "kid": kid}))
    refused(KeySelectionError, "key_not_found", accept, stranger.mint(header=offer))
    # The issuer may send such members; they change nothing.
    assert accept(issuer.mint(header=offer)).sub == "user-1"


HOSTILE_KIDS = {
    "path": "../../../../../../dev/null",
    "absolute-path": "/proc/self/environ",
    "url": "https://thief.test/keys#1",
    "sql": "'/**/UNION/**/SELECT/**/'k'--",
    "shell": "key|/usr/bin/id",
    "subshell": "$(id)",
    "wildcard": "*",
    "regex": ".*",
    "prototype": "__proto__",
    "constructor": "constructor",
    "percent": "%2e%2e%2f",
    "template": "{{7*7}}",
}


@pytest.mark.parametrize(
    "kid", [pytest.param(kid, id=f"JWT-07-kid-{name}") for name, kid in HOSTILE_KIDS.items()]
)
def test_kid_is_only_compared(kid: str) -> None:
    error = refused(KeySelectionError, "key_not_found", accept, with_header(kid=kid))
    assert error.facts == {"kid": kid, "alg": "RS256"}


@pytest.mark.parametrize(
    "kid",
    [
        pytest.param(kid, id=f"JWT-07-kid-{kid!r}")
        for kid in ("a\r\nSet-Cookie: a=b", "a\n", "a\x00", "a b", "\x7f", "\uff4b", "a\u2028b", "\x1b[31m")
    ],
)
def test_kid_outside_visible_ascii_is_refused(kid: str) -> None:
    error = refused(MalformedTokenError, "jws_header_member", accept, with_header(kid=kid))
    assert error.facts == {"member": "kid"}


@pytest.mark.parametrize(
    "kid", [pytest.param(value, id=f"JWT-08-kid-{name}") for name, value in ODD_VALUES.items()]
)
def test_kid_of_another_type_is_refused(kid: object) -> None:
    refused(MalformedTokenError, "jws_header_member", accept, with_header(kid=kid))


@pytest.mark.parametrize(
    ("length", "kind", "reason"),
    [
        pytest.param(255, KeySelectionError, "key_not_found", id="JWT-08-kid-255"),
        pytest.param(256, KeySelectionError, "key_not_found", id="JWT-08-kid-256"),
        pytest.param(257, MalformedTokenError, "jws_header_member", id="JWT-08-kid-257"),
        pytest.param(5000, MalformedTokenError, "jws_header_member", id="JWT-08-kid-5000"),
    ],
)
def test_kid_is_bounded(length: int, kind: type[TokenExchangeError], reason: str) -> None:
    error = refused(kind, reason, accept, with_header(kid="k" * length))
    assert error.facts in ({"kid": "k" * 64, "alg": "RS256"}, {"member": "kid"})


def test_jwt_08_absent_kid_is_accepted_only_where_one_key_fits() -> None:
    token = with_header(kid=ABSENT)

    assert accept(token, jwks=issuer.jwks("RS256", "ES256")).sub == "user-1"
    two = [issuer.keys["RS256"].jwk(), OWN_KEY.jwk()]
    refused(KeySelectionError, "key_ambiguous", accept, token, jwks=to_json({"keys": two}))
    refused(KeySelectionError, "key_ambiguous", accept, token, jwks=to_json({"keys": two[::-1]}))


# --- header members that change the reading -------------------------------------------


@pytest.mark.parametrize(
    "crit",
    [
        pytest.param(crit, id=f"JWT-09-crit-{crit!r}")
        for crit in (["x-own"], [], "x-own", ["exp"], ["alg"], ["b64"], [""], None, {}, True, 0)
    ],
)
def test_crit_is_refused_whatever_it_names(crit: object) -> None:
    refused(MalformedTokenError, "jws_header_unsupported", accept, with_header(crit=crit))
    refused(MalformedTokenError, "jws_header_unsupported", accept, with_header(**{"crit": crit, "x-own": 1}))


@pytest.mark.parametrize(
    "b64_member", [pytest.param(v, id=f"JWT-10-b64-{v!r}") for v in (False, "false", 0, True, None)]
)
def test_b64_is_refused_whatever_it_says(b64_member: object) -> None:
    refused(MalformedTokenError, "jws_header_unsupported", accept, with_header(b64=b64_member))
    both = with_header(b64=b64_member, crit=["b64"])
    refused(MalformedTokenError, "jws_header_unsupported", accept, both)


@pytest.mark.parametrize(
    "member",
    [
        pytest.param({"cty": "JWT"}, id="JWT-12-cty"),
        pytest.param({"cty": "application/json"}, id="JWT-12-cty-other"),
        pytest.param({"zip": "DEF"}, id="JWT-14-zip"),
        pytest.param({"zip": None}, id="JWT-14-zip-null"),
        pytest.param({"enc": "A128GCM"}, id="JWT-15-enc"),
        pytest.param({"p2c": 2**31}, id="JWT-15-p2c"),
        pytest.param({"p2s": "AAAA"}, id="JWT-15-p2s"),
        pytest.param({"epk": OWN_KEY.jwk()}, id="JWT-15-epk"),
        pytest.param({"apu": ""}, id="JWT-15-apu"),
        pytest.param({"apv": ""}, id="JWT-15-apv"),
    ],
)
def test_members_of_nested_packed_and_encrypted_tokens_are_refused(member: dict[str, Any]) -> None:
    refused(MalformedTokenError, "jws_header_unsupported", accept, issuer.mint(header=member))


def test_jwt_12_nested_token_is_refused() -> None:
    inner = issuer.craft(HEADER_BYTES, GOOD.encode())
    refused(MalformedTokenError, "jws_payload", accept, inner)


def test_jwt_13_encrypted_token_is_refused() -> None:
    for token in (f"{HEAD}.AA.{BODY}.AA.{TAIL}", "....", "a.b.c.d.e"):
        refused(MalformedTokenError, "token_encrypted", accept, token)


@pytest.mark.parametrize(
    "typ",
    [
        pytest.param(typ, id=f"JWT-11-typ-{typ!r}")
        for typ in (
            "logout+jwt",
            "dpop+jwt",
            "secevent+jwt",
            "token-introspection+jwt",
            "oauth-authz-req+jwt",
            "JOSE",
            "at+jwt ",
            " JWT",
            "x-at+jwt",
            "text/plain",
            "\uff2a\uff37\uff34",
            "at+\u212awt",
        )
    ],
)
def test_another_kind_of_token_is_refused_by_its_type(typ: str) -> None:
    error = refused(ClaimError, "jwt_claim", accept, with_header(typ=typ))
    assert error.facts == {"claim": "typ"}


@pytest.mark.parametrize(
    "typ",
    [
        pytest.param(typ, id=f"JWT-11-accepted-{typ!r}")
        for typ in (ABSENT, "JWT", "jwt", "at+jwt", "AT+JWT", "application/at+jwt")
    ],
)
def test_usual_types_of_access_tokens_are_accepted(typ: object) -> None:
    assert accept(with_header(typ=typ)).sub == "user-1"


def test_jwt_11_listed_types_replace_the_usual_ones() -> None:
    strict = trust(typ=("at+JWT",))

    assert accept(GOOD, entry=strict).sub == "user-1"
    for typ in ("JWT", ABSENT, "application/at+jwt"):
        refused(ClaimError, "jwt_claim", accept, with_header(typ=typ), entry=strict)
    assert accept(with_header(typ="x-internal"), entry=trust(typ=("x-internal",))).sub == "user-1"


@pytest.mark.parametrize("typ", [pytest.param(v, id=f"JWT-11-typ-{name}") for name, v in ODD_VALUES.items()])
def test_typ_of_another_type_is_refused(typ: object) -> None:
    refused(MalformedTokenError, "jws_header_member", accept, with_header(typ=typ))


# --- JSON -----------------------------------------------------------------------------

DOUBLED = {
    "kid-same": '"kid":"issuer-RS256"',
    "kid": '"kid":"stranger"',
    "alg": '"alg":"none"',
    "alg-escaped": '"\\u0061lg":"none"',
    "alg-empty": '"alg":""',
    "unknown": '"x":1,"x":1',
    "nested": '"x":{"y":1,"y":2}',
}


@pytest.mark.parametrize(
    "doubled", [pytest.param(d, id=f"JWT-16-duplicate-{name}") for name, d in DOUBLED.items()]
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_header_member_named_twice_is_refused(doubled: str, *, first: bool) -> None:
    inside = HEADER_BYTES.decode()[1:-1]
    text = f"{{{doubled},{inside}}}" if first else f"{{{inside},{doubled}}}"

    error = refused(MalformedTokenError, "jws_header", accept, issuer.craft(text.encode(), PAYLOAD_BYTES))
    assert error.facts == {"json": "duplicate_member"}


NOT_OBJECTS = {
    "JWT-18-list": b"[]",
    "JWT-18-text": b'"alg"',
    "JWT-18-number": b"1",
    "JWT-18-true": b"true",
    "JWT-18-null": b"null",
    "JWT-18-empty": b"",
    "JWT-18-blank": b" ",
    "JWT-18-garbage": b"\x00\x01\x02",
    "JWT-18-comment": b'/* {"alg":"none"} */ %s',
    "JWT-18-line-comment": b"// none\n%s",
    "JWT-18-trailing": b"%s{}",
    "JWT-18-trailing-nul": b"%s\x00",
    "JWT-18-trailing-comma": b'{"alg":"RS256",}',
    "JWT-18-single-quotes": b"{'alg':'RS256'}",
    "JWT-18-unquoted": b'{alg:"RS256"}',
    "JWT-18-list-around": b"[%s]",
    "JWT-18-control-in-text": b'{"alg":"RS\n256"}',
    "JWT-21-nan": b'{"x":NaN}',
    "JWT-21-infinity": b'{"x":Infinity}',
    "JWT-21-minus-infinity": b'{"x":-Infinity}',
    "JWT-21-overflow": b'{"x":1e400}',
    "JWT-21-minus-overflow": b'{"x":-1e400}',
    "JWT-20-deep-lists": b'{"x":' + b"[" * 4000,
    "JWT-20-deep-objects": b'{"x":' * 1000,
    "JWT-20-deep-closed": b'{"x":' + b"[" * 3000 + b"]" * 3000 + b"}",
    "JWT-22-bom": b"\xef\xbb\xbf%s",
    "JWT-22-overlong": b'{"\xc1\xa1lg":"RS256"}',
    "JWT-22-surrogate-bytes": b'{"x":"\xed\xa0\x80"}',
    "JWT-22-latin-1": b'{"x":"\xe9"}',
    "JWT-22-lone-surrogate": b'{"x":"\\ud800"}',
    "JWT-22-lone-surrogate-name": b'{"\\udfff":1}',
}


def around(template: bytes, document: bytes) -> bytes:
    return template.replace(b"%s", document)


@pytest.mark.parametrize("template", [pytest.param(raw, id=name) for name, raw in NOT_OBJECTS.items()])
def test_what_is_no_strict_json_object_is_refused(template: bytes) -> None:
    header = issuer.craft(around(template, HEADER_BYTES), PAYLOAD_BYTES)
    payload = issuer.craft(HEADER_BYTES, around(template, PAYLOAD_BYTES))

    refused(MalformedTokenError, "jws_header", accept, header)
    refused(MalformedTokenError, "jws_payload", accept, payload)


@pytest.mark.parametrize(
    "encoding",
    [
        pytest.param(encoding, id=f"JWT-22-{encoding}")
        for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")
    ],
)
def test_other_encodings_than_utf8_are_refused(encoding: str) -> None:
    def encode(document: bytes) -> bytes:
        return document.decode().replace("user", "usér").encode(encoding)

    refused(MalformedTokenError, "jws_payload", accept, issuer.craft(HEADER_BYTES, encode(PAYLOAD_BYTES)))
    refused(MalformedTokenError, "jws_header", accept, issuer.craft(encode(HEADER_BYTES), PAYLOAD_BYTES))


def test_jwt_22_text_beyond_ascii_is_read() -> None:
    payload = json.dumps(issuer.claims(sub="ünïcode-😀"), ensure_ascii=False).encode()
    assert accept(issuer.craft(HEADER_BYTES, payload)).sub == "ünïcode-😀"
    assert accept(issuer.mint(sub="ünïcode-😀")).sub == "ünïcode-😀"


@pytest.mark.parametrize(
    "depth", [pytest.param(MAX_DEPTH + d, id=f"JWT-20-depth-max{d:+}") for d in (-1, 0, 1)]
)
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_nesting_is_bounded(depth: int, brackets: str) -> None:
    # The document itself is one level.
    opening = "[" if brackets == "[]" else '{"x":'
    raw = opening * (depth - 1) + "1" + brackets[1] * (depth - 1)
    header = issuer.craft(with_member(issuer.header(), "x", raw), PAYLOAD_BYTES)
    payload = issuer.craft(HEADER_BYTES, with_member(issuer.claims(), "x", raw))

    if depth <= MAX_DEPTH:
        assert accept(header).sub == accept(payload).sub == "user-1"
    else:
        error = refused(MalformedTokenError, "jws_header", accept, header)
        assert error.facts == {"json": "too_deep"}
        refused(MalformedTokenError, "jws_payload", accept, payload)


# --- form and size --------------------------------------------------------------------


@pytest.mark.parametrize(
    "spare", [pytest.param(spare, id=f"JWT-19-token-max{-spare:+}") for spare in (1, 0, -1)]
)
def test_token_is_bounded(spare: int) -> None:
    limit = len(GOOD) + spare
    if spare >= 0:
        assert accept(GOOD, max_token=limit).sub == "user-1"
    else:
        refused(MalformedTokenError, "token_too_long", accept, GOOD, max_token=limit)


@pytest.mark.parametrize(
    "extra", [pytest.param(extra, id=f"JWT-19-header-max{extra:+}") for extra in (-1, 0, 1)]
)
def test_header_is_bounded(extra: int) -> None:
    assert MAX_HEADER_BYTES == 8192
    size = len(with_member(issuer.header(), "x", '""'))
    header = with_member(issuer.header(), "x", f'"{"a" * (MAX_HEADER_BYTES + extra - size)}"')
    assert len(header) == MAX_HEADER_BYTES + extra
    token = issuer.craft(header, PAYLOAD_BYTES)

    if extra <= 0:
        assert accept(token).sub == "user-1"
    else:
        refused(MalformedTokenError, "jws_header", accept, token)


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(token, id=f"JWT-23-{name}")
        for name, token in {
            "flattened": json.dumps({"payload": BODY, "protected": HEAD, "signature": TAIL}),
            "general": json.dumps({"payload": BODY, "signatures": [{"protected": HEAD, "signature": TAIL}]}),
            "flattened-base64": b64(
                json.dumps({"payload": BODY, "protected": HEAD, "signature": TAIL}).encode()
            ),
        }.items()
    ],
)
def test_json_serialization_is_refused(token: str) -> None:
    refused(MalformedTokenError, "token_opaque", accept, token)


def test_jwt_23_polyglot_of_compact_and_json_is_refused() -> None:
    polyglot = f'{{"payload":"{BODY}","protected":"{HEAD}","signature":"{TAIL}","x":"{HEAD}.{BODY}.{TAIL}"}}'
    refused(MalformedTokenError, "jws_base64url", accept, polyglot)


@pytest.mark.parametrize(
    "parts",
    [pytest.param(parts, id=f"JWT-24-{parts}-parts") for parts in (1, 2, 4, 6, 8000)],
)
def test_another_number_of_parts_is_refused(parts: int) -> None:
    refused(MalformedTokenError, "token_opaque", accept, ".".join(["AA"] * parts), max_token=10**6)


@pytest.mark.parametrize("part", [0, 1, 2], ids=["header", "payload", "signature"])
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda text: text + "=" * (-len(text) % 4 or 1), id="JWT-25-padding"),
        pytest.param(lambda text: text + "====", id="JWT-25-padding-of-four"),
        pytest.param(lambda text: "+" + text[1:], id="JWT-25-plus"),
        pytest.param(lambda text: text[:-1] + "/", id="JWT-25-slash"),
        pytest.param(lambda text: text + "\n", id="JWT-26-newline-after"),
        pytest.param(lambda text: "\n" + text, id="JWT-26-newline-before"),
        pytest.param(lambda text: text[:5] + "\r\n" + text[5:], id="JWT-26-line-break-inside"),
        pytest.param(lambda text: text[:5] + " " + text[5:], id="JWT-26-blank-inside"),
        pytest.param(lambda text: text + "\x00", id="JWT-26-nul-after"),
        pytest.param(lambda text: text[:5] + "\x00" + text[6:], id="JWT-26-nul-inside"),
        pytest.param(lambda text: text[:5] + "\udcff" + text[6:], id="JWT-17-byte-ff"),
        pytest.param(lambda text: text[:5] + "\ud800" + text[6:], id="JWT-17-lone-surrogate"),
        pytest.param(lambda text: text[:5] + "é" + text[6:], id="JWT-17-letter"),
        pytest.param(lambda text: text[:5] + "\uff21" + text[6:], id="JWT-28-full-width-letter"),
        pytest.param(lambda text: text[:5] + "\uff0e" + text[6:], id="JWT-28-full-width-dot"),
        pytest.param(lambda text: text[: 4 * (len(text) // 4)] + "A", id="JWT-27-one-character-over"),
    ],
)
def test_other_alphabets_and_fillers_are_refused(part: int, spoil: Any) -> None:
    parts = GOOD.split(".")
    parts[part] = spoil(parts[part])

    refused(MalformedTokenError, "jws_base64url", accept, ".".join(parts))


@pytest.mark.parametrize(
    "dot", [pytest.param(dot, id=f"JWT-28-{ord(dot):04x}") for dot in "\uff0e。･｡\u2024·‧"]
)
def test_other_dots_separate_nothing(dot: str) -> None:
    refused(MalformedTokenError, "token_opaque", accept, GOOD.replace(".", dot))
    refused(MalformedTokenError, "token_opaque", accept, f"{HEAD}.{BODY}{dot}{TAIL}")


@pytest.mark.parametrize("part", [0, 1, 2], ids=["header", "payload", "signature"])
@pytest.mark.parametrize("length", [1, 2], ids=["JWT-27-four-stray-bits", "JWT-27-two-stray-bits"])
def test_unused_bits_are_zero(part: int, length: int) -> None:
    # Members that make each part as long as the case needs; the signature by its own length.
    document = [HEADER_BYTES, PAYLOAD_BYTES, b"s" * 254]
    while len(document[part]) % 3 != length:
        document[part] = document[part].replace(b"}", b" }") if part < 2 else document[part] + b"s"
    parts = [b64(data) for data in document]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    parts[part] = parts[part][:-1] + alphabet[alphabet.index(parts[part][-1]) + 1]

    refused(MalformedTokenError, "jws_base64url", accept, ".".join(parts))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, id=f"JWT-27-{text}")
        for text in ("A", "AB", "AP", "A_", "AAB", "AAD", "AA_", "AAAAA", "AAAAAB", "AAAAAAB")
    ],
)
def test_short_text_has_one_spelling_too(text: str) -> None:
    refused(MalformedTokenError, "jws_base64url", decode_base64url, text)


@pytest.mark.parametrize(
    ("text", "data"),
    [("", b""), ("AA", b"\0"), ("AAA", b"\0\0"), ("AAAA", b"\0\0\0"), ("-_-_", b"\xfb\xff\xbf")],
)
def test_base64url_is_decoded(text: str, data: bytes) -> None:
    assert decode_base64url(text) == data


# --- the signature --------------------------------------------------------------------


def signed_with(signature: bytes, *, alg: str = "RS256") -> str:
    return issuer.mint(key=alg).rpartition(".")[0] + "." + b64(signature)


@pytest.mark.parametrize("alg", issuer.keys)
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda signature: signature[:-1], id="JWT-29-short"),
        pytest.param(lambda signature: signature[1:], id="JWT-29-short-in-front"),
        pytest.param(lambda signature: signature[: len(signature) // 2], id="JWT-29-half"),
        pytest.param(lambda signature: signature[:1], id="JWT-29-one-byte"),
        pytest.param(lambda signature: signature + b"\0", id="JWT-29-long"),
        pytest.param(lambda signature: b"\0" + signature, id="JWT-29-long-in-front"),
        pytest.param(lambda signature: signature * 2, id="JWT-29-twice"),
        pytest.param(lambda signature: signature + b"\0" * 4096, id="JWT-29-very-long"),
        pytest.param(lambda signature: bytes(len(signature)), id="JWT-29-zeros"),
        pytest.param(lambda signature: b"\xff" * len(signature), id="JWT-29-ones"),
        pytest.param(lambda signature: signature[::-1], id="JWT-29-reversed"),
    ],
)
def test_signature_of_another_shape_is_refused(alg: str, change: Any) -> None:
    signature = decode_base64url(issuer.mint(key=alg).rpartition(".")[2])
    token = issuer.mint(key=alg).rpartition(".")[0] + "." + b64(change(signature))

    error = refused(SignatureError, "jwt_signature", accept, token)
    assert error.facts == {"alg": alg, "kid": f"issuer-{alg}"}


def test_jwt_29_empty_signature_is_refused() -> None:
    refused(MalformedTokenError, "jws_signature_empty", accept, f"{HEAD}.{BODY}.")


ORDERS = {
    "ES256": (32, 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551),
    "ES384": (48, 2**384 - 0x389CB27E0BC8D220A7E5F24DB74F58851313E695333AD68D),
    "ES512": (
        66,
        2**521 - 0x5AE79787C40D069948033FEB708F65A2FC44A36477663B851449048E16EC79BF7,
    ),
}


@pytest.mark.parametrize("alg", ORDERS)
@pytest.mark.parametrize("r", [0, 1, -1, "n", "n+1", "max"])
@pytest.mark.parametrize("s", [0, 1, -1, "n", "n+1", "max"])
def test_jwt_30_edge_values_of_ecdsa_are_refused(alg: str, r: int | str, s: int | str) -> None:
    size, order = ORDERS[alg]
    values = {0: 0, 1: 1, -1: order - 1, "n": order, "n+1": order + 1, "max": 2 ** (8 * size) - 1}

    forged = raw_signature(values[r], values[s], size=size)
    refused(SignatureError, "jwt_signature", accept, signed_with(forged, alg=alg))


@pytest.mark.parametrize("alg", [pytest.param(alg, id=f"JWT-31-der-for-{alg}") for alg in ORDERS])
def test_der_signature_is_refused(alg: str) -> None:
    private = private_key(alg)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    signing_input = issuer.mint(key=alg).rpartition(".")[0]
    digest = {"ES256": hashes.SHA256, "ES384": hashes.SHA384, "ES512": hashes.SHA512}[alg]()
    der = private.sign(signing_input.encode(), ec.ECDSA(digest))

    refused(SignatureError, "jwt_signature", accept, f"{signing_input}.{b64(der)}")
    # The same numbers side by side are what RFC 7518 section 3.4 asks for.
    raw = raw_signature(*utils.decode_dss_signature(der), size=ORDERS[alg][0])
    assert accept(f"{signing_input}.{b64(raw)}").sub == "user-1"


SHA256_INFO = bytes.fromhex("3031300d060960864801650304020105000420")


def pkcs1_block(name: str, digest: bytes) -> bytes:
    """Return 256 bytes as RSASSA-PKCS1-v1_5 pads them, or nearly so."""
    info = SHA256_INFO + digest
    return {
        "good": b"\0\1" + b"\xff" * (253 - len(info)) + b"\0" + info,
        "no-null": b"\0\1"
        + b"\xff" * (255 - len(info))
        + b"\0"
        + bytes.fromhex("302f300b0609608648016503040201")
        + info[17:],
        "garbage-after": b"\0\1" + b"\xff" * 8 + b"\0" + info + b"\x5a" * (245 - len(info)),
        "garbage-before": b"\0\1" + b"\xff" * 100 + b"\x5a" + b"\xff" * (152 - len(info)) + b"\0" + info,
        "block-type-2": b"\0\2" + b"\xff" * (253 - len(info)) + b"\0" + info,
        "block-type-0": b"\0\0" + b"\0" * (253 - len(info)) + b"\0" + info,
        "no-separator": b"\0\1" + b"\xff" * (254 - len(info)) + info,
        "bare-digest": b"\0\1" + b"\xff" * (253 - len(digest)) + b"\0" + digest,
        "sha1-info": b"\0\1"
        + b"\xff" * 185
        + b"\0"
        + bytes.fromhex("3021300906052b0e03021a05000414")
        + digest
        + b"\0" * 21,
        "no-padding-at-all": digest.rjust(256, b"\0"),
    }[name]


def rsa_raw(block: bytes) -> bytes:
    private = private_key("RS256")
    assert isinstance(private, rsa.RSAPrivateKey)
    numbers = private.private_numbers()
    modulus = numbers.public_numbers.n
    return pow(int.from_bytes(block, "big"), numbers.d, modulus).to_bytes(256, "big")


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, id=f"JWT-32-pkcs1-{name}")
        for name in (
            "no-null",
            "garbage-after",
            "garbage-before",
            "block-type-2",
            "block-type-0",
            "no-separator",
            "bare-digest",
            "sha1-info",
            "no-padding-at-all",
        )
    ],
)
def test_other_paddings_than_pkcs1_are_refused(variant: str) -> None:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(f"{HEAD}.{BODY}".encode())
    value = digest.finalize()
    assert accept(f"{HEAD}.{BODY}.{b64(rsa_raw(pkcs1_block('good', value)))}").sub == "user-1"
    block = pkcs1_block(variant, value)
    assert len(block) == 256

    refused(SignatureError, "jwt_signature", accept, f"{HEAD}.{BODY}.{b64(rsa_raw(block))}")


PSS = {
    "JWT-33-salt-0": (padding.PSS(padding.MGF1(hashes.SHA256()), 0), hashes.SHA256()),
    "JWT-33-salt-20": (padding.PSS(padding.MGF1(hashes.SHA256()), 20), hashes.SHA256()),
    "JWT-33-salt-max": (padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.MAX_LENGTH), hashes.SHA256()),
    "JWT-33-mgf1-sha1": (padding.PSS(padding.MGF1(hashes.SHA1()), 32), hashes.SHA256()),
    "JWT-33-mgf1-sha512": (padding.PSS(padding.MGF1(hashes.SHA512()), 32), hashes.SHA256()),
    "JWT-33-hash-sha512": (padding.PSS(padding.MGF1(hashes.SHA512()), 64), hashes.SHA512()),
    "JWT-33-pkcs1": (padding.PKCS1v15(), hashes.SHA256()),
}


@pytest.mark.parametrize("variant", [pytest.param(value, id=name) for name, value in PSS.items()])
def test_other_parameters_of_pss_are_refused(variant: tuple[Any, Any]) -> None:
    private = private_key("PS256")
    assert isinstance(private, rsa.RSAPrivateKey)
    signing_input = issuer.mint(key="PS256").rpartition(".")[0]
    usual = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    good = private.sign(signing_input.encode(), usual, hashes.SHA256())
    assert accept(f"{signing_input}.{b64(good)}").sub == "user-1"
    signature = private.sign(signing_input.encode(), *variant)

    refused(SignatureError, "jwt_signature", accept, f"{signing_input}.{b64(signature)}")


@pytest.mark.parametrize(
    "member",
    [
        pytest.param({name: value}, id=f"JWT-34-{name}-{label}")
        for name in ("alg", "kid", "typ", "crit", "jwk", "x5t", "cty")
        for label, value in {**ODD_VALUES, "huge": 10**300, "nested": [[{"a": [None]}]]}.items()
    ],
)
def test_wrong_types_never_leave_the_error_tree(member: dict[str, Any]) -> None:
    token = issuer.mint(header=member)
    if {"jwk", "x5t"} >= set(member):
        assert accept(token).sub == "user-1"
        return
    with pytest.raises(InvalidTokenError):
        accept(token)


@pytest.mark.parametrize(
    "token", ["", ".", "..", "...", "a", "a.", ".a", "..a", "a..", "nodots", "\udcff", "\x00"]
)
def test_jwt_34_stumps_of_tokens_are_refused(token: str) -> None:
    with pytest.raises(MalformedTokenError):
        accept(token)


@pytest.mark.parametrize("alg", [pytest.param(alg, id=f"JWT-35-{alg}") for alg in ("Ed25519", "Ed448")])
def test_fully_specified_names_of_eddsa_are_not_supported(alg: str) -> None:
    error = refused(
        UnsupportedAlgorithmError, "jwt_algorithm", accept, issuer.mint(key="EdDSA", header={"alg": alg})
    )
    assert error.facts == {"alg": alg}


def test_jwt_36_result_of_a_verification_is_bound_to_the_very_key() -> None:
    key = issuer.keys["RS256"]
    [verified_by] = parse_jwk_set(to_json({"keys": [key.jwk()]})).keys

    def still_held(*keys: dict[str, Any]) -> bool:
        return parse_jwk_set(to_json({"keys": list(keys)})).holds(verified_by.fingerprint)

    assert still_held(stranger.keys["ES256"].jwk(), key.jwk())
    assert still_held(key.jwk(use=ABSENT, x5t="renewed"))
    assert not still_held(stranger.keys["RS256"].jwk(kid=key.kid))
    assert not still_held(key.jwk(alg="PS256"))
    assert not still_held(key.jwk(kid="renamed"))
    assert not still_held(key.jwk(use="enc"), stranger.keys["ES256"].jwk())


def test_jwt_41_any_changed_character_is_refused() -> None:
    token = issuer.mint(key="ES256", jti=ABSENT, scope=ABSENT, azp=ABSENT, typ=ABSENT)
    jwks = issuer.jwks("ES256")
    assert accept(token, jwks=jwks).sub == "user-1"
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    accepted = []
    for index, character in enumerate(token):
        # The neighbours in the alphabet change single bits, the others several.
        others = [alphabet[(alphabet.find(character) + step) % 64] for step in (1, 2, 16, 32)] + ["."]
        for other in others:
            if other == character:
                continue
            with contextlib.suppress(InvalidTokenError):
                accept(token[:index] + other + token[index + 1 :], jwks=jwks)
                accepted.append((index, other))

    assert accepted == []


def test_jwt_41_parts_of_two_good_tokens_do_not_mix() -> None:
    other = issuer.mint(sub="user-2").split(".")
    for mixed in ([HEAD, other[1], TAIL], [HEAD, BODY, other[2]]):
        refused(SignatureError, "jwt_signature", accept, ".".join(mixed))


@pytest.mark.parametrize("error", [InvalidKeyError("MARK"), ValueError("MARK"), TypeError("MARK")])
def test_jwt_34_verifier_that_fails_has_not_verified(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class Failing:
        def verify(self, *_: object) -> bool:
            raise error

    monkeypatch.setattr("jwt.get_algorithm_by_name", lambda _: Failing())

    assert "MARK" not in repr(refused(SignatureError, "jwt_signature", accept, GOOD))


def test_long_kid_of_a_bad_signature_is_cut_in_the_facts() -> None:
    kid = "k" * 256
    key = replace(stranger.keys["RS256"], kid=kid)
    error = refused(
        SignatureError,
        "jwt_signature",
        accept,
        issuer.mint(key=key),
        jwks=to_json({"keys": [issuer.keys["RS256"].jwk(kid=kid)]}),
    )
    assert error.facts == {"alg": "RS256", "kid": "k" * 64}


def test_parsed_token_prints_its_header_alone() -> None:
    jws = parse_compact(GOOD, max_bytes=MAX_TOKEN)
    assert repr(jws) == "Jws(alg='RS256', kid='issuer-RS256', typ='at+jwt')"


def test_signature_is_judged_before_the_claims() -> None:
    expired = issuer.mint(exp=1)
    refused(TimestampError, "jwt_timestamp", accept, expired)
    refused(SignatureError, "jwt_signature", accept, expired[:-4] + "AAAA")
