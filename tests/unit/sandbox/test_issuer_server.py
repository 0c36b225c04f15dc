import json
import threading
from pathlib import Path

import jwt
import pytest
import requests

from kong_token_exchange.sandbox import issuer as module
from kong_token_exchange.sandbox.issuer import ACCESS_TOKEN, TOKEN_EXCHANGE, IssuerServer
from kong_token_exchange.sandbox.serving import Fault

TIMEOUT_S = 10.0
KEYCLOAK = Path(__file__).parents[3] / "docker/keycloak"


@pytest.fixture(scope="module")
def running():
    with IssuerServer() as server:
        yield server


@pytest.fixture
def server(running):
    running.log.clear()
    running.clear_faults()
    return running


def token(server, **form) -> str:
    answer = requests.post(
        server.url + server.token_path("internal"),
        data={"grant_type": "password", "username": "alex", "password": "doe", **form},
        auth=("client-1", "client-1-secret"),
        timeout=TIMEOUT_S,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["access_token"]


def test_token_minted_over_http_is_exchanged_over_http(server):
    subject = token(server, scope="add-client-2-as-audience")
    answer = requests.post(
        server.url + server.token_path("internal"),
        data={
            "grant_type": TOKEN_EXCHANGE,
            "subject_token": subject,
            "subject_token_type": ACCESS_TOKEN,
            "scope": "orders",
        },
        auth=("client-2", "client-2-secret"),
        timeout=TIMEOUT_S,
    )
    claims = jwt.decode(answer.json()["access_token"], options={"verify_signature": False})

    assert (claims["azp"], claims["aud"]) == ("client-2", "orders-api")
    assert answer.headers["Cache-Control"] == "no-store"
    assert server.log.count(server.token_path("internal")) == 2
    assert dict(server.last_form("internal"))["scope"] == "orders"


def test_discovery_and_keys_are_served_under_the_realms_names(server):
    for name in ("internal", "partner"):
        document = requests.get(server.url + server.discovery_path(name), timeout=TIMEOUT_S).json()
        keys = requests.get(server.url + server.jwks_path(name), timeout=TIMEOUT_S).json()

        assert document["issuer"] == f"http://keycloak:8080/realms/{name}"
        assert document["jwks_uri"].endswith(server.jwks_path(name))
        assert {key["kty"] for key in keys["keys"]} == {"RSA", "EC"}


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/realms/none/.well-known/openid-configuration", {}, 404),
        ("GET", "/realms/internal/protocol/openid-connect/token", {}, 405),
        ("POST", "/realms/internal/protocol/openid-connect/token", {"Content-Type": "application/json"}, 415),
    ],
    ids=["no-realm", "get-token", "json"],
)
def test_other_requests_are_refused(server, method, path, headers, status):
    assert (
        requests.request(method, server.url + path, headers=headers, timeout=TIMEOUT_S).status_code == status
    )


# --- faults ---------------------------------------------------------------------------


def keys(server) -> requests.Response:
    return requests.get(server.url + server.jwks_path("internal"), timeout=TIMEOUT_S)


def test_fault_replaces_the_answer_as_often_as_told(server):
    path = server.jwks_path("internal")
    server.set_fault(path, Fault(status=503, body=b"busy", headers=(("Retry-After", "7"),), times=2))
    answers = [keys(server) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [503, 503, 200]
    assert (answers[0].text, answers[0].headers["Retry-After"]) == ("busy", "7")
    assert server.log.count(path) == 3


def test_fault_breaks_one_path_only_and_until_cleared(server):
    server.set_fault(server.jwks_path("internal"), Fault(body=b"{"))
    assert keys(server).text == "{"
    assert requests.get(server.url + server.jwks_path("partner"), timeout=TIMEOUT_S).json()["keys"]
    server.clear_faults()

    assert keys(server).json()["keys"]


@pytest.mark.parametrize("fault", [Fault(drop=True), Fault(raw=b"nonsense\r\n\r\n")], ids=["drop", "raw"])
def test_fault_breaks_the_connection(server, fault):
    server.set_fault(server.jwks_path("internal"), fault)
    with pytest.raises(requests.ConnectionError):
        keys(server)


def test_held_answer_comes_when_it_is_released(server):
    path, release, got = server.jwks_path("internal"), threading.Event(), []
    server.set_fault(path, Fault(hold=release))
    asking = threading.Thread(target=lambda: got.append(keys(server).status_code))
    asking.start()

    assert server.log.wait_for(path, 1)
    assert got == []
    # Others are served meanwhile.
    assert requests.get(server.url + server.jwks_path("partner"), timeout=TIMEOUT_S).status_code == 200
    release.set()
    asking.join(TIMEOUT_S)
    assert got == [200]


def test_stopped_server_refuses_and_comes_back_on_the_same_port():
    server = IssuerServer({})
    with server:
        url = server.url
        assert requests.get(url, timeout=TIMEOUT_S).status_code == 404
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=TIMEOUT_S)
    with server:
        assert server.url == url
        assert requests.get(url, timeout=TIMEOUT_S).status_code == 404


# --- the same realms as a real Keycloak's ---------------------------------------------


def realm_file(name: str) -> dict:
    return json.loads((KEYCLOAK / f"{name}-realm.json").read_text())


@pytest.mark.parametrize("name", ["internal", "partner"])
def test_clients_and_secrets_are_those_of_the_realm_files(running, name):
    realm, document = running.issuers[name].realm, realm_file(name)
    wanted = {client["clientId"]: client.get("secret") for client in document["clients"]}

    assert {client_id: client.secret for client_id, client in realm.clients.items()} == wanted


def test_client_settings_are_those_of_the_realm_file(running):
    realm = running.issuers["internal"].realm
    for entry in realm_file("internal")["clients"]:
        client, attributes = realm.clients[entry["clientId"]], entry.get("attributes", {})
        assert client.password_grant is entry.get("directAccessGrantsEnabled", False)
        assert client.token_exchange is (attributes.get("standard.token.exchange.enabled") == "true")
        assert bool(client.assertion_issuers) is ("oauth2.jwt.authorization.grant.idp" in attributes)
        assert list(client.optional_scopes) == entry.get("optionalClientScopes", [])
        assert list(client.default_scopes) == entry.get("defaultClientScopes", [])
        if "access.token.lifespan" in attributes:
            assert client.token_life_s == int(attributes["access.token.lifespan"])


def test_scopes_bring_the_audiences_of_the_realm_file(running):
    wanted = {}
    for scope in realm_file("internal")["clientScopes"]:
        configs = [mapper["config"] for mapper in scope["protocolMappers"]]
        audiences = [
            config["included.client.audience"] for config in configs if "included.client.audience" in config
        ]
        wanted[scope["name"]] = audiences[0] if audiences else None

    assert {
        name: scope.audience for name, scope in running.issuers["internal"].realm.scopes.items()
    } == wanted


@pytest.mark.parametrize("name", ["internal", "partner"])
def test_users_are_those_of_the_realm_files(running, name):
    realm = running.issuers[name].realm
    for entry in realm_file(name)["users"]:
        user = realm.users[entry["username"]]
        assert (user.id, user.email) == (entry["id"], entry["email"])
        assert user.password == entry["credentials"][0]["value"]
        links = {module.DEFAULT_BASE_URL + "/realms/" + link["identityProvider"]: link["userId"]
                 for link in entry.get("federatedIdentities", [])}  # fmt: skip
        assert dict(user.linked) == links
