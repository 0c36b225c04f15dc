"""
Configurations that Kong documents for `openid-connect`, with the plugin's name changed alone.

They are written here from the descriptions on Kong's pages for Gateway 3.16; the
addresses are ours. An issuer over plain http that is not on loopback adds
`insecure_allow_http` and nothing else.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from kong_token_exchange.config import Conditions, load_config
from kong_token_exchange.errors import ConfigError

A, B = "https://a.example.com/realms/one", "https://b.example.com/realms/two"

CROSS_DOMAIN: dict[str, Any] = {
    "issuer": B,
    "client_id": ["kong"],
    "client_secret": ["a-secret"],
    "client_auth": ["client_secret_post"],
    "auth_methods": ["bearer"],
    "token_exchange": {
        "subject_token_issuers": [
            {
                "issuer": A,
                "verify_signature": True,
                "conditions": {
                    "missing_audience": None,
                    "has_audience": None,
                    "missing_scopes": None,
                    "has_scopes": None,
                },
            }
        ],
        "request": {"empty_audience": False, "scopes": None, "empty_scopes": False, "audience": None},
    },
}

TRANSFORMATION: dict[str, Any] = {
    "issuer": B,
    "client_id": ["kong"],
    "client_secret": ["a-secret"],
    "client_auth": ["client_secret_post"],
    "auth_methods": ["bearer"],
    "token_exchange": {
        "subject_token_issuers": [
            {
                "issuer": B,
                "conditions": {
                    "missing_audience": None,
                    "has_audience": None,
                    "missing_scopes": ["profile"],
                    "has_scopes": None,
                },
            }
        ],
        "request": {"empty_audience": False, "scopes": None, "empty_scopes": False, "audience": None},
    },
}

KEYCLOAK: dict[str, Any] = {
    "issuer": "http://localhost:8080/realms/master",
    "using_pseudo_issuer": True,
    "jwks_endpoint": "http://keycloak:8080/realms/master/protocol/openid-connect/certs",
    "token_endpoint": "http://keycloak:8080/realms/master/protocol/openid-connect/token",
    "client_id": ["client-2"],
    "client_secret": ["a-secret"],
    "auth_methods": ["bearer"],
    "token_exchange": {
        "subject_token_issuers": [
            {"issuer": "http://localhost:8080/realms/master", "conditions": {"has_audience": ["client-2"]}}
        ],
        "request": {"scopes": ["profile"]},
    },
}

MULTI_IDP: dict[str, Any] = {
    "issuer": "https://idp-a.example.com",
    "client_id": ["kong-client"],
    "client_secret": ["a-secret"],
    "client_auth": ["client_secret_post"],
    "auth_methods": ["bearer"],
    "token_exchange": {
        "subject_token_issuers": [{"issuer": "https://idp-b.example.com", "verify_signature": True}]
    },
}


def test_cross_domain_trusts_one_foreign_issuer() -> None:
    config = load_config(CROSS_DOMAIN)

    assert config.target.issuer == B
    assert [(entry.issuer, entry.conditions, entry.verify_signature) for entry in config.issuers] == [
        (A, None, True)
    ]
    assert (
        config.client.method,
        config.request.scopes,
        config.request.audience,
    ) == ("client_secret_post", ("openid",), ())
    assert config.warnings == ()


def test_transformation_exchanges_tokens_without_a_scope() -> None:
    config = load_config(TRANSFORMATION)

    assert [(B, Conditions(missing_scopes=("profile",)))] == [
        (entry.issuer, entry.conditions) for entry in config.issuers
    ]
    assert config.issuers[0].verify_signature


def test_transformation_may_name_the_issuer_by_its_discovery_url_in_both_places() -> None:
    raw = copy.deepcopy(TRANSFORMATION)
    raw["issuer"] = raw["token_exchange"]["subject_token_issuers"][0]["issuer"] = (
        f"{B}/.well-known/openid-configuration"
    )

    assert (load_config(raw).target.issuer, load_config(raw).issuers[0].issuer) == (B, B)


def test_keycloak_needs_one_line_because_its_endpoints_are_plain_http() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(KEYCLOAK)
    assert caught.value.path == "token_endpoint"
    assert "insecure_allow_http" in caught.value.message

    config = load_config({**KEYCLOAK, "insecure_allow_http": True})
    assert (None, KEYCLOAK["token_endpoint"], KEYCLOAK["jwks_endpoint"]) == (
        config.target.discovery_url,
        config.target.token_endpoint,
        config.target.jwks_uri,
    )
    assert [Conditions(has_audience=("client-2",))] == [entry.conditions for entry in config.issuers]
    assert (config.client.method, config.request.scopes) == ("client_secret_basic", ("profile",))


def test_keycloak_on_loopback_needs_nothing() -> None:
    raw = {
        **KEYCLOAK,
        "jwks_endpoint": "http://localhost:8080/realms/master/protocol/openid-connect/certs",
        "token_endpoint": "http://127.0.0.1:8080/realms/master/protocol/openid-connect/token",
    }

    assert load_config(raw).warnings == ()


def test_multi_idp_exchanges_the_other_issuers_tokens() -> None:
    config = load_config(MULTI_IDP)

    assert (
        config.target.issuer,
        [entry.issuer for entry in config.issuers],
    ) == ("https://idp-a.example.com", ["https://idp-b.example.com"])
    assert (config.target_rules.verify_signature, config.target_rules.conditions) == (True, None)


@pytest.mark.parametrize("name", ["http", "https"])
def test_an_http_issuer_adds_one_field(name: str) -> None:
    raw = copy.deepcopy(CROSS_DOMAIN)
    raw["issuer"] = raw["issuer"].replace("https", name)
    raw["token_exchange"]["subject_token_issuers"][0]["issuer"] = A.replace("https", name)

    assert load_config({**raw, "insecure_allow_http": True}).issuers


ACTOR_TOKEN: dict[str, Any] = copy.deepcopy(CROSS_DOMAIN)
ACTOR_TOKEN["token_exchange"]["request"]["actor_token"] = {
    "source": "header",
    "header_name": "X-Actor-Token",
    "type": "urn:ietf:params:oauth:token-type:access_token",
}


def test_an_actor_token_comes_from_the_header_that_kong_names() -> None:
    actor = load_config(ACTOR_TOKEN).actor

    assert ("header", "X-Actor-Token", None, True) == (
        actor.source,
        actor.header_name,
        actor.static_token,
        actor.verified,
    )
    # What is ours and not Kong's asks for nothing.
    assert (False, False, ()) == (actor.required, actor.enforce_may_act, actor.clients)


def test_an_actor_token_comes_from_the_configuration() -> None:
    raw = copy.deepcopy(CROSS_DOMAIN)
    raw["token_exchange"]["request"]["actor_token"] = {"source": "config", "static_token": "MARKED-actor"}
    config = load_config(raw)

    assert config.actor.static_token is not None
    assert "MARKED-actor" == config.actor.static_token.reveal()
    assert "MARKED" not in repr(config)
    assert not config.actor.verified


def test_an_actor_token_at_kongs_default_is_no_actor_token() -> None:
    raw = copy.deepcopy(CROSS_DOMAIN)
    raw["token_exchange"]["request"]["actor_token"] = {
        "source": "none",
        "header_name": None,
        "static_token": None,
        "type": "urn:ietf:params:oauth:token-type:access_token",
    }

    assert load_config(CROSS_DOMAIN) == load_config(raw)
