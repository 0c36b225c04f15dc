import base64
import json
from urllib.parse import quote_plus, urlencode

import jwt
import pytest

from kong_token_exchange.sandbox import issuer as module
from kong_token_exchange.sandbox.issuer import (
    ACCESS_TOKEN,
    JWT_BEARER,
    TOKEN_EXCHANGE,
    SigningKey,
    default_realms,
)

INTERNAL = "http://keycloak:8080/realms/internal"
PARTNER = "http://keycloak:8080/realms/partner"


class Clock:
    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def realms():
    """Keys are slow to make, so they are made once; nothing here changes an issuer without undoing it."""
    return default_realms(now=Clock())


@pytest.fixture
def internal(realms):
    realms["internal"]._used_assertions.clear()
    Clock.now = 1_700_000_000.0
    return realms["internal"]


@pytest.fixture
def partner(realms):
    return realms["partner"]


def claims_of(token: str) -> dict:
    return jwt.decode(token, options={"verify_signature": False})


def basic(client="client-2", secret=None) -> dict[str, str]:
    pair = f"{quote_plus(client)}:{quote_plus(secret or f'{client}-secret')}"
    return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


def ask(issuer, form, headers=None) -> tuple[int, dict]:
    status, answered, body = issuer.answer_token_request(
        urlencode(form, doseq=True), basic() if headers is None else headers
    )
    assert answered == {"Content-Type": "application/json", "Cache-Control": "no-store", "Pragma": "no-cache"}
    return status, json.loads(body)


def exchange(issuer, token, headers=None, **form) -> tuple[int, dict]:
    complete = {
        "grant_type": TOKEN_EXCHANGE,
        "subject_token": token,
        "subject_token_type": ACCESS_TOKEN,
        **form,
    }
    return ask(issuer, {name: value for name, value in complete.items() if value is not None}, headers)


def refusal(answer: tuple[int, dict]) -> tuple[int, str, str]:
    status, body = answer
    return status, body["error"], body["error_description"]


# --- minting --------------------------------------------------------------------------


def test_minted_token_verifies_with_the_published_key(internal):
    token = internal.mint(scopes=["orders"])
    header = jwt.get_unverified_header(token)
    published = {key["kid"]: key for key in internal.jwks()["keys"]}
    key = jwt.PyJWK(published[header["kid"]])

    claims = jwt.decode(
        token, key, algorithms=["RS256"], audience="orders-api", options={"verify_exp": False}
    )
    assert (header["alg"], header["typ"]) == ("RS256", "JWT")
    assert claims["exp"] - claims["iat"] == 300


def test_claims_are_those_of_a_keycloak_access_token(internal):
    claims = claims_of(internal.mint(scopes=["add-client-2-as-audience", "orders"]))

    for name in ("jti", "sid"):
        assert claims.pop(name)
    assert claims == {
        "exp": 1_700_000_300,
        "iat": 1_700_000_000,
        "iss": INTERNAL,
        "aud": ["client-2", "orders-api"],
        "sub": "0b5c7a52-8e0f-4f5e-9a36-1d6f6c1a0001",
        "typ": "Bearer",
        "azp": "client-1",
        "scope": "profile email add-client-2-as-audience orders",
        "preferred_username": "alex",
        "email": "alex@internal.example",
    }


@pytest.mark.parametrize(
    ("scopes", "aud"),
    [((), None), (("orders",), "orders-api"), (("orders", "reports"), ["orders-api", "reports-api"])],
)
def test_audience_is_absent_a_text_or_a_list(internal, scopes, aud):
    assert claims_of(internal.mint(scopes=scopes)).get("aud") == aud


def test_partner_tokens_are_made_for_the_internal_realm(partner):
    assert claims_of(partner.mint(client="partner-app"))["aud"] == INTERNAL


def test_everything_of_a_token_can_be_changed(internal):
    other = SigningKey.generate("ES256")
    token = internal.mint(
        header={"typ": "at+jwt", "kid": "none"},
        key=other,
        without=["sub"],
        life_s=-1,
        iss="https://evil.example",
        extra=[1],
    )
    header, claims = jwt.get_unverified_header(token), claims_of(token)

    assert header == {"alg": "ES256", "typ": "at+jwt", "kid": "none"}
    assert (claims["iss"], claims["extra"], claims["exp"]) == ("https://evil.example", [1], 1_699_999_999)
    assert "sub" not in claims
    assert other.verify(token)


def test_signature_can_be_anything(internal):
    token = internal.mint(header={"alg": "none"}, signature=lambda message: b"")

    assert token.endswith(".")
    assert jwt.get_unverified_header(token)["alg"] == "none"


def test_published_keys_hold_no_private_parts(internal):
    for key in internal.jwks()["keys"]:
        assert not {"d", "p", "q", "dp", "dq", "qi", "k"} & set(key)
        assert key["use"] == "sig"
        assert key["kid"]


def test_rotation_signs_with_the_new_key_and_keeps_or_drops_the_old(internal):
    before, old = list(internal.keys), internal.mint()
    try:
        new = internal.rotate()
        assert jwt.get_unverified_header(internal.mint())["kid"] == new.kid
        assert internal.verify(old) is not None
        internal.rotate(keep_old=False)
        assert internal.verify(old) is None
        assert len(internal.jwks()["keys"]) == 1
    finally:
        internal.keys = before


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "ES384", "PS256"])
def test_keys_of_each_algorithm_sign_what_they_verify(internal, algorithm):
    key = SigningKey.generate(algorithm)
    token = internal.mint(key=key)

    assert key.verify(token)
    assert jwt.PyJWK(key.jwk()).algorithm_name == algorithm
    assert not SigningKey.generate(algorithm).verify(token)


def test_discovery_names_the_issuer_and_its_endpoints(internal):
    document = internal.discovery()

    assert document["issuer"] == INTERNAL
    assert document["token_endpoint"] == f"{INTERNAL}/protocol/openid-connect/token"
    assert document["jwks_uri"] == f"{INTERNAL}/protocol/openid-connect/certs"
    assert TOKEN_EXCHANGE in document["grant_types_supported"]


# --- client authentication ------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "form"),
    [
        (basic("client-1"), {}),
        ({"authorization": basic("client-1")["Authorization"].replace("Basic", "basic")}, {}),
        ({}, {"client_id": "client-1", "client_secret": "client-1-secret"}),
        (basic("client-1", "wrong"), {"client_id": "client-1", "client_secret": "client-1-secret"}),
    ],
    ids=["basic", "basic-lower-case", "post", "form-wins"],
)
def test_client_authenticates_by_basic_or_by_form(internal, headers, form):
    status, _ = ask(
        internal, {"grant_type": "password", "username": "alex", "password": "doe", **form}, headers
    )

    assert status == 200


@pytest.mark.parametrize(
    ("headers", "form", "expected"),
    [
        ({}, {}, (400, "invalid_client")),
        (basic("client-1", "wrong"), {}, (401, "unauthorized_client")),
        (basic("nobody"), {}, (401, "invalid_client")),
        (basic("orders-api"), {}, (401, "invalid_client")),
        ({}, {"client_id": "client-1"}, (401, "unauthorized_client")),
        ({"Authorization": "Basic !!!"}, {}, (400, "invalid_client")),
        ({"Authorization": "Bearer x"}, {}, (400, "invalid_client")),
    ],
    ids=["none", "wrong-secret", "unknown", "audience-only", "no-secret", "not-base64", "bearer"],
)
def test_client_that_does_not_authenticate_is_refused(internal, headers, form, expected):
    answer = ask(internal, {"grant_type": "password", "username": "alex", "password": "doe", **form}, headers)

    assert refusal(answer)[:2] == expected


def test_basic_credentials_are_form_decoded(internal, monkeypatch):
    odd = {**internal.realm.clients, "a:b c": module.Client(secret="p%q+ü:r", password_grant=True)}
    monkeypatch.setattr(internal, "realm", module.Realm(clients=odd, scopes={}, users=internal.realm.users))
    form = {"grant_type": "password", "username": "alex", "password": "doe"}

    assert ask(internal, form, basic("a:b c", "p%q+ü:r"))[0] == 200
    raw = base64.b64encode("a:b c:p%q+ü:r".encode()).decode()
    assert ask(internal, form, {"Authorization": f"Basic {raw}"})[0] == 401


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({}, (400, "invalid_request", "Missing form parameter: grant_type")),
        ({"grant_type": "implicit"}, (400, "unsupported_grant_type", "Unsupported grant_type")),
        (
            {"grant_type": "password", "username": ["alex", "alex"], "password": "doe"},
            (400, "invalid_request", "duplicated parameter"),
        ),
    ],
    ids=["no-grant", "unknown-grant", "repeated"],
)
def test_malformed_token_request_is_refused(internal, form, expected):
    assert refusal(ask(internal, form, basic("client-1"))) == expected


# --- password -------------------------------------------------------------------------


def test_password_grant_gives_default_and_asked_scopes(internal):
    status, body = ask(
        internal,
        {"grant_type": "password", "username": "alex", "password": "doe", "scope": "openid orders"},
        basic("client-1"),
    )

    assert status == 200
    assert claims_of(body["access_token"])["scope"] == body["scope"] == "profile email orders"
    assert (body["token_type"], body["expires_in"]) == ("Bearer", 300)


@pytest.mark.parametrize(
    ("client", "form", "expected"),
    [
        ("client-1", {"password": "wrong"}, (401, "invalid_grant")),
        ("client-1", {"username": "nobody"}, (401, "invalid_grant")),
        ("client-1", {"scope": "orders nonsense"}, (400, "invalid_scope")),
        ("client-2", {}, (400, "unauthorized_client")),
    ],
)
def test_password_grant_refuses(internal, client, form, expected):
    complete = {"grant_type": "password", "username": "alex", "password": "doe", **form}

    assert refusal(ask(internal, complete, basic(client)))[:2] == expected


def test_client_with_a_short_life_gets_short_tokens(internal):
    _, body = ask(
        internal, {"grant_type": "password", "username": "alex", "password": "doe"}, basic("client-short")
    )
    claims = claims_of(body["access_token"])

    assert body["expires_in"] == claims["exp"] - claims["iat"] == 2


# --- token exchange -------------------------------------------------------------------


@pytest.fixture
def subject(internal):
    return internal.mint(scopes=["add-client-2-as-audience"])


def test_exchange_gives_the_gateways_client_a_token_of_the_same_subject(internal, subject):
    status, body = exchange(internal, subject, scope="profile orders")
    claims = claims_of(body["access_token"])

    assert status == 200
    assert body["issued_token_type"] == ACCESS_TOKEN
    assert (claims["azp"], claims["aud"], claims["scope"]) == (
        "client-2",
        "orders-api",
        "profile email orders",
    )
    assert claims["sub"] == claims_of(subject)["sub"]
    assert claims["jti"] != claims_of(subject)["jti"]
    assert internal.verify(body["access_token"]) is not None


@pytest.mark.parametrize(
    ("audience", "aud"),
    [
        (None, ["orders-api", "reports-api"]),
        ("reports-api", "reports-api"),
        (["orders-api", "reports-api"],) * 2,
    ],
)
def test_audience_parameter_filters_the_audiences_that_scopes_bring(internal, subject, audience, aud):
    _, body = exchange(internal, subject, scope="orders reports", audience=audience)

    assert claims_of(body["access_token"])["aud"] == aud


def test_client_may_exchange_its_own_token_without_being_its_audience(internal, subject):
    _, first = exchange(internal, subject, scope="orders")
    status, _ = exchange(internal, first["access_token"], scope="reports")

    assert status == 200


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"scope": "nonsense"}, (400, "invalid_scope", "Invalid scopes: nonsense")),
        (
            {"scope": "orders", "audience": "reports-api"},
            (400, "invalid_request", "Requested audience not available: reports-api"),
        ),
        ({"audience": "nobody"}, (400, "invalid_client", "Audience not found")),
        ({"token": "x.y.z"}, (400, "invalid_request", "Invalid token")),
        (
            {"token": None},
            (400, "invalid_request", "Parameter 'subject_token' required for standard token exchange"),
        ),
        (
            {"subject_token_type": None},
            (400, "invalid_request", "Parameter 'subject_token_type' required for standard token exchange"),
        ),
        (
            {"subject_token_type": "urn:ietf:params:oauth:token-type:jwt"},
            (400, "invalid_request", "Parameter 'subject_token' supports access tokens only"),
        ),
        (
            {"subject_issuer": "partner"},
            (
                400,
                "invalid_request",
                "Parameter 'subject_issuer' is not supported for standard token exchange",
            ),
        ),
        (
            {"requested_token_type": "urn:ietf:params:oauth:token-type:saml2"},
            (400, "invalid_request", "requested_token_type unsupported"),
        ),
        ({"scope": ["orders", "reports"]}, (400, "invalid_request", "duplicated parameter")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_exchange_refuses_a_request_as_keycloak_does(internal, subject, form, expected):
    assert refusal(exchange(internal, **{"token": subject, **form})) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"life_s": 0},
        {"life_s": -1},
        {"iss": PARTNER},
        {"key": SigningKey.generate()},
        {"signature": lambda message: b"x"},
        {"header": {"kid": "unknown"}},
        {"sub": "nobody"},
        {"typ": "Refresh"},
        {"without": ["exp"]},
    ],
    ids=[
        "expired-now",
        "expired",
        "other-issuer",
        "forged",
        "no-signature",
        "unknown-key",
        "nobody",
        "refresh",
        "no-exp",
    ],
)
def test_exchange_refuses_a_subject_token_as_keycloak_does(internal, change):
    token = internal.mint(scopes=["add-client-2-as-audience"], **change)

    assert refusal(exchange(internal, token)) == (400, "invalid_request", "Invalid token")


@pytest.fixture
def delegating(internal):
    internal.delegation = True
    yield internal
    internal.delegation = False


def act_of(issuer, subject, actor) -> dict:
    _, body = exchange(issuer, subject, actor_token=actor, actor_token_type=ACCESS_TOKEN)
    return claims_of(body["access_token"]).get("act", {})


def test_actor_tokens_are_ignored_as_keycloak_does(internal, subject):
    assert act_of(internal, subject, "no token at all") == {}


def test_actor_is_named_in_the_token(delegating, subject):
    actor = delegating.mint(sub="agent", azp="agent-client")

    assert act_of(delegating, subject, actor) == {
        "iss": INTERNAL,
        "sub": "agent",
        "client_id": "agent-client",
    }


def test_earlier_actor_is_kept_inside(delegating):
    subject = delegating.mint(scopes=["add-client-2-as-audience"], act={"sub": "earlier"})

    assert act_of(delegating, subject, delegating.mint(sub="agent"))["act"] == {"sub": "earlier"}


def test_exchange_without_an_actor_names_none(delegating, subject):
    assert "act" not in claims_of(exchange(delegating, subject)[1]["access_token"])


@pytest.mark.parametrize("form", [{"actor_token": "a.b.c"}, {"actor_token_type": ACCESS_TOKEN}])
def test_actor_token_and_its_type_belong_together(delegating, subject, form):
    assert refusal(exchange(delegating, subject, **form))[:2] == (400, "invalid_request")


@pytest.mark.parametrize("change", [{"life_s": -1}, {"key": SigningKey.generate()}, {"without": ["sub"]}])
def test_bad_actor_token_is_refused(delegating, subject, change):
    form = {"actor_token": delegating.mint(**change), "actor_token_type": ACCESS_TOKEN}

    assert refusal(exchange(delegating, subject, **form)) == (400, "invalid_request", "Invalid actor token")


@pytest.mark.parametrize(
    ("may_act", "allowed"),
    [({"sub": "agent"}, True), ({"sub": "other"}, False), ({}, False), ("agent", False)],
)
def test_may_act_is_honoured(delegating, may_act, allowed):
    subject = delegating.mint(scopes=["add-client-2-as-audience"], may_act=may_act)
    form = {"actor_token": delegating.mint(sub="agent"), "actor_token_type": ACCESS_TOKEN}

    assert (exchange(delegating, subject, **form)[0] == 200) == allowed


def test_client_that_is_not_in_the_tokens_audience_is_forbidden(internal):
    answer = exchange(internal, internal.mint(scopes=["orders"]), scope="orders")

    assert refusal(answer) == (403, "access_denied", "Client is not within the token audience")


def test_client_for_which_exchange_is_not_switched_on_is_refused(internal, subject):
    assert refusal(exchange(internal, subject, basic("client-1"))) == (
        400,
        "invalid_request",
        "Standard token exchange is not enabled for the requested client",
    )


# --- JWT bearer -----------------------------------------------------------------------


def present(issuer, assertion, headers=None, **form) -> tuple[int, dict]:
    return ask(issuer, {"grant_type": JWT_BEARER, "assertion": assertion, **form}, headers)


def test_assertion_of_the_partner_gives_a_token_of_the_linked_user(internal, partner):
    status, body = present(internal, partner.mint(client="partner-app"), scope="inventory")
    claims = claims_of(body["access_token"])

    assert status == 200
    assert "issued_token_type" not in body
    assert (claims["iss"], claims["azp"], claims["aud"]) == (INTERNAL, "client-2", "inventory-api")
    assert claims["sub"] == internal.realm.users["alex"].id


def test_assertion_is_good_once(internal, partner):
    assertion = partner.mint(client="partner-app")
    assert present(internal, assertion)[0] == 200

    assert refusal(present(internal, assertion)) == (400, "invalid_grant", "Token reuse detected")


def test_used_assertions_are_forgotten_when_they_have_expired(internal, partner):
    present(internal, partner.mint(client="partner-app"))
    Clock.now += 301
    present(internal, partner.mint(client="partner-app"))

    assert len(internal._used_assertions) == 1


@pytest.mark.parametrize(
    ("change", "description"),
    [
        ({"aud": "http://other"}, "Invalid token audience"),
        ({"aud": [INTERNAL, "http://other"]}, "Multiple audiences not allowed"),
        ({"without": ["aud"]}, "Invalid token audience"),
        ({"without": ["jti"]}, "Token jti claim is required"),
        ({"without": ["sub"]}, "Missing claim: sub"),
        ({"without": ["iss"]}, "Missing claim: iss"),
        ({"without": ["exp"]}, "Token exp claim is required"),
        ({"life_s": 0}, "Token is not active"),
        ({"iat": 1_700_000_001}, "Token was issued in the future"),
        ({"iat": 1_699_999_699}, "Token was issued too far in the past to be used now"),
        (
            {"without": ["iat"], "life_s": 301},
            "Token expiration is too far in the future and iat claim not present in token",
        ),
        ({"iss": "https://evil.example"}, "No Identity Provider for provided issuer"),
        ({"sub": "nobody"}, "User not found"),
        ({"key": SigningKey.generate()}, "Invalid signature"),
        ({"header": {"alg": "RS512"}}, "Invalid signature algorithm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_assertion_is_refused_as_keycloak_does(internal, partner, change, description):
    assertion = partner.mint(client="partner-app", **change)

    assert refusal(present(internal, assertion)) == (400, "invalid_grant", description)


@pytest.mark.parametrize(
    "change", [{"iat": 1_699_999_700}, {"without": ["iat"], "life_s": 300}, {"life_s": 1}]
)
def test_assertion_at_the_border_of_its_life_is_accepted(internal, partner, change):
    assert present(internal, partner.mint(client="partner-app", **change))[0] == 200


def test_token_endpoint_is_an_audience_too(internal, partner):
    assertion = partner.mint(client="partner-app", aud=f"{INTERNAL}/protocol/openid-connect/token")

    assert present(internal, assertion)[0] == 200


@pytest.mark.parametrize(
    ("assertion", "description"),
    [("nonsense", "The provided assertion is not a valid JWT"), (None, "Missing parameter:assertion")],
)
def test_assertion_that_is_no_jwt_is_refused(internal, assertion, description):
    form = {"grant_type": JWT_BEARER} | ({"assertion": assertion} if assertion else {})

    assert refusal(ask(internal, form)) == (400, "invalid_grant", description)


def test_client_without_the_grant_is_refused(internal, partner):
    assert refusal(present(internal, partner.mint(client="partner-app"), basic("client-1"))) == (
        400,
        "invalid_grant",
        "JWT Authorization Grant is not supported for the requested client",
    )


def test_issuer_that_the_client_may_not_use_is_refused(internal, realms, partner, monkeypatch):
    monkeypatch.setitem(internal.trusted, INTERNAL, internal)

    assert refusal(present(internal, internal.mint())) == (
        400,
        "invalid_grant",
        "Identity Provider is not allowed for the client",
    )
