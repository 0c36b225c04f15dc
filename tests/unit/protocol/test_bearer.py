"""HDR rows: the credential as it came; and how every error is answered."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from kong_token_exchange import errors
from kong_token_exchange.errors import (
    AccessDeniedError,
    ConfigError,
    DeadlineError,
    InsufficientScopeError,
    IssuerUnavailableError,
    MalformedRequestError,
    MissingTokenError,
    TokenExchangeError,
)
from kong_token_exchange.protocol.bearer import (
    is_b64token,
    parse_authorization,
    parse_token,
    render,
    select_credential,
)
from tests.unit.core.pipeline import (
    BARE,
    INSUFFICIENT_SCOPE,
    INVALID_PROOF,
    INVALID_REQUEST,
    INVALID_TOKEN,
    refused,
)

TOKEN = "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJhIn0.c2ln"
MAX = 8192


def read(header: str) -> str:
    """Read the one credential of a request that has nothing but this header."""
    return select_credential((parse_authorization(header, max_length=MAX),))


ABSENT_CREDENTIALS = {
    # Kong gives "" both for a missing and for an empty header.
    "HDR-01-missing": "",
    "HDR-02-empty": "",
    "HDR-02-blank": " ",
    "HDR-10-basic": "Basic dXNlcjpwYXNz",
    "HDR-10-dpop": f"DPoP {TOKEN}",
    "HDR-10-negotiate": "Negotiate YII=",
    "HDR-10-long-negotiate": "Negotiate " + "Y" * 60_000,
    "HDR-10-token": f"Token {TOKEN}",
    "HDR-10-jwt": f"JWT {TOKEN}",
    "HDR-10-bearer-with-colon": f"Bearer: {TOKEN}",
    "HDR-10-longer-scheme": f"Bearer2 {TOKEN}",
    "HDR-10-shorter-scheme": f"Beare {TOKEN}",
    "HDR-10-quoted-scheme": f'"Bearer" {TOKEN}',
    "HDR-10-basic-then-bearer": f"Basic dXNlcjpwYXNz, Bearer {TOKEN}",
    "HDR-10-equals": f"Bearer={TOKEN}",
    "HDR-25-raw-token": TOKEN,
    "HDR-25-raw-opaque-token": "2YotnFZFEjr1zCsicMWpAA",
    "HDR-25-bearer-stuck-to-the-token": f"Bearer{TOKEN}",
    "HDR-25-blank-before-a-raw-token": f" {TOKEN}",
}


@pytest.mark.parametrize(
    "header", [pytest.param(header, id=row) for row, header in ABSENT_CREDENTIALS.items()]
)
def test_request_without_a_bearer_credential_gets_a_bare_challenge(header: str) -> None:
    assert parse_authorization(header, max_length=MAX) is None
    refused(MissingTokenError, "token_missing", read, header)


@pytest.mark.parametrize(
    "scheme",
    [pytest.param(scheme, id=f"HDR-04-{scheme!r}") for scheme in ("Bearer ", "bearer ", "BEARER ", "bEaReR ")]
    + [
        pytest.param("Bearer  ", id="HDR-05-two-spaces"),
        pytest.param("Bearer" + " " * 10, id="HDR-05-ten-spaces"),
    ],
)
@pytest.mark.parametrize("token", [TOKEN, "opaque", "a", "a==", "-._~+/", "0=", "Bearer"])
def test_token_is_read(scheme: str, token: str) -> None:
    assert read(scheme + token) == token


MALFORMED = {
    "HDR-03-scheme-alone": "Bearer",
    "HDR-03-scheme-and-blank": "Bearer ",
    "HDR-03-scheme-and-blanks": "bearer     ",
    "HDR-07-trailing-blank": f"Bearer {TOKEN} ",
    "HDR-09-two-credentials": f"Bearer {TOKEN}, Bearer {TOKEN}",
    "HDR-09-comma": f"Bearer {TOKEN},{TOKEN}",
    "HDR-09-comma-after": f"Bearer {TOKEN},",
    "HDR-09-comma-before": f"Bearer ,{TOKEN}",
    "HDR-09-basic-after": f"Bearer {TOKEN}, Basic dXNlcjpwYXNz",
    "HDR-09-auth-params": f'Bearer {TOKEN} realm="kong"',
    "HDR-09-auth-params-alone": f'Bearer token="{TOKEN}"',
    "HDR-09-semicolon": f"Bearer {TOKEN};q=1",
    "HDR-18-bearer-bearer": f"Bearer Bearer {TOKEN}",
    "HDR-18-bearer-basic": "Bearer Basic dXNlcjpwYXNz",
    "HDR-19-quotes": f'Bearer "{TOKEN}"',
    "HDR-19-single-quotes": f"Bearer '{TOKEN}'",
    "HDR-19-angle-brackets": f"Bearer <{TOKEN}>",
    "HDR-19-backslash": f"Bearer {TOKEN}\\",
    "HDR-20-percent": "Bearer a%2Eb",
    "HDR-20-ampersand": f"Bearer {TOKEN}&audience=admin",
    "HDR-20-braces": "Bearer ${jndi:x}",
    "HDR-20-json": 'Bearer {"payload":"e30"}',
    "HDR-20-star": "Bearer *",
    "HDR-20-equals-alone": "Bearer =",
    "HDR-20-equals-inside": "Bearer a=b",
    "HDR-20-at": "Bearer a@b",
}


@pytest.mark.parametrize("header", [pytest.param(header, id=row) for row, header in MALFORMED.items()])
def test_bearer_without_one_b64token_is_malformed(header: str) -> None:
    error = refused(MalformedRequestError, "credential_malformed", read, header)
    assert error.facts == {}


def odd_characters() -> Iterator[Any]:
    rows = {0: "HDR-16", 9: "HDR-06", 10: "HDR-21", 13: "HDR-21"}
    for code in [*range(0x20), 0x7F]:
        yield pytest.param(chr(code), id=f"{rows.get(code, 'HDR-12')}-{code:02x}")
    for text in (
        "\x80",
        "\xa0",
        "\xff",
        "é",
        "\uff22",
        "\u200b",
        "\u2028",
        "😀",
        "\udc80",
        "\udcff",
        "\ud800",
    ):
        yield pytest.param(text, id=f"HDR-13-{ord(text):04x}")


@pytest.mark.parametrize("odd", tuple(odd_characters()))
def test_bytes_that_no_credential_has_are_refused_wherever_they_stand(odd: str) -> None:
    for header in (
        f"Bearer {TOKEN}{odd}",
        f"Bearer {odd}{TOKEN}",
        f"Bearer {TOKEN[:9]}{odd}{TOKEN[9:]}",
        f"Bearer{odd}{TOKEN}",
        f"Bearer {odd} {TOKEN}",
        f"{odd}Bearer {TOKEN}",
        f"Bea{odd}rer {TOKEN}",
        f"Basic {odd}",
        odd,
    ):
        refused(MalformedRequestError, "credential_bytes", read, header)


def test_hdr_07_trailing_tab_is_refused() -> None:
    refused(MalformedRequestError, "credential_bytes", read, f"Bearer {TOKEN}\t")


@pytest.mark.parametrize(
    "spare", [pytest.param(spare, id=f"HDR-14-token-max{-spare:+}") for spare in (1, 0, -1)]
)
def test_length_is_bounded(spare: int) -> None:
    token = "a" * (MAX - spare)
    for read_token in (
        lambda: parse_authorization(f"Bearer {token}", max_length=MAX),
        lambda: parse_token(token, max_length=MAX),
        lambda: parse_token(f"Bearer {token}", max_length=MAX),
    ):
        if spare >= 0:
            assert read_token() == token
        else:
            refused(MalformedRequestError, "credential_too_long", read_token)


def test_hdr_14_spaces_after_the_scheme_are_bounded_too() -> None:
    token = "a" * MAX
    assert read("Bearer" + " " * 10 + token) == token
    refused(MalformedRequestError, "credential_too_long", read, "Bearer" + " " * 11 + token)


def test_hdr_14_overlong_credential_is_refused_before_anything_else_is_looked_at() -> None:
    refused(MalformedRequestError, "credential_too_long", read, "Bearer " + "\xff" * (MAX + 10))
    refused(MalformedRequestError, "credential_too_long", read, "Bearer" + " " * (MAX + 11))
    refused(MalformedRequestError, "credential_too_long", read, "bearer " + "=" * 10**6)


@pytest.mark.parametrize(
    "found",
    [
        pytest.param((TOKEN, "other"), id="HDR-11-different"),
        pytest.param((TOKEN, TOKEN), id="HDR-11-equal"),
        pytest.param((TOKEN, None, "other"), id="HDR-11-first-and-last"),
        pytest.param((None, TOKEN, TOKEN), id="HDR-11-not-in-the-header"),
        pytest.param((TOKEN, "a", "b"), id="HDR-11-three"),
    ],
)
def test_credentials_in_more_than_one_place_are_refused(found: tuple[str | None, ...]) -> None:
    error = refused(MalformedRequestError, "credential_repeated", select_credential, found)
    assert error.facts == {}


@pytest.mark.parametrize("found", [(TOKEN,), (TOKEN, None), (None, TOKEN, None)])
def test_the_one_credential_is_selected(found: tuple[str | None, ...]) -> None:
    assert select_credential(found) == TOKEN


@pytest.mark.parametrize("found", [(), (None,), (None, None, None)])
def test_no_credential_anywhere_is_missing(found: tuple[str | None, ...]) -> None:
    refused(MissingTokenError, "token_missing", select_credential, found)


# --- a token that stands alone --------------------------------------------------------


@pytest.mark.parametrize("value", [TOKEN, f"Bearer {TOKEN}", f"bearer   {TOKEN}", "a=="])
def test_token_of_a_named_place_may_carry_the_scheme(value: str) -> None:
    assert parse_token(value, max_length=MAX) == value.rpartition(" ")[2]


@pytest.mark.parametrize(
    "value",
    [
        *("\x00", "a\x00", "a\n", "a\r\nb", "\t", "a b", " a", "a ", "a,b", "a&b", "a%20b", "é", "\udcff"),
        *("Bearer ", "Bearer Bearer a", "Basic a", "DPoP a", '"a"', "a;b", "=", "Bearer\ta"),
    ],
)
def test_anything_but_one_b64token_is_refused(value: str) -> None:
    refused(MalformedRequestError, "credential_malformed", parse_token, value, max_length=MAX)


def test_empty_place_holds_no_credential() -> None:
    assert parse_token("", max_length=MAX) is None


@pytest.mark.parametrize(
    ("text", "good"), [("a", True), ("", False), ("=", False), ("a\n", False), ("a=b", False)]
)
def test_b64token(text: str, good: bool) -> None:
    assert is_b64token(text) is good


# --- answers --------------------------------------------------------------------------

INVALID = ("MalformedTokenError", "UnsupportedAlgorithmError", "KeySelectionError", "UnknownIssuerError")
ANSWERS: dict[str, tuple[int, str, str | None]] = {
    "MissingTokenError": (401, "unauthorized", BARE),
    "MalformedRequestError": (400, "invalid_request", INVALID_REQUEST),
    **dict.fromkeys(
        (*INVALID, "InvalidTokenError", "SignatureError", "RefusedTokenError", "PossessionError"),
        (401, "invalid_token", INVALID_TOKEN),
    ),
    "TimestampError": (401, "invalid_token", INVALID_TOKEN),
    "ClaimError": (401, "invalid_token", INVALID_TOKEN),
    "ProofError": (401, "invalid_dpop_proof", INVALID_PROOF),
    "InsufficientScopeError": (403, "insufficient_scope", INSUFFICIENT_SCOPE),
    "AccessDeniedError": (403, "access_denied", BARE),
    "ClientRefusedError": (500, "server_error", None),
    "ConfigurationInvalidError": (500, "server_error", None),
    "GatewayError": (500, "server_error", None),
    "ConfigError": (500, "server_error", None),
    "NonConformingResponseError": (502, "server_error", None),
    "ExchangedTokenError": (502, "server_error", None),
    "IssuerUnavailableError": (503, "temporarily_unavailable", None),
    "DeadlineError": (504, "temporarily_unavailable", None),
    "ProtocolError": (500, "server_error", None),
    "LocalProtocolError": (500, "server_error", None),
    "RemoteProtocolError": (500, "server_error", None),
}


def make(name: str) -> TokenExchangeError:
    kind = getattr(errors, name)
    if kind is ConfigError:
        return ConfigError("issuer", "MARK")
    named = {"claim": "MARK"} if name in ("TimestampError", "ClaimError") else {"reason": "MARK"}
    error: TokenExchangeError = kind(**named, facts={"MARK": "MARK"})
    return error


@pytest.mark.parametrize("name", ANSWERS)
def test_out_13_14_answer_is_made_of_the_class_alone(name: str) -> None:
    status, code, challenge = ANSWERS[name]
    error = make(name)
    answer = render(error)

    assert (status, challenge) == (answer.status, answer.headers.get("WWW-Authenticate"))
    assert json.loads(answer.body) == {"error": code, "error_description": type(error).description}
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-store"
    assert "MARK" not in f"{answer!r}{answer.headers}"
    assert ("Retry-After" in answer.headers) is (name == "IssuerUnavailableError")


def test_every_class_of_the_tree_has_an_answer() -> None:
    everyone = {name for name, kind in vars(errors).items() if isinstance(kind, type) and _is_error(kind)}
    assert everyone - {"TokenExchangeError", "RejectionError"} == set(ANSWERS)


def _is_error(kind: type) -> bool:
    return issubclass(kind, TokenExchangeError)


@pytest.mark.parametrize(
    "error", [ValueError("MARK"), KeyError("MARK"), RecursionError(), MemoryError("MARK"), SystemExit("MARK")]
)
def test_unforeseen_errors_are_a_constant_500(error: BaseException) -> None:
    answer = render(error)

    assert (answer.status, answer.headers.get("WWW-Authenticate")) == (500, None)
    assert "Retry-After" not in answer.headers
    assert json.loads(answer.body) == {
        "error": "server_error",
        "error_description": "the gateway could not process the request",
    }


def test_scope_of_the_challenge_is_told() -> None:
    answer = render(InsufficientScopeError(reason="scopes_required", scope="read write"))
    assert answer.headers["WWW-Authenticate"] == f'{INSUFFICIENT_SCOPE}, scope="read write"'


@pytest.mark.parametrize(
    "scope", ['a" x="', "a\r\nSet-Cookie: b=c", "a  b", " a", "a ", "a\\b", "é", "a\tb", "\x00", " "]
)
def test_scope_that_would_break_the_challenge_is_left_out(scope: str) -> None:
    answer = render(InsufficientScopeError(reason="scopes_required", scope=scope))
    assert answer.headers["WWW-Authenticate"] == INSUFFICIENT_SCOPE


def test_wait_is_told() -> None:
    assert render(IssuerUnavailableError(reason="x", retry_after=7)).headers["Retry-After"] == "7"
    assert render(IssuerUnavailableError(reason="x")).headers["Retry-After"] == "1"
    assert "Retry-After" not in render(DeadlineError(reason="x")).headers


def test_answer_is_shared_and_cannot_be_changed() -> None:
    answer = render(AccessDeniedError(reason="a"))

    assert render(AccessDeniedError(reason="b")) is answer
    with pytest.raises(TypeError):
        answer.headers["Set-Cookie"] = "a=b"  # type: ignore[index]


def test_challenges_are_well_formed() -> None:
    for name in ANSWERS:
        answer = render(make(name))
        for value in answer.headers.values():
            assert value.isascii()
            assert value.isprintable()
            assert value.count('"') % 2 == 0
        assert answer.body.isascii()
