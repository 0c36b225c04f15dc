"""
Which configurations and requests share a cached token: the table of pairs.

By design two configurations that differ in any field share nothing, whether or not the field shapes
the result; so each field stands here with two values, and a field without a row fails
`test_schema.py`. What says the same in other words shares, and so does what says only where entries
are kept: nodes reach one Redis in their own ways, and rotate its keys one after the other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from kong_token_exchange.config import load_config
from kong_token_exchange.errors import TokenExchangeError
from kong_token_exchange.plugin import TokenExchangePlugin
from kong_token_exchange.ports import NotInMemoryError
from kong_token_exchange.schema import CONFIG as SCHEMA
from kong_token_exchange.schema import KONG_AUTH_METHODS, Field
from tests.support.fakes import ACCESS_TOKEN_TYPE
from tests.unit.test_flow import (
    CONFIG,
    ENDPOINT,
    FOREIGN,
    ID_TOKEN_TYPE,
    PARTNER,
    SUBJECT,
    TARGET,
    Bench,
    target,
)

ENTRY, CONDITIONS = (
    "token_exchange.subject_token_issuers[]",
    "token_exchange.subject_token_issuers[].conditions",
)
REQUEST, RESULT, CACHE = "token_exchange.request", "token_exchange.result", "token_exchange.cache"
FLOW, PAIR = "token_exchange.flow", "token_exchange.result.same_subject_claims[]"

ACTOR_TOKEN = "token_exchange.request.actor_token"

Changes = dict[str, Any]

STATIC = target.mint(sub="gateway", aud="gateway", azp="gateway")
BY_HEADER: Changes = {f"{ACTOR_TOKEN}.source": "header", f"{ACTOR_TOKEN}.header_name": "X-Actor"}

METADATA = "protected_resource_metadata"
PUBLISHED: Changes = {
    f"{METADATA}.resource": "https://api.test/orders",
    f"{METADATA}.authorization_servers": [TARGET],
}
CERTIFICATE = "proof_of_possession_mtls_from_header"
BY_CERTIFICATE: Changes = {
    "proof_of_possession_mtls": "optional",
    f"{CERTIFICATE}.certificate_header_name": "x-client-cert",
    "token_exchange.proof_of_possession.trusted_ips": ["10.0.0.1"],
}

# Each field: what the one says, and what the other says. They differ in this field alone.
FIELDS: dict[str, tuple[Changes, Changes]] = {
    "issuer": (
        {"token_exchange.subject_token_issuers": [{"issuer": PARTNER}]},
        {"token_exchange.subject_token_issuers": [{"issuer": PARTNER}], "issuer": TARGET + "/"},
    ),
    "using_pseudo_issuer": (
        {"jwks_endpoint": "https://idp.test/keys"},
        {"jwks_endpoint": "https://idp.test/keys", "using_pseudo_issuer": True},
    ),
    "token_endpoint": ({}, {"token_endpoint": ENDPOINT + "2"}),
    "jwks_endpoint": ({}, {"jwks_endpoint": "https://idp.test/keys"}),
    "client_id": ({}, {"client_id": ["other"]}),
    "client_secret": ({}, {"client_secret": ["other"]}),
    "client_secret_file": (
        {"client_secret": None, "client_secret_file": "/run/secrets/a"},
        {"client_secret": None, "client_secret_file": "/run/secrets/b"},
    ),
    "client_auth": ({}, {"client_auth": ["client_secret_post"]}),
    "auth_methods": ({}, {"auth_methods": list(KONG_AUTH_METHODS)}),
    "bearer_token_param_type": ({}, {"bearer_token_param_type": ["header", "query"]}),
    "bearer_token_cookie_name": (
        {"bearer_token_param_type": ["header", "cookie"], "bearer_token_cookie_name": "a"},
        {"bearer_token_param_type": ["header", "cookie"], "bearer_token_cookie_name": "b"},
    ),
    "bearer_token_header_name": ({}, {"bearer_token_header_name": "X-Token"}),
    "run_on_preflight": ({}, {"run_on_preflight": False}),
    "hide_credentials": ({}, {"hide_credentials": False}),
    "upstream_access_token_header": ({}, {"upstream_access_token_header": "X-Token"}),
    "audience_required": ({}, {"audience_required": ["orders"]}),
    "scopes_required": ({}, {"scopes_required": ["read"]}),
    "claims_forbidden": ({}, {"claims_forbidden": ["email"]}),
    "audience_claim": ({}, {"audience_claim": ["audience"]}),
    "scopes_claim": ({}, {"scopes_claim": ["scp"]}),
    "leeway": ({}, {"leeway": 1}),
    "proof_of_possession_dpop": ({}, {"proof_of_possession_dpop": "optional"}),
    "dpop_proof_lifetime": ({}, {"dpop_proof_lifetime": 60}),
    "proof_of_possession_mtls": ({}, {"proof_of_possession_mtls": "optional"}),
    **{
        f"{METADATA}.{name}": (PUBLISHED, {**PUBLISHED, f"{METADATA}.{name}": value})
        for name, value in {
            "resource": "https://api.test/other",
            "authorization_servers": ["https://other.test"],
            "scopes_supported": ["read"],
            "metadata_endpoint": "/about",
        }.items()
    },
    f"{CERTIFICATE}.certificate_header_name": (
        BY_CERTIFICATE,
        {**BY_CERTIFICATE, f"{CERTIFICATE}.certificate_header_name": "x-other"},
    ),
    f"{CERTIFICATE}.certificate_header_format": (
        BY_CERTIFICATE,
        {**BY_CERTIFICATE, f"{CERTIFICATE}.certificate_header_format": "base64_encoded"},
    ),
    "token_exchange.proof_of_possession.trusted_ips": (
        BY_CERTIFICATE,
        {**BY_CERTIFICATE, "token_exchange.proof_of_possession.trusted_ips": ["10.0.0.2"]},
    ),
    "token_exchange.proof_of_possession.origins": (
        {"proof_of_possession_dpop": "optional"},
        {
            "proof_of_possession_dpop": "optional",
            "token_exchange.proof_of_possession.origins": ["https://api.test"],
        },
    ),
    "audience": ({}, {"audience": ["orders"]}),
    "scopes": ({}, {"scopes": ["write"]}),
    "token_post_args_names": (
        {"token_post_args_names": ["a"], "token_post_args_values": ["1"]},
        {"token_post_args_names": ["b"], "token_post_args_values": ["1"]},
    ),
    "token_post_args_values": (
        {"token_post_args_names": ["a"], "token_post_args_values": ["1"]},
        {"token_post_args_names": ["a"], "token_post_args_values": ["2"]},
    ),
    "token_headers_names": (
        {"token_headers_names": ["X-A"], "token_headers_values": ["1"]},
        {"token_headers_names": ["X-B"], "token_headers_values": ["1"]},
    ),
    "token_headers_values": (
        {"token_headers_names": ["X-A"], "token_headers_values": ["1"]},
        {"token_headers_names": ["X-A"], "token_headers_values": ["2"]},
    ),
    "ssl_verify": ({}, {"ssl_verify": False}),
    "timeout": ({}, {"timeout": 9000}),
    "cache_ttl": ({}, {"cache_ttl": 60}),
    "cache_ttl_max": ({}, {"cache_ttl_max": 60}),
    "cache_ttl_neg": ({}, {"cache_ttl_neg": 1}),
    "ca_file": ({"ca_file": "/etc/ssl/a.pem"}, {"ca_file": "/etc/ssl/b.pem"}),
    "insecure_allow_http": ({}, {"insecure_allow_http": True}),
    f"{ENTRY}.issuer": ({}, {f"{ENTRY}.issuer": "https://other.test"}),
    f"{CONDITIONS}.has_audience": ({}, {f"{CONDITIONS}.has_audience": ["other"]}),
    f"{CONDITIONS}.missing_audience": ({}, {f"{CONDITIONS}.missing_audience": ["api"]}),
    f"{CONDITIONS}.has_scopes": ({}, {f"{CONDITIONS}.has_scopes": ["read"]}),
    f"{CONDITIONS}.missing_scopes": ({}, {f"{CONDITIONS}.missing_scopes": ["admin"]}),
    f"{ENTRY}.verify_signature": (
        {f"{ENTRY}.insecure_skip_subject_signature": True},
        {f"{ENTRY}.insecure_skip_subject_signature": True, f"{ENTRY}.verify_signature": False},
    ),
    f"{ENTRY}.insecure_skip_subject_signature": (
        {f"{ENTRY}.verify_signature": False},
        {f"{ENTRY}.verify_signature": False, f"{ENTRY}.insecure_skip_subject_signature": True},
    ),
    f"{ENTRY}.jwks_uri": ({}, {f"{ENTRY}.jwks_uri": "https://partner.test/keys"}),
    f"{ENTRY}.algorithms": ({}, {f"{ENTRY}.algorithms": ["RS256"]}),
    f"{ENTRY}.audience": ({}, {f"{ENTRY}.audience": ["api"]}),
    f"{ENTRY}.clients": ({}, {f"{ENTRY}.clients": ["web"]}),
    f"{ENTRY}.required_claims": ({}, {f"{ENTRY}.required_claims": ["sub"]}),
    f"{ENTRY}.typ": ({}, {f"{ENTRY}.typ": ["at+jwt"]}),
    f"{ENTRY}.subject_token_type": ({}, {f"{ENTRY}.subject_token_type": "urn:x:other"}),
    f"{ENTRY}.max_age": ({}, {f"{ENTRY}.max_age": 600}),
    f"{REQUEST}.audience": ({}, {f"{REQUEST}.audience": ["orders"]}),
    f"{REQUEST}.empty_audience": (
        {"audience": ["a"]},
        {"audience": ["a"], f"{REQUEST}.empty_audience": True},
    ),
    f"{REQUEST}.scopes": ({}, {f"{REQUEST}.scopes": ["read"]}),
    f"{REQUEST}.empty_scopes": ({}, {f"{REQUEST}.empty_scopes": True}),
    f"{REQUEST}.post_args_names": (
        {f"{REQUEST}.post_args_names": ["a"], f"{REQUEST}.post_args_values": ["1"]},
        {f"{REQUEST}.post_args_names": ["b"], f"{REQUEST}.post_args_values": ["1"]},
    ),
    f"{REQUEST}.post_args_values": (
        {f"{REQUEST}.post_args_names": ["a"], f"{REQUEST}.post_args_values": ["1"]},
        {f"{REQUEST}.post_args_names": ["a"], f"{REQUEST}.post_args_values": ["2"]},
    ),
    f"{REQUEST}.empty_post_args": ({}, {f"{REQUEST}.empty_post_args": True}),
    f"{REQUEST}.headers_names": (
        {f"{REQUEST}.headers_names": ["X-A"], f"{REQUEST}.headers_values": ["1"]},
        {f"{REQUEST}.headers_names": ["X-B"], f"{REQUEST}.headers_values": ["1"]},
    ),
    f"{REQUEST}.headers_values": (
        {f"{REQUEST}.headers_names": ["X-A"], f"{REQUEST}.headers_values": ["1"]},
        {f"{REQUEST}.headers_names": ["X-A"], f"{REQUEST}.headers_values": ["2"]},
    ),
    f"{REQUEST}.empty_headers": ({}, {f"{REQUEST}.empty_headers": True}),
    f"{REQUEST}.resource": ({}, {f"{REQUEST}.resource": ["https://api.test/"]}),
    f"{REQUEST}.requested_token_type": ({}, {f"{REQUEST}.requested_token_type": ACCESS_TOKEN_TYPE}),
    f"{REQUEST}.subject_token_type": ({}, {f"{REQUEST}.subject_token_type": "urn:x:other"}),
    "token_exchange.grant_type": ({}, {"token_exchange.grant_type": "jwt_bearer"}),
    "token_exchange.provider": (
        {"token_exchange.grant_type": "jwt_bearer"},
        {"token_exchange.grant_type": "jwt_bearer", "token_exchange.provider": "microsoft"},
    ),
    f"{ACTOR_TOKEN}.source": (
        {f"{ACTOR_TOKEN}.static_token": STATIC},
        {f"{ACTOR_TOKEN}.static_token": STATIC, f"{ACTOR_TOKEN}.source": "config"},
    ),
    f"{ACTOR_TOKEN}.static_token": (
        {f"{ACTOR_TOKEN}.source": "config", f"{ACTOR_TOKEN}.static_token": STATIC},
        {f"{ACTOR_TOKEN}.source": "config", f"{ACTOR_TOKEN}.static_token": STATIC + "x"},
    ),
    f"{ACTOR_TOKEN}.header_name": (
        {f"{ACTOR_TOKEN}.source": "header", f"{ACTOR_TOKEN}.header_name": "X-Actor"},
        {f"{ACTOR_TOKEN}.source": "header", f"{ACTOR_TOKEN}.header_name": "X-Other"},
    ),
    f"{ACTOR_TOKEN}.type": (
        {f"{ACTOR_TOKEN}.source": "header", f"{ACTOR_TOKEN}.header_name": "X-Actor"},
        {
            f"{ACTOR_TOKEN}.source": "header",
            f"{ACTOR_TOKEN}.header_name": "X-Actor",
            f"{ACTOR_TOKEN}.type": ID_TOKEN_TYPE,
        },
    ),
    "token_exchange.actor.clients": (BY_HEADER, {**BY_HEADER, "token_exchange.actor.clients": ["web"]}),
    "token_exchange.actor.required": (BY_HEADER, {**BY_HEADER, "token_exchange.actor.required": True}),
    "token_exchange.actor.enforce_may_act": (
        BY_HEADER,
        {**BY_HEADER, "token_exchange.actor.enforce_may_act": True},
    ),
    "token_exchange.actor.max_chain_depth": ({}, {"token_exchange.actor.max_chain_depth": 2}),
    f"{CACHE}.enabled": ({}, {f"{CACHE}.enabled": False}),
    f"{CACHE}.ttl": ({}, {f"{CACHE}.ttl": 60}),
    f"{CACHE}.ttl_neg": ({}, {f"{CACHE}.ttl_neg": 1}),
    f"{CACHE}.refresh_ahead": ({}, {f"{CACHE}.refresh_ahead": False}),
    f"{RESULT}.validation": ({}, {f"{RESULT}.validation": "claims"}),
    f"{RESULT}.allowed_scopes": ({}, {f"{RESULT}.allowed_scopes": ["openid", "read"]}),
    f"{RESULT}.allowed_audience": ({}, {f"{RESULT}.allowed_audience": ["orders"]}),
    f"{RESULT}.max_lifetime": ({}, {f"{RESULT}.max_lifetime": 900}),
    f"{RESULT}.narrowing": ({}, {f"{RESULT}.narrowing": "audit"}),
    f"{RESULT}.same_subject": ({}, {f"{RESULT}.same_subject": "off"}),
    f"{PAIR}.subject_claim": (
        {f"{PAIR}.subject_claim": "sub", f"{PAIR}.result_claim": "sub"},
        {f"{PAIR}.subject_claim": "email", f"{PAIR}.result_claim": "sub"},
    ),
    f"{PAIR}.result_claim": (
        {f"{PAIR}.subject_claim": "sub", f"{PAIR}.result_claim": "sub"},
        {f"{PAIR}.subject_claim": "sub", f"{PAIR}.result_claim": "email"},
    ),
    f"{FLOW}.name": ({}, {f"{FLOW}.name": "orders"}),
    f"{FLOW}.kind": ({}, {f"{FLOW}.kind": "federation"}),
    f"{FLOW}.owner": ({}, {f"{FLOW}.owner": "team"}),
    f"{FLOW}.justification": ({}, {f"{FLOW}.justification": "because"}),
    f"{FLOW}.review_by": ({}, {f"{FLOW}.review_by": "2030-01-01"}),
    "token_exchange.strict": (
        STRICT := {
            "audience_required": ["orders"],
            f"{RESULT}.allowed_scopes": ["openid", "read"],
            f"{RESULT}.allowed_audience": ["orders"],
            f"{RESULT}.max_lifetime": 900,
            f"{PAIR}.subject_claim": "sub",
            f"{PAIR}.result_claim": "sub",
        },
        {**STRICT, "token_exchange.strict": True},
    ),
    "token_exchange.deadline": ({}, {"token_exchange.deadline": 4000}),
    "token_exchange.max_token_size": ({}, {"token_exchange.max_token_size": 9000}),
    "token_exchange.breaker.failures": ({}, {"token_exchange.breaker.failures": 4}),
    "token_exchange.breaker.open_for": ({}, {"token_exchange.breaker.open_for": 4000}),
}

REDIS, SEALED = "cluster_cache_redis", {f"{CACHE}.seal_keys": ["5f2b8a1c9e3d4f60718293a4b5c6d7e8"]}
SENTINEL: Changes = {
    f"{REDIS}.sentinel_master": "main",
    f"{REDIS}.sentinel_role": "master",
    f"{REDIS}.sentinel_nodes": [{"host": "s1", "port": 1}],
}

# Each field that says where and how entries are kept, with what a configuration may say there.
WHERE: dict[str, Changes] = {
    "cluster_cache_strategy": {
        "cluster_cache_strategy": "redis",
        "cluster_cache_items": ["tokens"],
        **SEALED,
    },
    "cluster_cache_items": {"cluster_cache_items": ["tokens"]},
    f"{CACHE}.seal_keys": SEALED,
    f"{REDIS}.cluster_max_redirections": {f"{REDIS}.cluster_max_redirections": 1},
    f"{REDIS}.cluster_nodes[].ip": {f"{REDIS}.cluster_nodes": [{"ip": "n1"}]},
    f"{REDIS}.cluster_nodes[].port": {f"{REDIS}.cluster_nodes": [{"port": 1}]},
    f"{REDIS}.connect_timeout": {f"{REDIS}.connect_timeout": 1},
    f"{REDIS}.database": {f"{REDIS}.database": 1},
    f"{REDIS}.host": {f"{REDIS}.host": "redis"},
    f"{REDIS}.keepalive_pool_size": {f"{REDIS}.keepalive_pool_size": 1},
    f"{REDIS}.password": {f"{REDIS}.password": "p"},
    f"{REDIS}.port": {f"{REDIS}.port": 1},
    f"{REDIS}.read_timeout": {f"{REDIS}.read_timeout": 1},
    f"{REDIS}.send_timeout": {f"{REDIS}.send_timeout": 1},
    f"{REDIS}.sentinel_master": SENTINEL,
    f"{REDIS}.sentinel_nodes[].host": SENTINEL,
    f"{REDIS}.sentinel_nodes[].port": SENTINEL,
    f"{REDIS}.sentinel_password": {f"{REDIS}.sentinel_password": "p"},
    f"{REDIS}.sentinel_role": SENTINEL,
    f"{REDIS}.sentinel_username": {f"{REDIS}.sentinel_username": "u"},
    f"{REDIS}.server_name": {f"{REDIS}.server_name": "redis.test"},
    f"{REDIS}.ssl": {f"{REDIS}.ssl": True},
    f"{REDIS}.ssl_verify": {f"{REDIS}.ssl_verify": False},
    f"{REDIS}.username": {f"{REDIS}.username": "u", f"{REDIS}.password": "p"},
}

# Fields that can be set and have one value alone; without a second one there is no pair.
ONE_VALUE = {"token_exchange.map_identities_from"}


def settable_fields(field: Field = SCHEMA, path: str = "") -> Iterator[str]:
    """Name every field that a configuration can set to more than its default."""
    if field.only_default:
        return
    inner = field.elements if field.elements is not None and field.elements.type == "record" else field
    if not inner.fields:
        yield path
        return
    for name, child in inner.fields.items():
        prefix = f"{path}{'[]' if inner is not field else ''}."
        yield from settable_fields(child, f"{prefix if path else ''}{name}")


def unplaced_fields() -> set[str]:
    """Return the fields without a row, and the rows without a field."""
    return set(settable_fields()) ^ (set(FIELDS) | set(WHERE) | ONE_VALUE)


def configured(changes: Changes) -> dict[str, Any]:
    """Return CONFIG with *changes*, by path: conditions in the target's entry, all else in the partner's."""
    raw = copy.deepcopy(CONFIG)
    for path, value in changes.items():
        *folders, name = path.split(".")
        place: Any = raw
        for folder in folders:
            if not folder.endswith("[]"):
                place = place.setdefault(folder, {})
            elif folder == "subject_token_issuers[]":
                place = place["subject_token_issuers"][0 if "conditions" in folders else 1]
            else:
                place = place.setdefault(folder[:-2], [{}])[0]
        place[name] = value
    return raw


def is_hit(it: Bench, token: str) -> bool:
    """Tell whether memory alone gives an exchanged token."""
    try:
        result = it.run(token, within=None)
    except (NotInMemoryError, TokenExchangeError):
        return False
    return result.cache == "hit"


@pytest.mark.parametrize(("one", "other"), FIELDS.values(), ids=[f"CACHE-01-{path}" for path in FIELDS])
def test_configurations_that_differ_in_a_field_share_no_token(one: Changes, other: Changes) -> None:
    filled = Bench(configured(one))
    asking = Bench(configured(other), cache=filled.cache, clock=filled.clock)
    for token in (SUBJECT, FOREIGN):
        with suppress(TokenExchangeError):
            filled.run(token)

    hits = [is_hit(filled, token) for token in (SUBJECT, FOREIGN)]
    assert any(hits), "the table proves nothing: nothing was stored"
    assert [False, False] == [is_hit(asking, token) for token in (SUBJECT, FOREIGN)]
    # Nor does the other, with entries of its own in the same memory, change what the one has.
    for token in (SUBJECT, FOREIGN):
        with suppress(TokenExchangeError, KeyError):
            asking.run(token)
    assert hits == [is_hit(filled, token) for token in (SUBJECT, FOREIGN)]


def test_each_row_changes_its_own_field_alone() -> None:
    for path, (one, other) in FIELDS.items():
        changed = {name for name in {*one, *other} if one.get(name, ...) != other.get(name, ...)}
        assert {path} == changed


SAME: dict[str, Changes] = {
    "default-spelt-out": {"scopes": ["openid"], "leeway": 0, f"{CACHE}.enabled": True},
    "whole-number-as-lua-sends-it": {"timeout": 10000.0, "token_exchange.deadline": 5000.0},
    "null": {"audience": None, f"{CACHE}.ttl": None, FLOW: None},
    "empty-record": {CACHE: {}, FLOW: {}, RESULT: {}},
    "kongs-own-members": {"__seq__": 7, "__plugin_id": "b", "route_id": "r", "service_id": "s"},
    "header-spelt-out": {"upstream_access_token_header": "authorization:bearer"},
}


@pytest.mark.parametrize("changes", WHERE.values(), ids=WHERE.keys())
def test_where_entries_are_kept_parts_nobody(changes: Changes) -> None:
    filled = Bench()
    filled.run(SUBJECT)

    assert is_hit(Bench(configured(changes), cache=filled.cache), SUBJECT)


@pytest.mark.parametrize("changes", SAME.values(), ids=SAME.keys())
def test_configurations_that_say_the_same_share(changes: Changes) -> None:
    filled = Bench()
    filled.run(SUBJECT)
    raw = configured(changes)
    backwards = dict(reversed(raw.items()))

    assert is_hit(Bench(raw, cache=filled.cache), SUBJECT)
    assert is_hit(Bench(backwards, cache=filled.cache), SUBJECT)
    assert load_config(raw).identity == filled.config.identity


REQUESTS: dict[str, str] = {
    "CACHE-06-signature": target.mint(aud=["gateway", "other"], key="PS256"),
    "CACHE-07-claim": target.mint(aud=["gateway", "other"], jti="another"),
    "CACHE-06-header": target.mint(aud=["gateway", "other"], header={"x": 1}),
    "issuer": FOREIGN,
}


@pytest.mark.parametrize("token", REQUESTS.values(), ids=REQUESTS.keys())
def test_tokens_that_differ_share_nothing(token: str) -> None:
    it = Bench()
    it.run(SUBJECT)

    assert is_hit(it, SUBJECT)
    assert not is_hit(it, token)


def test_cache_04_another_discovered_endpoint_and_another_kind_of_token_share_nothing() -> None:
    raw = configured({})
    del raw["token_endpoint"]
    it = Bench(raw)
    it.run(SUBJECT)
    assert is_hit(it, SUBJECT)

    it.keys.endpoint = ENDPOINT + "2"
    assert not is_hit(it, SUBJECT)
    it.keys.endpoint = ENDPOINT
    assert is_hit(it, SUBJECT)


def test_cache_08_another_actor_shares_nothing() -> None:
    it = Bench(configured(BY_HEADER))
    actors = [None, STATIC, target.mint(sub="gateway", aud="gateway", azp="gateway", jti="another")]

    def ask(actor: str | None) -> str:
        return it.flow.run(SUBJECT, deadline=it.clock.monotonic() + 5, actor_token=actor).cache

    assert ["miss"] * 3 == [ask(actor) for actor in actors]
    assert ["hit"] * 3 == [ask(actor) for actor in actors]


def test_the_place_of_the_credential_makes_no_difference() -> None:
    raw = configured(
        {"bearer_token_param_type": ["header", "cookie", "query"], "bearer_token_cookie_name": "session"}
    )
    it = Bench(raw)
    instance: Any = TokenExchangePlugin(lambda _: it.flow, it.clock).start(raw)
    it.run(SUBJECT)

    places = {
        "header": f"Bearer {SUBJECT}",
        "cookie": f"a=b; session={SUBJECT}",
        "query": f"page=1&access_token={SUBJECT}",
    }
    for place, credential in places.items():
        facts = [credential if kind == place else "" for kind in instance._kinds]
        outcome = instance.warm(facts)
        assert outcome is not None, place
        assert not outcome.is_exit, place
    assert 1 == it.exchanges
