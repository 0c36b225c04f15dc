"""
Hostile input costs no more than its length.

Inputs are far longer than any limit lets through, so that anything quadratic would take minutes;
the bound is for that and for nothing finer, since machines are slow and shared.
"""

import contextlib
import time
from collections.abc import Callable

import pytest

from kong_token_exchange.core.claims import parse_claims
from kong_token_exchange.core.jwk import MAX_SET_BYTES, parse_jwk_set
from kong_token_exchange.core.jws import decode_base64url, parse_compact
from kong_token_exchange.core.strict_json import parse_json
from kong_token_exchange.errors import TokenExchangeError
from kong_token_exchange.protocol.bearer import parse_authorization, parse_token
from tests.support.minting import b64, b64_uint, to_json
from tests.unit.core.pipeline import issuer

LONG = 256 * 1024
BOUND_S = 5.0

HEAD, BODY, TAIL = issuer.mint().split(".")


def compact(payload: bytes) -> str:
    return f"{HEAD}.{b64(payload)}.{TAIL}"


TEXTS = {
    "letters": "a" * LONG,
    "dots": "." * LONG,
    "equals": "=" * LONG,
    "letters-and-equals": "a=" * (LONG // 2),
    "blanks": " " * LONG,
    "bearers": "Bearer " * (LONG // 7),
    "controls": "\x00" * LONG,
    "surrogates": "\udcff" * LONG,
    "last-byte-is-wrong": "a" * LONG + "\xff",
    "stray-bits": "B" * (LONG + 1),
}

DOCUMENTS = {
    "lists": b"[" * LONG,
    "objects": b'{"a":' * (LONG // 5),
    "closed-lists": b"[" * 900 + b"]" * 900,
    "many-lists": b"[" + b",".join([b"[]"] * (LONG // 3)) + b"]",
    "many-members": b"{" + b",".join(b'"%d":0' % number for number in range(LONG // 9)) + b"}",
    "one-name": b"{" + b",".join([b'"a":0'] * (LONG // 6)) + b"}",
    "one-number": b"9" * LONG,
    "many-long-numbers": b"[" + b",".join([b"9" * 4300] * (LONG // 4301)) + b"]",
    "one-fraction": b"0." + b"9" * LONG,
    "one-exponent": b"1e" + b"9" * LONG,
    "escapes": b'"' + b"\\u00e9" * (LONG // 6) + b'"',
    "pairs-of-surrogates": b'"' + b"\\ud83d\\ude00" * (LONG // 12) + b'"',
    "open-text": b'"' + b"a" * LONG,
    "backslashes": b'"' + b"\\\\" * (LONG // 2),
    "blanks": b" " * LONG,
}


def bounded(action: Callable[[], object]) -> None:
    start = time.process_time()
    with contextlib.suppress(TokenExchangeError, ValueError):
        action()
    assert time.process_time() - start < BOUND_S


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in TEXTS.items()])
def test_res_16_reading_a_credential_is_linear(text: str) -> None:
    bounded(lambda: parse_authorization(text, max_length=10 * LONG))
    bounded(lambda: parse_authorization(f"Bearer {text}", max_length=10 * LONG))
    bounded(lambda: parse_token(text, max_length=10 * LONG))
    bounded(lambda: parse_compact(text, max_bytes=10 * LONG))
    bounded(lambda: parse_compact(f"{text}.{text}.{text}", max_bytes=10 * LONG))
    bounded(lambda: decode_base64url(text))


@pytest.mark.parametrize("document", [pytest.param(data, id=name) for name, data in DOCUMENTS.items()])
def test_res_16_reading_json_is_linear(document: bytes) -> None:
    bounded(lambda: parse_json(document, max_bytes=10 * LONG))
    bounded(lambda: parse_compact(compact(b'{"x":' + document + b"}"), max_bytes=10 * LONG))
    bounded(lambda: parse_jwk_set(b'{"keys":[],"x":' + document + b"}"))


def test_res_16_reading_claims_is_linear() -> None:
    names = [f"v{number}" for number in range(LONG // 8)]
    claims = issuer.claims(aud=names, scope=" ".join(names), scp=names)
    bounded(lambda: parse_claims(claims))
    bounded(lambda: parse_claims(issuer.claims(scope=" " * LONG)))
    bounded(lambda: parse_claims(issuer.claims(sub="\n" * LONG)))
    bounded(lambda: parse_claims(issuer.claims(exp=10**4000)))


def test_res_15_reading_the_largest_keys_is_bounded() -> None:
    huge = {"kty": "RSA", "n": b64_uint(2 ** (MAX_SET_BYTES * 5) - 1), "e": "AQAB"}
    bounded(lambda: parse_jwk_set(to_json({"keys": [huge]})))
    hundred = [{**issuer.keys["RS256"].jwk(kid=f"k{number}"), "x5c": ["M" * 1500]} for number in range(100)]
    bounded(lambda: parse_jwk_set(to_json({"keys": hundred})))
    same_kid = [
        {"kty": "RSA", "kid": "k", "n": b64_uint(2**2047 + 2 * number + 1), "e": "AQAB"}
        for number in range(100)
    ]
    bounded(lambda: parse_jwk_set(to_json({"keys": same_kid})))
