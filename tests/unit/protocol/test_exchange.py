"""EXC rows: the form that is sent, and every way an answer can be wrong."""

import json

import pytest

from kong_token_exchange.errors import (
    AccessDeniedError,
    ClientRefusedError,
    InsufficientScopeError,
    IssuerUnavailableError,
    NonConformingResponseError,
    RefusedTokenError,
    TokenExchangeError,
)
from kong_token_exchange.protocol.exchange import (
    GRANT_JWT_BEARER,
    GRANT_TOKEN_EXCHANGE,
    MAX_RESPONSE_BYTES,
    ActorToken,
    ExchangeParameters,
    ExchangeResponse,
    GrantType,
    build_exchange_request,
    process_exchange_response,
)
from kong_token_exchange.protocol.http_message import HttpResponse
from tests.support.fakes import (
    ACCESS_TOKEN_TYPE,
    error_response,
    form_of,
    json_response,
    token_document,
    token_response,
)

ENDPOINT = "https://idp.test/token"
SUBJECT = "aaa.bbb.ccc"
TOKEN = "ddd.eee.fff"
JWT_TYPE = "urn:ietf:params:oauth:token-type:jwt"
MAX_TOKEN = 8192


def build(parameters: ExchangeParameters | None = None, subject: str = SUBJECT) -> list[tuple[str, str]]:
    request = build_exchange_request(
        ENDPOINT,
        parameters=parameters or ExchangeParameters(),
        subject_token=subject,
        subject_token_type=ACCESS_TOKEN_TYPE,
    )
    return form_of(request)


def process(response: HttpResponse, grant_type: GrantType = "token_exchange") -> ExchangeResponse:
    return process_exchange_response(
        response, grant_type=grant_type, subject_token=SUBJECT, max_token_size=MAX_TOKEN
    )


def refusal(response: HttpResponse, grant_type: GrantType = "token_exchange") -> TokenExchangeError:
    with pytest.raises(TokenExchangeError) as caught:
        process(response, grant_type)
    return caught.value


def with_json(text: str) -> HttpResponse:
    return HttpResponse(status=200, headers={"content-type": "application/json"}, body=text.encode())


# --- the request ----------------------------------------------------------------------


def test_exc_04_the_plain_request_names_the_subject_token_and_its_type() -> None:
    assert [
        ("grant_type", GRANT_TOKEN_EXCHANGE),
        ("subject_token", SUBJECT),
        ("subject_token_type", "urn:ietf:params:oauth:token-type:access_token"),
    ] == build()


def test_a_full_request_repeats_audience_and_resource_and_joins_scopes() -> None:
    parameters = ExchangeParameters(
        audience=("orders", "reports"),
        resource=("https://a.test/", "https://b.test/"),
        scopes=("read", "write"),
        requested_token_type=JWT_TYPE,
        extra_parameters=(("connector_id", "ldap"),),
    )

    assert [
        ("requested_token_type", JWT_TYPE),
        ("audience", "orders"),
        ("audience", "reports"),
        ("resource", "https://a.test/"),
        ("resource", "https://b.test/"),
        ("scope", "read write"),
        ("connector_id", "ldap"),
    ] == build(parameters)[3:]


def test_a_jwt_bearer_request_is_an_assertion() -> None:
    parameters = ExchangeParameters(grant_type="jwt_bearer", scopes=("read",), requested_token_type=JWT_TYPE)

    assert [("grant_type", GRANT_JWT_BEARER), ("assertion", SUBJECT), ("scope", "read")] == build(parameters)


HOSTILE_VALUES = {
    "EXC-01-parameter": "x&audience=admin",
    "EXC-01-equals": "x=y",
    "EXC-01-percent": "x%26audience%3Dadmin",
    "EXC-01-plus": "x+y z",
    "EXC-01-semicolon": "x;audience=admin",
    "EXC-01-line-break": "x\r\naudience=admin",
    "EXC-01-nul": "x\x00y",
    "EXC-01-not-ascii": "x\u00e9\u20ac\U0001f600",
    "EXC-01-hash": "x#y?z",
}


@pytest.mark.parametrize("value", HOSTILE_VALUES.values(), ids=HOSTILE_VALUES.keys())
def test_every_value_of_the_form_is_encoded(value: str) -> None:
    parameters = ExchangeParameters(
        audience=(value,),
        resource=(value,),
        scopes=(value,),
        requested_token_type=value,
        extra_parameters=((value, value),),
    )

    form = build(parameters, subject=value)

    assert [
        ("grant_type", GRANT_TOKEN_EXCHANGE),
        ("subject_token", value),
        ("subject_token_type", ACCESS_TOKEN_TYPE),
        ("requested_token_type", value),
        ("audience", value),
        ("resource", value),
        ("scope", value),
        (value, value),
    ] == form


def test_exc_02_tokens_are_in_the_body_and_nowhere_else() -> None:
    request = build_exchange_request(
        ENDPOINT,
        parameters=ExchangeParameters(extra_headers=(("X-Tenant", "a"), ("accept", "text/html"))),
        subject_token=SUBJECT,
        subject_token_type=ACCESS_TOKEN_TYPE,
    )

    assert ("POST", ENDPOINT) == (request.method, request.url)
    assert SUBJECT not in repr(request)
    assert not any(SUBJECT in value for value in request.headers.values())
    assert {"X-Tenant": "a", "Content-Type": "application/x-www-form-urlencoded"}.items() <= (
        request.headers.items()
    )
    assert "application/json" == request.headers["Accept"]


# --- a good answer --------------------------------------------------------------------


def test_a_good_answer_is_read() -> None:
    response = process(token_response(TOKEN, scope="read write", refresh_token="mark-r", id_token="mark-i"))

    assert TOKEN == response.access_token.reveal()
    assert (ACCESS_TOKEN_TYPE, 300, frozenset({"read", "write"})) == (
        response.issued_token_type,
        response.expires_in,
        response.scopes,
    )


def test_exc_23_other_tokens_of_the_answer_are_dropped() -> None:
    response = process(token_response(TOKEN, refresh_token="mark-refresh", id_token="mark-id"))

    kept = [getattr(response, name) for name in ExchangeResponse.__slots__]
    assert "mark" not in repr(kept)
    assert TOKEN not in repr(response)


GOOD_ANSWERS = {
    "EXC-10-bearer-lower-case": token_document(TOKEN, token_type="bearer"),
    "EXC-10-bearer-upper-case": token_document(TOKEN, token_type="BEARER"),
    "EXC-12-jwt": token_document(TOKEN, issued_token_type=JWT_TYPE),
    "EXC-11-longest": token_document("a" * MAX_TOKEN),
    "EXC-11-opaque": token_document("Ab1-._~+/=="),
    "EXC-13-absent": token_document(TOKEN, expires_in=...),
    "EXC-13-one": token_document(TOKEN, expires_in=1),
    "EXC-13-longest": token_document(TOKEN, expires_in=2**31 - 1),
    "scope-null": token_document(TOKEN, scope=None),
    "unknown-members": token_document(TOKEN, session_state="x", nested={"a": [1]}),
}


@pytest.mark.parametrize("document", GOOD_ANSWERS.values(), ids=GOOD_ANSWERS.keys())
def test_good_answers_pass(document: dict[str, object]) -> None:
    response = process(json_response(document))

    assert document["access_token"] == response.access_token.reveal()
    assert document.get("expires_in") == response.expires_in


def test_a_jwt_bearer_answer_need_not_name_the_issued_type() -> None:
    assert process(token_response(TOKEN, issued_token_type=...), "jwt_bearer").issued_token_type is None


# --- answers that are not usable ------------------------------------------------------

UNUSABLE = {
    "EXC-10-dpop": ({"token_type": "DPoP"}, "token_type_not_bearer"),
    "EXC-10-n_a": ({"token_type": "N_A"}, "token_type_not_bearer"),
    "EXC-10-mac": ({"token_type": "mac"}, "token_type_not_bearer"),
    "EXC-10-absent": ({"token_type": ...}, "token_type_not_bearer"),
    "EXC-10-null": ({"token_type": None}, "token_type_not_bearer"),
    "EXC-10-list": ({"token_type": ["Bearer"]}, "token_type_not_bearer"),
    "EXC-10-line-break": ({"token_type": "Bearer\r\nX: y"}, "token_type_not_bearer"),
    "EXC-10-space": ({"token_type": "Bearer "}, "token_type_not_bearer"),
    "EXC-10-two-words": ({"token_type": "Bearer realm"}, "token_type_not_bearer"),
    "EXC-11-absent": ({"access_token": ...}, "access_token_malformed"),
    "EXC-11-empty": ({"access_token": ""}, "access_token_malformed"),
    "EXC-11-null": ({"access_token": None}, "access_token_malformed"),
    "EXC-11-number": ({"access_token": 7}, "access_token_malformed"),
    "EXC-11-bool": ({"access_token": True}, "access_token_malformed"),
    "EXC-11-list": ({"access_token": [TOKEN]}, "access_token_malformed"),
    "EXC-11-object": ({"access_token": {"a": TOKEN}}, "access_token_malformed"),
    "EXC-11-space": ({"access_token": "a b"}, "access_token_malformed"),
    "EXC-11-space-before": ({"access_token": " a"}, "access_token_malformed"),
    "EXC-11-line-break": ({"access_token": "a\r\nX-Admin: 1"}, "access_token_malformed"),
    "EXC-11-line-break-after": ({"access_token": "a\n"}, "access_token_malformed"),
    "EXC-11-comma": ({"access_token": "a,b"}, "access_token_malformed"),
    "EXC-11-quote": ({"access_token": 'a"b'}, "access_token_malformed"),
    "EXC-11-not-ascii": ({"access_token": "\u0430"}, "access_token_malformed"),
    "EXC-11-nul": ({"access_token": "a\x00b"}, "access_token_malformed"),
    "EXC-11-equals-inside": ({"access_token": "a=b"}, "access_token_malformed"),
    "EXC-11-too-long": ({"access_token": "a" * (MAX_TOKEN + 1)}, "access_token_malformed"),
    "EXC-12-absent": ({"issued_token_type": ...}, "issued_token_type_missing"),
    "EXC-12-null": ({"issued_token_type": None}, "issued_token_type_missing"),
    "EXC-12-id-token": (
        {"issued_token_type": "urn:ietf:params:oauth:token-type:id_token"},
        "issued_token_type_unusable",
    ),
    "EXC-12-refresh-token": (
        {"issued_token_type": "urn:ietf:params:oauth:token-type:refresh_token"},
        "issued_token_type_unusable",
    ),
    "EXC-12-saml": (
        {"issued_token_type": "urn:ietf:params:oauth:token-type:saml2"},
        "issued_token_type_unusable",
    ),
    "EXC-12-id-jag": (
        {"issued_token_type": "urn:ietf:params:oauth:token-type:id-jag"},
        "issued_token_type_unusable",
    ),
    "EXC-12-upper-case": ({"issued_token_type": ACCESS_TOKEN_TYPE.upper()}, "issued_token_type_unusable"),
    "EXC-12-short": ({"issued_token_type": "access_token"}, "issued_token_type_unusable"),
    "EXC-12-list": ({"issued_token_type": [ACCESS_TOKEN_TYPE]}, "issued_token_type_unusable"),
    "EXC-13-zero": ({"expires_in": 0}, "expires_in_unusable"),
    "EXC-13-negative": ({"expires_in": -1}, "expires_in_unusable"),
    "EXC-13-string": ({"expires_in": "300"}, "expires_in_unusable"),
    "EXC-13-float": ({"expires_in": 300.5}, "expires_in_unusable"),
    "EXC-13-whole-float": ({"expires_in": 300.0}, "expires_in_unusable"),
    "EXC-13-bool": ({"expires_in": True}, "expires_in_unusable"),
    "EXC-13-null": ({"expires_in": None}, "expires_in_unusable"),
    "EXC-13-list": ({"expires_in": [300]}, "expires_in_unusable"),
    "EXC-13-huge": ({"expires_in": 2**31}, "expires_in_unusable"),
    "EXC-13-enormous": ({"expires_in": 10**300}, "expires_in_unusable"),
    "EXC-20-echo": ({"access_token": SUBJECT}, "subject_token_echoed"),
    "scope-list": ({"scope": ["read"]}, "scope_malformed"),
    "scope-number": ({"scope": 1}, "scope_malformed"),
}


def test_exc_04_an_actor_token_is_sent_beside_its_type() -> None:
    def form_with(parameters: ExchangeParameters, actor: ActorToken | None) -> list[tuple[str, str]]:
        return form_of(
            build_exchange_request(
                "https://idp.test/token",
                parameters=parameters,
                subject_token=SUBJECT,
                subject_token_type=ACCESS_TOKEN_TYPE,
                actor=actor,
            )
        )

    actor = ActorToken(token="a+b/c==&x=y", token_type="urn:x:y")
    members = [("actor_token", "a+b/c==&x=y"), ("actor_token_type", "urn:x:y")]

    sent = form_with(ExchangeParameters(), actor)
    assert members == [member for member in sent if member[0].startswith("actor")]
    # Neither without the other, and none where the grant knows no actor.
    assert not [name for name, _ in form_with(ExchangeParameters(), None) if name.startswith("actor")]
    bearer = ExchangeParameters(grant_type="jwt_bearer")
    assert not [name for name, _ in form_with(bearer, actor) if name.startswith("actor")]
    assert "a+b" not in repr(actor)


@pytest.mark.parametrize(("members", "reason"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_unusable_answers_are_502(members: dict[str, object], reason: str) -> None:
    error = refusal(token_response(TOKEN, **members))

    assert NonConformingResponseError is type(error)
    assert (502, reason, {}) == (error.status, error.reason, error.facts)


@pytest.mark.parametrize(
    "issued",
    ["urn:ietf:params:oauth:token-type:id_token", "", 1],
    ids=["EXC-12-bearer-id-token", "EXC-12-bearer-empty", "EXC-12-bearer-number"],
)
def test_a_jwt_bearer_answer_that_names_another_type_is_502(issued: object) -> None:
    error = refusal(token_response(TOKEN, issued_token_type=issued), "jwt_bearer")

    assert (502, "issued_token_type_unusable") == (error.status, error.reason)


GOOD_TEXT = json.dumps(token_document(TOKEN))

NOT_A_DOCUMENT = {
    "EXC-13-nan": with_json(GOOD_TEXT.replace("300", "NaN")),
    "EXC-13-infinity": with_json(GOOD_TEXT.replace("300", "1e400")),
    "EXC-25-token-twice": with_json(GOOD_TEXT[:-1] + ', "access_token": "x"}'),
    "EXC-25-type-twice": with_json(GOOD_TEXT[:-1] + ', "token_type": "Bearer"}'),
    "EXC-26-html": HttpResponse(status=200, headers={"content-type": "text/html"}, body=b"<html>"),
    "EXC-26-json-as-html": HttpResponse(
        status=200, headers={"content-type": "text/html"}, body=GOOD_TEXT.encode()
    ),
    "EXC-26-json-as-text": HttpResponse(
        status=200, headers={"content-type": "text/plain"}, body=GOOD_TEXT.encode()
    ),
    "EXC-26-no-type": HttpResponse(status=200, body=GOOD_TEXT.encode()),
    "EXC-26-two-types": HttpResponse(
        status=200, headers={"content-type": "application/json, text/html"}, body=GOOD_TEXT.encode()
    ),
    "EXC-26-form": HttpResponse(
        status=200,
        headers={"content-type": "application/x-www-form-urlencoded"},
        body=b"access_token=x&token_type=bearer",
    ),
    "EXC-26-empty": with_json(""),
    "EXC-26-cut": with_json(GOOD_TEXT[:-1]),
    "EXC-26-cut-in-token": with_json(GOOD_TEXT[:20]),
    "EXC-26-list": with_json(f"[{GOOD_TEXT}]"),
    "EXC-26-string": with_json(json.dumps(GOOD_TEXT)),
    "EXC-26-null": with_json("null"),
    "EXC-26-two-documents": with_json(GOOD_TEXT + GOOD_TEXT),
    "EXC-26-deep": with_json('{"a":' + "[" * 500 + "]" * 500 + "}"),
    "EXC-26-bom": with_json("\ufeff" + GOOD_TEXT),
    "EXC-26-utf-16": HttpResponse(
        status=200, headers={"content-type": "application/json"}, body=GOOD_TEXT.encode("utf-16")
    ),
    "EXC-26-too-long": with_json(GOOD_TEXT[:-1] + " " * MAX_RESPONSE_BYTES + "}"),
}


@pytest.mark.parametrize("response", NOT_A_DOCUMENT.values(), ids=NOT_A_DOCUMENT.keys())
def test_answers_that_are_no_json_object_are_502(response: HttpResponse) -> None:
    error = refusal(response)

    assert (502, "response_not_json") == (error.status, error.reason)


def test_a_charset_parameter_changes_nothing() -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}

    response = process(HttpResponse(status=200, headers=headers, body=GOOD_TEXT.encode()))

    assert TOKEN == response.access_token.reveal()


def test_an_error_with_status_200_is_502() -> None:
    error = refusal(json_response({"error": "invalid_grant"}))

    assert (502, "access_token_malformed") == (error.status, error.reason)


@pytest.mark.parametrize(
    "status",
    [100, 103, 201, 202, 203, 204, 206, 300, 301, 302, 303, 304, 307, 308],
    ids=lambda status: f"{'EXC-27' if status >= 300 else 'EXC-32'}-{status}",
)
def test_a_good_document_with_any_other_status_is_502(status: int) -> None:
    error = refusal(json_response(token_document(TOKEN), status, location="https://evil.test/"))

    assert (502, "response_status", {"http_status": status}) == (error.status, error.reason, error.facts)


# --- OAuth errors ---------------------------------------------------------------------

OAUTH_ERRORS = {
    "EXC-28-invalid-grant": ("invalid_grant", None, 400, RefusedTokenError, "subject_token_refused"),
    "EXC-28-invalid-token": ("invalid_token", "expired", 400, RefusedTokenError, "subject_token_refused"),
    "EXC-28-invalid-request": ("invalid_request", None, 400, ClientRefusedError, "client_refused"),
    "EXC-28-invalid-client": ("invalid_client", None, 401, ClientRefusedError, "client_refused"),
    "EXC-28-unauthorized-client": ("unauthorized_client", None, 400, ClientRefusedError, "client_refused"),
    "EXC-28-unsupported-grant": ("unsupported_grant_type", None, 400, ClientRefusedError, "client_refused"),
    "EXC-28-unsupported-type": ("unsupported_token_type", None, 400, ClientRefusedError, "client_refused"),
    "EXC-28-invalid-scope": ("invalid_scope", None, 400, InsufficientScopeError, "scope_refused"),
    "EXC-28-invalid-target": ("invalid_target", None, 400, AccessDeniedError, "target_refused"),
    "EXC-28-access-denied": ("access_denied", None, 403, AccessDeniedError, "target_refused"),
    "EXC-28-access-denied-400": ("access_denied", None, 400, AccessDeniedError, "target_refused"),
    "EXC-28-made-up": ("made_up", None, 400, ClientRefusedError, "client_refused"),
    "EXC-28-markup": ("<script>\r\nX: y", "<b>", 400, ClientRefusedError, "client_refused"),
    "EXC-28-unavailable": (
        "temporarily_unavailable",
        None,
        400,
        IssuerUnavailableError,
        "token_endpoint_failed",
    ),
    "EXC-28-server-error": ("server_error", None, 400, IssuerUnavailableError, "token_endpoint_failed"),
    "EXC-28-slow-down": ("slow_down", None, 400, IssuerUnavailableError, "token_endpoint_overloaded"),
    # The words of servers, as their documentation or source has them.
    "keycloak-subject": ("invalid_request", "Invalid token", 400, RefusedTokenError, "subject_token_refused"),
    "keycloak-audience-of-subject": (
        "access_denied",
        "Client is not within the token audience",
        403,
        AccessDeniedError,
        "target_refused",
    ),
    "keycloak-secret": (
        "unauthorized_client",
        "Invalid client or Invalid client credentials",
        401,
        ClientRefusedError,
        "client_refused",
    ),
    "keycloak-client": (
        "invalid_client",
        "Invalid client or Invalid client credentials",
        401,
        ClientRefusedError,
        "client_refused",
    ),
    "keycloak-scope": (
        "invalid_scope",
        "Invalid scopes: orders nonsense",
        400,
        InsufficientScopeError,
        "scope_refused",
    ),
    "keycloak-audience": (
        "invalid_client",
        "Audience not found",
        400,
        ClientRefusedError,
        "audience_unknown",
    ),
    "keycloak-audience-disabled": (
        "invalid_client",
        "Client disabled",
        400,
        ClientRefusedError,
        "audience_unknown",
    ),
    "keycloak-audience-without-scope": (
        "invalid_request",
        "Requested audience not available: reports-api",
        400,
        ClientRefusedError,
        "audience_unknown",
    ),
    "keycloak-switched-off": (
        "invalid_request",
        "Standard token exchange is not enabled for the requested client",
        400,
        ClientRefusedError,
        "client_refused",
    ),
    "keycloak-type": (
        "invalid_request",
        "Invalid token type, must be access token",
        400,
        ClientRefusedError,
        "client_refused",
    ),
    "keycloak-realm": ("Realm does not exist", None, 404, ClientRefusedError, "client_refused"),
    "okta-subject": (
        "invalid_request",
        "'subject_token' is invalid",
        400,
        RefusedTokenError,
        "subject_token_refused",
    ),
    "okta-subject-more": (
        "invalid_request",
        "'subject_token' is invalid: no delegation policy authorizes this token.",
        400,
        RefusedTokenError,
        "subject_token_refused",
    ),
    "dex-subject": ("access_denied", "", 401, RefusedTokenError, "subject_token_refused"),
    "entra-interaction": (
        "interaction_required",
        "AADSTS50079: ...",
        400,
        RefusedTokenError,
        "interaction_required",
    ),
    "entra-consent": ("consent_required", None, 400, RefusedTokenError, "interaction_required"),
    "entra-login": ("login_required", None, 400, RefusedTokenError, "interaction_required"),
    "entra-assertion": (
        "invalid_grant",
        "AADSTS50013: Assertion failed signature validation.",
        400,
        RefusedTokenError,
        "subject_token_refused",
    ),
}


@pytest.mark.parametrize(
    ("error", "description", "status", "kind", "reason"), OAUTH_ERRORS.values(), ids=OAUTH_ERRORS.keys()
)
def test_oauth_errors_mean_what_the_table_says(
    error: str, description: str | None, status: int, kind: type[TokenExchangeError], reason: str
) -> None:
    refused = refusal(error_response(error, description, status))

    assert (kind, reason) == (type(refused), refused.reason)
    known = error if error.replace("_", "").islower() and " " not in error and error != "made_up" else "other"
    assert {"http_status": status, "error": known} == refused.facts


# Keycloak's JWT authorization grant says invalid_grant for all of these, with status 400.
ASSERTION_REFUSALS = {
    "Token reuse detected": (IssuerUnavailableError, "assertion_reused", 503),
    "Invalid signature": (IssuerUnavailableError, "assertion_keys_missing", 503),
    "JWT Authorization Grant is not supported for the requested client": (
        ClientRefusedError,
        "grant_not_set_up",
        500,
    ),
    "Public client not allowed to use authorization grant": (ClientRefusedError, "grant_not_set_up", 500),
    "No Identity Provider for provided issuer": (ClientRefusedError, "grant_not_set_up", 500),
    "Identity Provider is not enabled": (ClientRefusedError, "grant_not_set_up", 500),
    "Identity Provider is not allowed for the client": (ClientRefusedError, "grant_not_set_up", 500),
    "Identity Provider is not configured for JWT Authorization Grant": (
        ClientRefusedError,
        "grant_not_set_up",
        500,
    ),
    "Token jti claim is required": (RefusedTokenError, "subject_token_refused", 401),
    "Invalid token audience": (RefusedTokenError, "subject_token_refused", 401),
    "Multiple audiences not allowed": (RefusedTokenError, "subject_token_refused", 401),
    "Token was issued too far in the past to be used now": (RefusedTokenError, "subject_token_refused", 401),
    "Token was issued in the future": (RefusedTokenError, "subject_token_refused", 401),
    "Token is not active": (RefusedTokenError, "subject_token_refused", 401),
    "User not found": (RefusedTokenError, "subject_token_refused", 401),
    "User is not enabled": (RefusedTokenError, "subject_token_refused", 401),
    "token reuse detected": (RefusedTokenError, "subject_token_refused", 401),
}


@pytest.mark.parametrize("text", ASSERTION_REFUSALS)
def test_a_refused_assertion_is_whose_fault_the_text_says(text: str) -> None:
    refused = refusal(error_response("invalid_grant", text), "jwt_bearer")

    assert ASSERTION_REFUSALS[text] == (type(refused), refused.reason, refused.status)


@pytest.mark.parametrize(
    "body",
    [{"error": ["invalid_grant"]}, {"error": None}, {}, []],
    ids=["EXC-28-list", "EXC-28-null", "EXC-28-absent", "EXC-28-not-an-object"],
)
@pytest.mark.parametrize(
    ("status", "kind", "reason"),
    [
        (400, NonConformingResponseError, "response_status"),
        (403, NonConformingResponseError, "response_status"),
        (401, ClientRefusedError, "token_endpoint_refused"),
        (404, ClientRefusedError, "token_endpoint_refused"),
        (405, ClientRefusedError, "token_endpoint_refused"),
    ],
)
def test_without_an_oauth_error_the_status_decides(
    body: object, status: int, kind: type[TokenExchangeError], reason: str
) -> None:
    refused = refusal(json_response(body, status))

    assert (kind, reason, {"http_status": status}) == (type(refused), refused.reason, refused.facts)


def test_a_description_that_is_no_text_is_not_looked_at() -> None:
    document = {"error": "invalid_request", "error_description": ["Invalid token"]}
    refused = refusal(json_response(document, 400))

    assert (500, "client_refused") == (refused.status, refused.reason)


def test_exc_28_nothing_of_the_answer_is_kept() -> None:
    document = {"error": "mark-code", "error_description": "mark-text", "error_uri": "mark-uri"}
    for status in (200, 302, 400, 401, 403, 429, 500):
        refused = refusal(json_response(document, status, mark_header="mark-value"))

        assert "mark" not in f"{refused} {refused.args} {refused.facts} {refused.__dict__}"
        assert refused.__context__ is None or refused.__suppress_context__


# --- overload and faults --------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 425, 429, 500, 501, 502, 503, 504, 599])
def test_overload_and_faults_are_503_whatever_the_body_says(status: int) -> None:
    html = HttpResponse(status=status, body=b"<html>")
    for response in (error_response("invalid_grant", None, status), html):
        refused = refusal(response)

        assert (IssuerUnavailableError, 503) == (type(refused), refused.status)
        assert {"http_status": status} == refused.facts


@pytest.mark.parametrize(
    ("value", "wait"),
    [
        ("7", 7),
        ("1", 1),
        ("0", 1),
        ("30", 30),
        ("31", 30),
        ("999999", 30),
        ("9" * 5000, 1),
        ("-5", 1),
        ("1.5", 1),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 1),
        ("\u0667", 1),
        ("", 1),
        ("7, 8", 1),
    ],
    ids=[
        "FAULT-07-seconds", "one", "zero", "most", "more-than-most", "long", "FAULT-08-enormous",
        "FAULT-08-negative", "FAULT-08-fraction", "FAULT-08-date", "FAULT-08-arabic-digit",
        "FAULT-08-absent", "FAULT-08-two",
    ],
)  # fmt: skip
def test_retry_after_is_bounded(value: str, wait: int) -> None:
    headers = {"retry-after": value} if value else {}
    refused = refusal(HttpResponse(status=429, headers=headers))

    assert isinstance(refused, IssuerUnavailableError)
    assert ("token_endpoint_overloaded", wait) == (refused.reason, refused.retry_after)
