"""
What a real Keycloak answers, asked directly: the facts that `docs/keycloak.md` states.

At the end, what the gateway makes of answers that say too much, or that somebody has changed.
"""

import base64
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from kong_token_exchange.sandbox.demo import ISSUER_ADDRESS, UPSTREAM_ADDRESSES
from kong_token_exchange.sandbox.keycloak import Keycloak, KeycloakUnavailableError
from kong_token_exchange.sandbox.upstream import EchoUpstream
from tests.support.gateways import KongOnPath, SandboxBackend, kong_version, wait_until
from tests.support.proxy import ChangingProxy
from tests.support.stage import one_route

pytestmark = pytest.mark.integration

REALMS = Path(__file__).parents[2] / "docker" / "keycloak"
INTERNAL = "http://keycloak:8080/realms/internal"
ALEX_AT_INTERNAL = "0b5c7a52-8e0f-4f5e-9a36-1d6f6c1a0001"
GATEWAY = ("client-2", "client-2-secret")

ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"
TOKEN_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"

Form = dict[str, str | list[str]]


@pytest.fixture(scope="module")
def keycloak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keycloak]:
    try:
        running = Keycloak.start(realms=with_another_user(tmp_path_factory.mktemp("realms")))
    except KeycloakUnavailableError as exc:
        pytest.skip(f"no real Keycloak: {exc}")
    with running:
        yield running


def with_another_user(folder: Path) -> Path:
    """Return the realms in *folder*, with a second user in `internal`."""
    for path in REALMS.glob("*-realm.json"):
        realm = json.loads(path.read_text(encoding="utf-8"))
        if realm["realm"] == "internal":
            user = copy.deepcopy(realm["users"][0])
            user |= {"username": "sam", "email": "sam@internal.example", "federatedIdentities": []}
            del user["id"]
            realm["users"].append(user)
        (folder / path.name).write_text(json.dumps(realm), encoding="utf-8")
    return folder


def mint(
    keycloak: Keycloak,
    client: str = "client-1",
    *,
    scope: str = "",
    realm: str = "internal",
    user: str = "alex",
) -> str:
    return keycloak.mint(
        realm=realm,
        client_id=client,
        client_secret=f"{client}-secret",
        username=user,
        password="doe",
        scope=scope,
    )


def post(keycloak: Keycloak, form: Form, auth: tuple[str, str] | None = GATEWAY) -> requests.Response:
    return requests.post(keycloak.token_endpoint("internal"), data=form, auth=auth, timeout=20)


def exchange(
    keycloak: Keycloak, subject: str, more: Form, auth: tuple[str, str] | None = GATEWAY
) -> requests.Response:
    form: Form = {"grant_type": TOKEN_EXCHANGE, "subject_token": subject, "subject_token_type": ACCESS_TOKEN}
    return post(keycloak, form | more, auth)


def claims(token: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
    return loaded


def refusal(response: requests.Response) -> tuple[int, dict[str, str]]:
    return response.status_code, response.json()


def test_discovery_and_tokens_name_the_public_host_though_it_listens_on_loopback(keycloak: Keycloak) -> None:
    url = f"{keycloak.base_url}/realms/internal/.well-known/openid-configuration"

    document = requests.get(url, timeout=20).json()

    assert (document["issuer"], claims(mint(keycloak))["iss"]) == (INTERNAL, INTERNAL)
    assert f"{INTERNAL}/protocol/openid-connect/certs" == document["jwks_uri"]
    assert f"{INTERNAL}/protocol/openid-connect/token" == document["token_endpoint"]


def test_key_set_holds_an_encryption_key_beside_the_signing_key(keycloak: Keycloak) -> None:
    url = f"{keycloak.base_url}/realms/internal/protocol/openid-connect/certs"

    keys = requests.get(url, timeout=20).json()["keys"]

    assert {("sig", "RS256"), ("enc", "RSA-OAEP")} == {(key["use"], key["alg"]) for key in keys}


@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post"])
def test_transformation_gives_the_gateways_client_and_a_narrower_scope(
    keycloak: Keycloak, method: str
) -> None:
    subject = mint(keycloak, scope="openid profile orders add-client-2-as-audience")
    assert {"client-2", "orders-api"} == set(claims(subject)["aud"])

    if method == "client_secret_basic":
        response = exchange(keycloak, subject, {"scope": "profile orders"})
    else:
        form: Form = {"scope": "profile orders", "client_id": GATEWAY[0], "client_secret": GATEWAY[1]}
        response = exchange(keycloak, subject, form, auth=None)

    answer = response.json()
    assert (response.status_code, answer["token_type"], answer["issued_token_type"]) == (
        200,
        "Bearer",
        ACCESS_TOKEN,
    )
    assert "refresh_token" not in answer
    result = claims(answer["access_token"])
    assert (result["azp"], result["aud"], result["sub"]) == ("client-2", "orders-api", ALEX_AT_INTERNAL)
    # profile and email are default scopes of client-2: they come whether asked for or not.
    assert {"email", "orders", "profile"} == set(result["scope"].split()) == set(answer["scope"].split())
    assert result["exp"] - result["iat"] == 300
    # Keycloak counts expires_in from the clock of its answer to exp, in whole seconds, and takes iat
    # when it makes the token: where a second turns between the two it says 299 of a token of 300.
    # Both are its honest answer; less would mean a second of work, more would outlive the token.
    assert answer["expires_in"] in (299, 300)


def test_audience_filters_what_the_scopes_bring(keycloak: Keycloak) -> None:
    subject = mint(keycloak, scope="orders reports add-client-2-as-audience")
    assert {"client-2", "orders-api", "reports-api"} == set(claims(subject)["aud"])

    answer = exchange(keycloak, subject, {"scope": "orders reports", "audience": "reports-api"}).json()

    assert claims(answer["access_token"])["aud"] == "reports-api"
    # Only aud is filtered: the scope of the other API stays.
    assert {"email", "orders", "profile", "reports"} == set(answer["scope"].split())


def test_scope_may_grow_beyond_the_subjects(keycloak: Keycloak) -> None:
    subject = mint(keycloak, scope="orders add-client-2-as-audience")

    answer = exchange(keycloak, subject, {"scope": "inventory"}).json()

    assert claims(answer["access_token"])["aud"] == "inventory-api"


@pytest.mark.parametrize(
    ("change", "status", "error", "description"),
    [
        pytest.param(
            {"audience": "nobody"}, 400, "invalid_client", "Audience not found", id="audience-unknown"
        ),
        pytest.param(
            {"audience": "reports-api"},
            400,
            "invalid_request",
            "Requested audience not available: reports-api",
            id="audience-of-no-scope",
        ),
        pytest.param(
            {"scope": "orders nonsense"},
            400,
            "invalid_scope",
            "Invalid scopes: orders nonsense",
            id="scope-unknown",
        ),
        pytest.param({"scope": ""}, 400, "invalid_scope", "Invalid scopes: ", id="scope-empty"),
        pytest.param(
            {"scope": ["orders", "reports"]}, 400, "invalid_request", "duplicated parameter", id="scope-twice"
        ),
        pytest.param(
            {"subject_token_type": "urn:ietf:params:oauth:token-type:jwt"},
            400,
            "invalid_request",
            "Parameter 'subject_token' supports access tokens only",
            id="subject-token-type-jwt",
        ),
        pytest.param(
            {"requested_token_type": "urn:ietf:params:oauth:token-type:jwt"},
            400,
            "invalid_request",
            "requested_token_type unsupported",
            id="requested-token-type-jwt",
        ),
        pytest.param(
            {"subject_issuer": "partner"},
            400,
            "invalid_request",
            "Parameter 'subject_issuer' is not supported for standard token exchange",
            id="subject-issuer",
        ),
    ],
)
def test_exchange_refusals_of_the_request(
    keycloak: Keycloak, change: Form, status: int, error: str, description: str
) -> None:
    subject = mint(keycloak, scope="orders add-client-2-as-audience")

    more: Form = {"scope": "orders"}
    response = exchange(keycloak, subject, more | change)

    assert (status, {"error": error, "error_description": description}) == refusal(response)


@pytest.mark.parametrize(
    ("auth", "error"),
    [(("client-2", "wrong"), "unauthorized_client"), (("nobody", "wrong"), "invalid_client")],
    ids=["secret-wrong", "client-unknown"],
)
def test_exchange_refusals_of_the_client(keycloak: Keycloak, auth: tuple[str, str], error: str) -> None:
    response = exchange(keycloak, mint(keycloak, scope="add-client-2-as-audience"), {}, auth)

    body = {"error": error, "error_description": "Invalid client or Invalid client credentials"}
    assert (401, body) == refusal(response)


def test_subject_without_the_gateway_in_aud_is_403(keycloak: Keycloak) -> None:
    response = exchange(keycloak, mint(keycloak, scope="orders"), {"scope": "orders"})

    body = {"error": "access_denied", "error_description": "Client is not within the token audience"}
    assert (403, body) == refusal(response)


@pytest.mark.parametrize("fault", ["expired", "foreign", "forged", "garbage"])
def test_every_bad_subject_is_the_same_invalid_token(keycloak: Keycloak, fault: str) -> None:
    match fault:
        case "expired":
            subject = mint(keycloak, "client-short", scope="add-client-2-as-audience")
            # Keycloak counts in whole seconds; the token lives 2 s.
            time.sleep(max(0.0, claims(subject)["exp"] + 1.2 - time.time()))
        case "foreign":
            subject = mint(keycloak, "partner-app", realm="partner")
        case "forged":
            subject = mint(keycloak, scope="add-client-2-as-audience")[:-8] + "AAAAAAAA"
        case _:
            subject = "abc"

    response = exchange(keycloak, subject, {})

    assert refusal(response) == (400, {"error": "invalid_request", "error_description": "Invalid token"})


def test_result_may_outlive_the_subject(keycloak: Keycloak) -> None:
    subject = mint(keycloak, "client-short", scope="orders add-client-2-as-audience")

    answer = exchange(keycloak, subject, {"scope": "orders"}).json()

    assert claims(answer["access_token"])["exp"] > claims(subject)["exp"] + 200


def test_assertion_of_the_partner_is_good_once(keycloak: Keycloak) -> None:
    assertion = mint(keycloak, "partner-app", realm="partner")
    form: Form = {"grant_type": JWT_BEARER, "assertion": assertion, "scope": "inventory"}
    assert (claims(assertion)["aud"], bool(claims(assertion)["jti"])) == (INTERNAL, True)

    first, second = post(keycloak, form), post(keycloak, form)

    assert first.status_code == 200
    assert {"issued_token_type", "refresh_token", "session_state"}.isdisjoint(first.json())
    # 299 where a second turns between token and answer, as above.
    assert (first.json()["token_type"], first.json()["expires_in"] in (299, 300)) == ("Bearer", True)
    result = claims(first.json()["access_token"])
    assert (result["iss"], result["aud"]) == (INTERNAL, "inventory-api")
    assert (result["azp"], result["sub"]) == ("client-2", ALEX_AT_INTERNAL)
    assert refusal(second) == (400, {"error": "invalid_grant", "error_description": "Token reuse detected"})


def test_wrong_scope_uses_the_assertion_up_and_a_wrong_secret_does_not(keycloak: Keycloak) -> None:
    form: Form = {"grant_type": JWT_BEARER, "assertion": mint(keycloak, "partner-app", realm="partner")}

    assert post(keycloak, form, ("client-2", "wrong")).status_code == 401
    assert post(keycloak, form | {"scope": "nonsense"}).json()["error"] == "invalid_scope"
    assert post(keycloak, form).json()["error_description"] == "Token reuse detected"


@pytest.mark.parametrize(
    ("fault", "description"),
    [
        ("forged", "Invalid signature"),
        ("own-realm", "No Identity Provider for provided issuer"),
        ("garbage", "The provided assertion is not a valid JWT"),
    ],
)
def test_bad_assertions_are_invalid_grant(keycloak: Keycloak, fault: str, description: str) -> None:
    match fault:
        case "forged":
            assertion = mint(keycloak, "partner-app", realm="partner")[:-8] + "AAAAAAAA"
        case "own-realm":
            assertion = mint(keycloak)
        case _:
            assertion = "abc"

    response = post(keycloak, {"grant_type": JWT_BEARER, "assertion": assertion})

    assert (400, {"error": "invalid_grant", "error_description": description}) == refusal(response)


# --- through a gateway ----------------------------------------------------------------


class Through:
    """A gateway over this Keycloak, with a proxy between the two."""

    def __init__(
        self, backend: Any, keycloak: Keycloak, proxy: ChangingProxy, upstream: EchoUpstream
    ) -> None:
        self.keycloak, self.proxy, self.upstream = keycloak, proxy, upstream
        self.gateway = backend(
            limited("allowed_scopes", ["profile", "email", "orders"]),
            upstreams=dict.fromkeys(UPSTREAM_ADDRESSES.values(), upstream.address),
            issuers={ISSUER_ADDRESS: proxy.address},
        )

    def get(self, token: str) -> requests.Response:
        return requests.get(
            f"{self.gateway.url}/orders", headers={"Authorization": f"Bearer {token}"}, timeout=30
        )


def limited(name: str, value: object, **more: Any) -> dict[str, Any]:
    """Return the route of `kong.yml` with one limit on the result."""
    config = one_route()
    exchange = config["services"][0]["routes"][0]["plugins"][0]["config"]["token_exchange"]
    exchange["result"] = {name: value, **more}
    return config


@pytest.fixture(scope="module", params=["kong", "sandbox"])
def through(request: pytest.FixtureRequest, keycloak: Keycloak) -> Iterator[Through]:
    if request.param == "kong" and kong_version() is None:
        pytest.skip("no real Kong: no `kong` on PATH")
    with ChangingProxy(("127.0.0.1", keycloak.port)) as proxy, EchoUpstream() as upstream:
        made = Through(KongOnPath if request.param == "kong" else SandboxBackend, keycloak, proxy, upstream)
        yield made
        made.gateway.stop()


def test_exc_15_a_token_of_another_user_put_in_by_a_proxy_is_refused(through: Through) -> None:
    scope = "openid profile orders add-client-2-as-audience"
    alex, sam = (mint(through.keycloak, scope=scope, user=user) for user in ("alex", "sam"))
    of_sam = exchange(through.keycloak, sam, {"scope": "profile orders"}).json()["access_token"]
    assert claims(of_sam)["sub"] != ALEX_AT_INTERNAL

    def substitute(path: str, body: bytes) -> bytes:
        if not path.endswith("/token"):
            return body
        return json.dumps({**json.loads(body), "access_token": of_sam}).encode()

    # Genuine in all but its subject: Keycloak signed it for this client, this audience, these scopes.
    through.proxy.change = substitute
    through.upstream.log.clear()
    answers = [through.get(alex) for _ in range(2)]
    assert [(502, "server_error")] * 2 == [(answer.status_code, answer.json()["error"]) for answer in answers]
    assert 0 == through.upstream.hits
    assert wait_until(lambda: "subject_differs" in through.gateway.logs())
    assert of_sam not in through.gateway.logs()

    through.proxy.change = None
    assert 200 == through.get(alex).status_code
    assert ALEX_AT_INTERNAL == (through.upstream.last_claims() or {})["sub"]
    # For its own subject it is as good as any.
    assert 200 == through.get(sam).status_code


def test_exc_14_more_scope_than_allowed_is_refused_or_recorded(through: Through) -> None:
    # Keycloak adds `email`, a default scope of the gateway's client, to what was asked for.
    token = mint(through.keycloak, scope="openid profile orders add-client-2-as-audience")
    assert 200 == through.get(token).status_code

    through.gateway.reload(limited("allowed_scopes", ["profile", "orders"]))
    assert wait_until(lambda: through.get(token).status_code == 502)
    through.upstream.log.clear()
    answer = through.get(token)
    assert (502, "server_error") == (answer.status_code, answer.json()["error"])
    assert 0 == through.upstream.hits
    assert wait_until(lambda: "result_wider_than_policy" in through.gateway.logs())
    assert "scope_not_allowed" in through.gateway.logs()

    through.gateway.reload(limited("allowed_scopes", ["profile", "orders"], narrowing="audit"))
    assert wait_until(lambda: through.get(token).status_code == 200)
    assert "email" in (through.upstream.last_claims() or {})["scope"].split()
