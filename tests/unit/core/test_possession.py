"""What a token is bound to decides what its sender must show."""

from typing import Any, Literal

import pytest

from kong_token_exchange.core.claims import Claims, parse_claims
from kong_token_exchange.core.policy import PossessionPolicy
from kong_token_exchange.core.possession import (
    NO_EVIDENCE,
    Confirmation,
    Evidence,
    check_certificate,
    check_scheme,
    required_confirmation,
)
from kong_token_exchange.errors import ClaimError, PossessionError
from tests.support.minting import ABSENT, FakeIssuer, b64

DIGEST, OTHER = b64(bytes(32)), b64(bytes(31) + b"\x04")

Mode = Literal["off", "optional", "strict"]


def claims(cnf: Any) -> Claims:
    return parse_claims(FakeIssuer().claims(cnf=cnf))


KEY, CERTIFICATE = {"jkt": DIGEST}, {"x5t#S256": DIGEST}
BOUND_TO_KEY, BOUND_TO_CERTIFICATE = Confirmation(jkt=DIGEST), Confirmation(x5t_s256=DIGEST)

ROWS: list[tuple[Any, Mode, Mode, Confirmation | str]] = [
    (ABSENT, "optional", "off", Confirmation()),
    (ABSENT, "optional", "optional", Confirmation()),
    (ABSENT, "strict", "off", "token_not_bound"),
    (ABSENT, "off", "strict", "token_not_bound"),
    (KEY, "optional", "off", BOUND_TO_KEY),
    (KEY, "strict", "optional", BOUND_TO_KEY),
    (KEY, "off", "optional", "jwt_claim"),
    (KEY, "optional", "strict", "token_not_bound"),
    (CERTIFICATE, "off", "optional", BOUND_TO_CERTIFICATE),
    (CERTIFICATE, "off", "strict", BOUND_TO_CERTIFICATE),
    (CERTIFICATE, "strict", "optional", "token_not_bound"),
    (CERTIFICATE, "optional", "off", "jwt_claim"),
    ({**KEY, **CERTIFICATE}, "optional", "optional", Confirmation(jkt=DIGEST, x5t_s256=DIGEST)),
    ({**KEY, **CERTIFICATE}, "strict", "strict", Confirmation(jkt=DIGEST, x5t_s256=DIGEST)),
    # A proof of one key is none of the other.
    ({**KEY, **CERTIFICATE}, "optional", "off", "jwt_claim"),
    ({**KEY, **CERTIFICATE}, "off", "optional", "jwt_claim"),
]


@pytest.mark.parametrize(("cnf", "dpop", "mtls", "expected"), ROWS)
def test_every_binding_is_proven_or_refused(
    cnf: Any, dpop: Mode, mtls: Mode, expected: Confirmation | str
) -> None:
    policy = PossessionPolicy(dpop=dpop, mtls=mtls)

    if isinstance(expected, str):
        with pytest.raises((ClaimError, PossessionError)) as caught:
            required_confirmation(claims(cnf), policy=policy)
        assert (expected, 401) == (caught.value.reason, caught.value.status)
    else:
        assert expected == required_confirmation(claims(cnf), policy=policy)


@pytest.mark.parametrize(
    "cnf",
    [
        None, {}, [], "x", {"jkt": None}, {"jkt": 1}, {"jkt": ""}, {"jkt": DIGEST + "="}, {"jkt": DIGEST[1:]},
        {"jkt": f"{DIGEST}\n"}, {"x5t#S256": ["x"]}, {"jkt": DIGEST, "kid": "a"}, {"jwk": {"kty": "EC"}},
        {"jku": "https://keys.test"}, {"x5t": DIGEST},
    ],
)  # fmt: skip
def test_clm_27_a_binding_that_is_not_understood_is_refused(cnf: Any) -> None:
    with pytest.raises(ClaimError) as caught:
        required_confirmation(claims(cnf), policy=PossessionPolicy(dpop="optional", mtls="optional"))

    assert "cnf" == caught.value.claim


@pytest.mark.parametrize(
    ("scheme", "bound", "fits"),
    [
        ("dpop", BOUND_TO_KEY, True),
        ("bearer", BOUND_TO_KEY, False),
        ("dpop", BOUND_TO_CERTIFICATE, False),
        ("bearer", BOUND_TO_CERTIFICATE, True),
        ("dpop", Confirmation(), False),
        ("bearer", Confirmation(), True),
    ],
)
def test_the_scheme_dpop_is_for_tokens_that_are_bound_to_a_key(
    scheme: Literal["bearer", "dpop"], bound: Confirmation, fits: bool
) -> None:
    evidence = Evidence(scheme=scheme)

    if fits:
        check_scheme(evidence, bound=bound)
    else:
        with pytest.raises(PossessionError, match="scheme_not_for_this_token"):
            check_scheme(evidence, bound=bound)


def test_the_certificate_is_the_tokens() -> None:
    check_certificate(Evidence(x5t_s256=DIGEST), x5t_s256=DIGEST)
    with pytest.raises(PossessionError, match="certificate_differs"):
        check_certificate(Evidence(x5t_s256=OTHER), x5t_s256=DIGEST)
    with pytest.raises(PossessionError, match="certificate_missing"):
        check_certificate(NO_EVIDENCE, x5t_s256=DIGEST)
