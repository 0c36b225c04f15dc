"""
Published vectors: Wycheproof, the JOSE cookbook and JSONTestSuite.

They are read from beside the repository and skipped where they are not there; nothing of them is
copied. The names of rows are the publishers' own.
"""

import base64
import json
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kong_token_exchange.core.jwk import parse_jwk_set, select_verification_key
from kong_token_exchange.core.jws import (
    ASYMMETRIC_ALGORITHMS,
    Jws,
    check_algorithm,
    decode_base64url,
    parse_compact,
    verify_signature,
)
from kong_token_exchange.core.strict_json import JsonError, parse_json, parse_json_object
from kong_token_exchange.errors import IssuerUnavailableError, MalformedTokenError, TokenExchangeError
from tests.support.minting import b64, to_json
from tests.unit.core.pipeline import accept, issuer

VECTORS = Path(__file__).resolve().parents[2].parent / "shared" / "vectors"

pytestmark = pytest.mark.skipif(
    not VECTORS.is_dir(), reason="published vectors are not beside the repository (../shared/vectors)"
)

MAX = 64 * 1024

# How many cases each file has, so that a lost one is noticed.
WYCHEPROOF = {
    "json_web_signature": 401,
    "json_web_key": 26,
    "json_web_crypto": 83,
    "json_web_encryption": 139,
}
_PRIVATE = ("d", "p", "q", "dp", "dq", "qi")


@cache
def read(path: str) -> Any:
    return json.loads((VECTORS / path).read_text()) if VECTORS.is_dir() else {}


def parse_any_payload(token: str) -> Jws:
    """
    Read a token whose payload need not be claims, as the vectors' payloads are not.

    Header, signature and the spelling of the payload are judged as always.
    """
    parts = token.split(".")
    if len(parts) != 3:
        return parse_compact(token, max_bytes=MAX)
    head, body, tail = parts
    jws = parse_compact(f"{head}.e30.{tail}", max_bytes=MAX)
    decode_base64url(body)
    return replace(jws, signing_input=f"{head}.{body}".encode())


def verify(token: str, jwks: bytes) -> None:
    jws = parse_any_payload(token)
    check_algorithm(jws, algorithms=ASYMMETRIC_ALGORITHMS)
    key = select_verification_key(parse_jwk_set(jwks), alg=jws.alg, kid=jws.kid)
    verify_signature(jws, key, algorithms=ASYMMETRIC_ALGORITHMS)


def as_set(document: dict[str, Any]) -> bytes:
    return to_json(document if "keys" in document else {"keys": [document]})


# --- Wycheproof -----------------------------------------------------------------------

# Labelled valid; refused here for these reasons.
NOT_FOR_US = {
    ("json_web_signature", 346): "the key's alg says PS256, the token PS384",
    ("json_web_signature", 347): "the key's alg says ES521, which does not exist",
    ("json_web_signature", 350): "the key's alg says PS256, the token PS384",
    ("json_web_signature", 351): "the key's alg says ES521, which does not exist",
    ("json_web_signature", 372): "a character outside the base64url alphabet",
    ("json_web_signature", 373): "a character outside the base64url alphabet",
}


def wycheproof(name: str) -> list[Any]:
    cases = []
    for group in read(f"wycheproof/{name}_test.json").get("testGroups", ()):
        keys = group.get("public", group.get("private"))
        for test in group["tests"]:
            case = (name, test, keys)
            cases.append(pytest.param(*case, id=f"{name}-{test['tcId']}-{test['comment']}-{test['result']}"))
    return cases


def test_every_published_file_is_used_and_whole() -> None:
    files = {str(path.relative_to(VECTORS)) for path in VECTORS.rglob("*.json")}
    used = {f"wycheproof/{name}_test.json" for name in WYCHEPROOF}
    used |= {f"jose-cookbook/{name}.json" for name in (*COOKBOOK, *COOKBOOK_KEYS)}
    used |= {"json-parsing/jsontestsuite.json"}

    assert used == files
    assert {name: len(wycheproof(name)) for name in WYCHEPROOF} == WYCHEPROOF
    kinds = Counter(case.values[0][0] for case in suite())
    assert {"n": 186 + 2, "y": 95, "i": 35} == kinds


SIGNED = [*wycheproof("json_web_signature"), *wycheproof("json_web_key"), *wycheproof("json_web_crypto")]


@pytest.mark.parametrize(("name", "test", "keys"), SIGNED)
def test_wycheproof_signatures(name: str, test: dict[str, Any], keys: dict[str, Any]) -> None:
    if "jwe" in test:
        refuse_everywhere(test["jwe"])
        return
    token = test["jws"] if isinstance(test["jws"], str) else json.dumps(test["jws"])
    members = keys.get("keys", [keys])
    hmac = any(member["kty"] == "oct" for member in members)
    if test["result"] == "valid" and not hmac and (name, test["tcId"]) not in NOT_FOR_US:
        verify(token, as_set(keys))
        return
    with pytest.raises(TokenExchangeError):
        verify(token, as_set(keys))
    with pytest.raises(TokenExchangeError):
        accept(token, jwks=as_set(keys))
    if hmac:
        # Not because the set was refused whole: beside a good key the token is refused as well.
        with pytest.raises(TokenExchangeError):
            verify(token, to_json({"keys": [*members, issuer.keys["RS256"].jwk()]}))


# Labelled invalid for their padding, and the same to the letter as one that is labelled valid: refused
# here as all three are, for being an HMAC.
SAME_AS_VALID = {("json_web_signature", 367): 357, ("json_web_signature", 370): 357}


def test_wycheproof_slips_are_still_there() -> None:
    cases = {(name, test["tcId"]): test for name, test, _ in (case.values for case in SIGNED)}
    assert {cases[case]["result"] for case in NOT_FOR_US} == {"valid"}
    for (name, number), valid in SAME_AS_VALID.items():
        twin, good = cases[name, number], cases[name, valid]
        assert (twin["jws"], twin["result"], good["result"]) == (good["jws"], "invalid", "valid")


@pytest.mark.parametrize("number", [372, 373])
def test_wycheproof_characters_outside_the_alphabet_are_refused_for_what_they_are(number: int) -> None:
    (token,) = [test["jws"] for _, test, _ in (case.values for case in SIGNED) if test["tcId"] == number][:1]
    with pytest.raises(MalformedTokenError):
        parse_compact(token, max_bytes=MAX)


def test_wycheproof_valid_signatures_were_verified() -> None:
    valid = [
        test
        for name, test, keys in (case.values for case in SIGNED)
        if test["result"] == "valid"
        and "jws" in test
        and (name, test["tcId"]) not in NOT_FOR_US
        and all(member["kty"] != "oct" for member in keys.get("keys", [keys]))
    ]
    assert len(valid) >= 25


@pytest.mark.parametrize(("name", "test", "keys"), wycheproof("json_web_encryption"))
def test_wycheproof_encrypted_tokens(name: str, test: dict[str, Any], keys: dict[str, Any]) -> None:
    refuse_everywhere(test["jwe"])


def refuse_everywhere(token: object) -> None:
    text = token if isinstance(token, str) else json.dumps(token)
    with pytest.raises(MalformedTokenError):
        parse_compact(text, max_bytes=MAX)


# --- JOSE cookbook --------------------------------------------------------------------

COOKBOOK_KEYS = {
    "jwk-3_1.ec_public_key": "kept",
    "jwk-3_3.rsa_public_key": "kept",
    "jwk-3_2.ec_private_key": "private",
    "jwk-3_4.rsa_private_key": "private",
    "jwk-3_5.symmetric_key_mac_computation": "symmetric",
}

COOKBOOK = {
    "jws-4_1.rsa_v15_signature": True,
    "jws-4_2.rsa-pss_signature": True,
    "jws-4_3.ecdsa_signature": True,
    "curve25519-jws": True,
    "jws-4_4.hmac-sha2_integrity_protection": False,
    "jws-4_5.signature_with_detached_content": False,
    "jws-4_6.protecting_specific_header_fields": False,
    "jws-4_7.protecting_content_only": False,
    "jws-4_8.multiple_signatures": False,
    "rfc7797-4.2.hmac-sha2_b64_false": False,
    "rfc7797-hmac-sha2_b64_false": False,
    "6.nesting_signatures_and_encryption": False,
    "jwe-5_9.compressed_content": False,
}


def public(key: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in key.items() if name not in _PRIVATE}


def outputs(document: object) -> list[str]:
    """Return every serialization that a cookbook file has, objects as JSON text."""
    found: list[str] = []
    if isinstance(document, dict):
        for name, value in document.items():
            if name in ("compact", "json", "json_flat", "encrypt_compact", "output"):
                found += [value] if isinstance(value, str) else [json.dumps(value)]
            found += outputs(value)
    return found


@pytest.mark.parametrize(("name", "good"), COOKBOOK.items())
def test_cookbook_signatures(name: str, good: bool) -> None:
    document = read(f"jose-cookbook/{name}.json")
    tokens = outputs(document)
    assert tokens
    if good:
        jwks = as_set(public(document["input"]["key"]))
        compact = document["output"]["compact"]
        verify(compact, jwks)
        # The published signature with its last bytes changed, and the published key as it was: private.
        with pytest.raises(TokenExchangeError):
            verify(compact[:-8] + "AAAAAAAA", jwks)
        with pytest.raises(IssuerUnavailableError):
            parse_jwk_set(as_set(document["input"]["key"]))
        tokens.remove(compact)
    any_key = issuer.jwks()
    for token in tokens:
        with pytest.raises(TokenExchangeError):
            verify(token, any_key)


@pytest.mark.parametrize("name", [name for name, fate in COOKBOOK_KEYS.items() if fate == "kept"])
def test_cookbook_public_keys_are_kept(name: str) -> None:
    [key] = parse_jwk_set(as_set(read(f"jose-cookbook/{name}.json"))).keys
    assert key.kid == "bilbo.baggins@hobbiton.example"


@pytest.mark.parametrize(
    ("name", "reason"), [(name, fate) for name, fate in COOKBOOK_KEYS.items() if fate != "kept"]
)
def test_cookbook_secret_keys_are_dropped(name: str, reason: str) -> None:
    with pytest.raises(IssuerUnavailableError) as caught:
        parse_jwk_set(as_set(read(f"jose-cookbook/{name}.json")))
    assert caught.value.facts == {"dropped": reason}


# --- JSONTestSuite --------------------------------------------------------------------

# The suite asks for these; a security boundary does not want two members of one name.
DUPLICATES = {"y_object_duplicated_key.json", "y_object_duplicated_key_and_value.json"}

# Left open by the suite. What is accepted is of no danger; all else is refused.
OPEN_ACCEPTED = {
    "i_number_double_huge_neg_exp.json",
    "i_number_real_underflow.json",
    "i_number_too_big_neg_int.json",
    "i_number_too_big_pos_int.json",
    "i_number_very_big_negative_int.json",
}


def suite() -> list[Any]:
    files = {
        name: base64.b64decode(data)
        for name, data in read("json-parsing/jsontestsuite.json").get("files", {}).items()
    }
    # Two files are too large for the collection and are made here, as its description says.
    files |= {
        "n_structure_100000_opening_arrays.json": b"[" * 100_000,
        "n_structure_open_array_object.json": b'[{"":' * 50_000,
    }
    return [pytest.param(name, data, id=name) for name, data in sorted(files.items())]


@pytest.mark.parametrize(("name", "data"), suite())
def test_json_suite(name: str, data: bytes) -> None:
    if (name.startswith("y_") and name not in DUPLICATES) or name in OPEN_ACCEPTED:
        assert parse_json(data, max_bytes=10**6) == json.loads(data)
        return
    with pytest.raises(JsonError):
        parse_json(data, max_bytes=10**6)


@pytest.mark.parametrize(("name", "data"), [case for case in suite() if case.values[0].startswith("n_")])
def test_json_suite_refusals_as_header_and_as_payload(name: str, data: bytes) -> None:
    header, payload = to_json(issuer.header("EdDSA")), to_json(issuer.claims())
    for inside in (data, b'{"x":' + data + b"}"):
        with pytest.raises(MalformedTokenError) as caught:
            parse_compact(issuer.craft(inside, payload, key="EdDSA"), max_bytes=10**7)
        assert caught.value.reason == "jws_header"
        with pytest.raises(MalformedTokenError) as caught:
            parse_compact(issuer.craft(header, inside, key="EdDSA"), max_bytes=10**7)
        assert caught.value.reason == "jws_payload"
        with pytest.raises(IssuerUnavailableError):
            parse_jwk_set(inside)


@pytest.mark.parametrize(
    ("name", "data"), [case for case in suite() if case.values[0].startswith("y_object")]
)
def test_json_suite_objects_are_payloads(name: str, data: bytes) -> None:
    if name in DUPLICATES:
        with pytest.raises(JsonError, match="duplicate_member"):
            parse_json_object(data, max_bytes=MAX)
        return
    assert parse_json_object(data, max_bytes=MAX) == json.loads(data)
    token = f"{b64(to_json(issuer.header()))}.{b64(data)}.AA"
    assert parse_compact(token, max_bytes=MAX).payload == json.loads(data)
