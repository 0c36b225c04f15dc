"""
What a refusal tells: marked tokens go through every refusal, and no mark comes out.

Every `reason` that the pure modules can give is provoked here; a new one without a case fails.
"""

import ast
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kong_token_exchange.core import claims as claims_module
from kong_token_exchange.core.claims import check_scopes_required, parse_claims
from kong_token_exchange.core.decision import decide
from kong_token_exchange.core.jwk import parse_jwk_set
from kong_token_exchange.core.jws import (
    ASYMMETRIC_ALGORITHMS,
    decode_base64url,
    parse_compact,
    verify_signature,
)
from kong_token_exchange.core.narrowing import check_same_subject
from kong_token_exchange.core.policy import ResultPolicy
from kong_token_exchange.errors import TokenExchangeError
from kong_token_exchange.protocol.bearer import parse_authorization, parse_token, render, select_credential
from tests.support.minting import ABSENT, b64, to_json, with_member
from tests.unit.core.pipeline import MAX_TOKEN, accept, issuer, stranger, trust

MARK = "MARKq7Zk"
# A piece of the token this long would let a reader look for it; a shorter one is chance.
PIECE = 12

MARKED: dict[str, Any] = {
    "sub": f"{MARK}-subject",
    "jti": f"{MARK}-id",
    "email": f"{MARK}@users.test",
    "azp": f"{MARK}-client",
    "aud": [f"{MARK}-audience"],
    "scope": f"{MARK}-scope",
    "scp": [f"{MARK}-scp"],
    "nested": {MARK: [MARK]},
}


def mint(header: dict[str, Any] | None = None, *, signer: Any = issuer, **changes: Any) -> str:
    token: str = signer.mint(header={f"x-{MARK}": MARK, **(header or {})}, **{**MARKED, **changes})
    return token


def craft(payload: bytes, header: bytes | None = None) -> str:
    return issuer.craft(header or to_json(issuer.header()), payload)


def marked_claims(**changes: Any) -> Any:
    return parse_claims({**issuer.claims(**MARKED), **changes})


def verify_with_another_key() -> None:
    jws = parse_compact(mint(), max_bytes=MAX_TOKEN)
    [key] = parse_jwk_set(issuer.jwks("ES256")).keys
    verify_signature(jws, key, algorithms=ASYMMETRIC_ALGORITHMS)


def same_subject_differs() -> None:
    policy = ResultPolicy(same_subject="sub")
    result = marked_claims(sub=f"{MARK}-other")
    check_same_subject(policy, relation="same_issuer", subject=marked_claims(), result=result)


DOUBLE = with_member(MARKED, "sub", f'"{MARK}"')
KEY = issuer.keys["RS256"].jwk(kid=MARK, x5c=[MARK])

# Each case: the reason it gives, and what gives it. A kid is told to the operator on purpose: it is
# compared with published key ids, so the cases about kids carry their mark elsewhere.
CASES: dict[str, tuple[str, Callable[[], object]]] = {
    "credential-bytes": (
        "credential_bytes",
        lambda: parse_authorization(f"Bearer {MARK}\xff", max_length=99),
    ),
    "credential-too-long": (
        "credential_too_long",
        lambda: parse_authorization("Bearer " + MARK * 99, max_length=99),
    ),
    "credential-malformed": (
        "credential_malformed",
        lambda: parse_authorization(f"Bearer {MARK} {MARK}", max_length=99),
    ),
    "credential-alone": ("credential_malformed", lambda: parse_token(f"{MARK},{MARK}", max_length=99)),
    "credential-repeated": ("credential_repeated", lambda: select_credential((MARK, f"{MARK}2"))),
    "no-credential": (
        "token_missing",
        lambda: select_credential((parse_authorization(f"Basic {MARK}", max_length=99),)),
    ),
    "too-long": ("token_too_long", lambda: accept(mint(), max_token=100)),
    "opaque": ("token_opaque", lambda: accept(f"{MARK}-opaque-credential")),
    "encrypted": ("token_encrypted", lambda: accept(f"{mint()}.{MARK}.{MARK}")),
    "base64url": ("jws_base64url", lambda: accept(mint() + "=")),
    "base64url-alone": ("jws_base64url", lambda: decode_base64url(f"{MARK}!")),
    "header-json": (
        "jws_header",
        lambda: accept(craft(to_json(MARKED), b'{"alg":"RS256","x":"%s' % MARK.encode())),
    ),
    "header-doubled": ("jws_header", lambda: accept(craft(to_json(MARKED), DOUBLE))),
    "payload-json": ("jws_payload", lambda: accept(craft(b'{"sub":"%s"' % MARK.encode()))),
    "payload-doubled": ("jws_payload", lambda: accept(craft(DOUBLE))),
    "payload-no-utf-8": ("jws_payload", lambda: accept(craft(b'{"sub":"%s\xff"}' % MARK.encode()))),
    "payload-deep": ("jws_payload", lambda: accept(craft(b'{"%s":%s' % (MARK.encode(), b"[" * 2000)))),
    "payload-list": ("jws_payload", lambda: accept(craft(to_json([MARK])))),
    "signature-empty": ("jws_signature_empty", lambda: accept(mint().rpartition(".")[0] + ".")),
    "header-member": ("jws_header_member", lambda: accept(mint({"alg": [MARK]}))),
    "header-kid": ("jws_header_member", lambda: accept(mint({"kid": f"{MARK} {MARK}"}))),
    "header-typ": ("jws_header_member", lambda: accept(mint({"typ": {MARK: MARK}}))),
    "header-unsupported": ("jws_header_unsupported", lambda: accept(mint({"crit": [MARK]}))),
    "algorithm": ("jwt_algorithm", lambda: accept(mint({"alg": MARK}))),
    "algorithm-known": ("jwt_algorithm", lambda: accept(mint({"alg": "HS256"}))),
    "issuer": ("issuer_unknown", lambda: accept(mint(iss=f"https://{MARK}.test"))),
    "issuer-no-text": ("issuer_unknown", lambda: accept(mint(iss=[MARK]))),
    "issuer-undecided": (
        "issuer_unknown",
        lambda: decide(marked_claims(iss=MARK), issuers=(), target_issuer="x"),
    ),
    "key-not-found": ("key_not_found", lambda: accept(mint(signer=stranger))),
    "key-ambiguous": (
        "key_ambiguous",
        lambda: accept(
            mint({"kid": ABSENT}),
            jwks=to_json({"keys": [KEY, stranger.keys["RS256"].jwk(kid=f"{MARK}2")]}),
        ),
    ),
    "key-algorithm": ("jwt_key_algorithm", verify_with_another_key),
    "signature": ("jwt_signature", lambda: accept(mint()[:-9] + "A" * 9)),
    "exp": ("jwt_timestamp", lambda: accept(mint(exp=1))),
    "nbf": ("jwt_timestamp", lambda: accept(mint(nbf=2**52))),
    "max-age": ("jwt_timestamp", lambda: accept(mint(iat=1), entry=trust(max_age=1))),
    **{
        f"claim-{name}": ("jwt_claim", lambda name=name, value=value: accept(mint(**{name: value})))  # type: ignore[misc]
        for name, value in {
            "exp": MARK,
            "nbf": [MARK],
            "sub": f"{MARK}\n",
            "aud": [MARK, 1],
            "azp": {MARK: MARK},
            "scope": f"{MARK}  {MARK}",
            "scp": [f"{MARK} "],
            "cnf": {"jkt": MARK},
            "typ": [MARK],
            "token_use": MARK,
            "at_hash": MARK,
        }.items()
    },
    "claim-iss": (
        "jwt_claim",
        lambda: claims_module.check_issuer(marked_claims(iss=MARK), expected="https://idp.test"),
    ),
    "claim-typ-header": ("jwt_claim", lambda: accept(mint({"typ": MARK}))),
    "claim-audience": ("jwt_claim", lambda: accept(mint(), entry=trust(audience=("api",)))),
    "claim-required": ("jwt_claim", lambda: accept(mint(), entry=trust(required_claims=("tenant",)))),
    "client": ("client_not_allowed", lambda: accept(mint(), entry=trust(clients=("client-1",)))),
    "scopes": (
        "scopes_required",
        lambda: check_scopes_required(marked_claims(), alternatives=(frozenset({"read"}),)),
    ),
    "subject": ("subject_differs", same_subject_differs),
    "jwks-malformed": ("jwks_malformed", lambda: parse_jwk_set(b'{"keys":["%s"' % MARK.encode())),
    "jwks-no-list": ("jwks_malformed", lambda: parse_jwk_set(to_json({"keys": MARK}))),
    "jwks-unusable": (
        "jwks_without_usable_key",
        lambda: parse_jwk_set(
            to_json({"keys": [{**KEY, "d": MARK}, {**KEY, "n": MARK}, {"kty": MARK}, MARK]})
        ),
    ),
}


@pytest.mark.parametrize(("reason", "action"), [pytest.param(*case, id=name) for name, case in CASES.items()])
def test_refusal_shows_nothing_of_the_token(reason: str, action: Callable[[], object]) -> None:
    with pytest.raises(TokenExchangeError) as caught:
        action()
    error = caught.value
    assert error.reason == reason
    answer = render(error)
    told = [
        str(error),
        repr(error),
        repr(error.args),
        json.dumps(error.facts),
        # With the whole chain, as a log would print it; quoted source lines name the mark, never its value.
        "".join(traceback.format_exception(error)),
        repr(answer),
        repr(dict(answer.headers)),
        answer.body.decode(),
    ]
    secrets = {MARK, MARK.lower(), *_pieces(b64(to_json(MARKED))), *_pieces(mint())}
    for text in told:
        assert not [piece for piece in secrets if piece in text]


def _pieces(token: str) -> set[str]:
    payload = token.split(".")[-2] if "." in token else token
    return {payload[at : at + PIECE] for at in range(len(payload) - PIECE + 1)}


def test_marks_would_be_found() -> None:
    claims = marked_claims()
    assert MARK in repr(claims.sub)
    assert [piece for piece in _pieces(mint()) if piece in mint()]


def test_parsed_token_does_not_print_itself() -> None:
    shown = repr(parse_compact(mint(), max_bytes=MAX_TOKEN))
    assert MARK not in shown
    assert not [piece for piece in _pieces(mint()) if piece in shown]


# Modules whose refusals need a proof beside the token; their own tests provoke them.
ELSEWHERE = {"dpop.py": "test_dpop.py", "possession.py": "test_possession.py"}


def test_every_reason_is_provoked() -> None:
    package = Path(claims_module.__file__).parent.parent
    sources = [*sorted((package / "core").glob("*.py")), package / "protocol" / "bearer.py"]
    reasons = {"jwt_timestamp", "jwt_claim"}  # these two are named in errors.py
    for source in sources:
        if source.name in ELSEWHERE:
            told = (Path(__file__).parent / ELSEWHERE[source.name]).read_text()
            assert set() == {reason for reason in _reasons(source) if reason not in told}
        else:
            reasons |= _reasons(source)
    assert reasons == {reason for reason, _ in CASES.values()}


def _reasons(source: Path) -> set[str]:
    reasons: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        named = isinstance(node, ast.keyword) and node.arg == "reason"
        bound = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "reason"
        if named or bound:
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            reasons.update(text for text in texts if isinstance(text, str))
    return reasons
