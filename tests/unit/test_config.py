"""JSON configuration to PluginConfig: what loads, what is refused, and where the message points."""

from __future__ import annotations

import copy
import json
from datetime import date
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kong_token_exchange.config import (
    CachePolicy,
    ClaimPair,
    Conditions,
    CredentialSources,
    Flow,
    PluginConfig,
    ResultPolicy,
    TargetIssuer,
    UpstreamHeader,
    load_config,
)
from kong_token_exchange.errors import ConfigError
from kong_token_exchange.schema import ASYMMETRIC_ALGORITHMS, CONFIG, KONG_AUTH_METHODS, NOT_YET, Field

TARGET = "https://idp.example.com/realms/internal"
PARTNER = "https://partner.example.com"
SECRET = "s3cr3t-marked-0f9e"
ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"
ENTRY = "token_exchange.subject_token_issuers"

BASE: dict[str, Any] = {
    "issuer": TARGET,
    "client_id": ["gateway"],
    "client_secret": [SECRET],
    "token_exchange": {"subject_token_issuers": [{"issuer": PARTNER}]},
}
TARGET_ENTRY = {"issuer": TARGET, "conditions": {"has_audience": ["gateway"]}}


def put(raw: dict[str, Any], path: str, value: object) -> None:
    """Set one place, named as ConfigError names it; records on the way are made."""
    steps: list[str | int] = []
    for part in path.split("."):
        name, _, index = part.partition("[")
        steps += [name, int(index[:-1])] if index else [name]
    node: Any = raw
    for step in steps[:-1]:
        node = node.setdefault(step, {}) if isinstance(node, dict) else node[step]
    node[steps[-1]] = value


def make(changes: dict[str, object] | None = None) -> dict[str, Any]:
    raw = copy.deepcopy(BASE)
    for path, value in (changes or {}).items():
        put(raw, path, copy.deepcopy(value))
    return raw


def load(changes: dict[str, object] | None = None) -> PluginConfig:
    return load_config(make(changes))


def refuse(changes: dict[str, object]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(changes)
    assert SECRET not in str(caught.value)
    return caught.value


# --- what loads -----------------------------------------------------------------------


def test_the_least_configuration_has_the_defaults() -> None:
    config = load()

    assert config.target == TargetIssuer(
        issuer=TARGET,
        discovery_url=f"{TARGET}/.well-known/openid-configuration",
        token_endpoint=None,
        jwks_uri=None,
    )
    assert (
        config.client.client_id,
        config.client.client_secret.reveal() if config.client.client_secret else None,
        config.client.method,
    ) == ("gateway", SECRET, "client_secret_basic")
    (entry,) = config.issuers
    assert (PARTNER, f"{PARTNER}/.well-known/openid-configuration", None, True, None) == (
        entry.issuer, entry.discovery_url, entry.jwks_uri, entry.verify_signature, entry.conditions,
    )  # fmt: skip
    assert entry.algorithms == ASYMMETRIC_ALGORITHMS
    assert (
        entry.audience, entry.clients, entry.required_claims, entry.typ, entry.subject_token_type,
        entry.max_age,
    ) == ((), (), (), (), ACCESS_TOKEN, None)  # fmt: skip
    request = config.request
    assert (
        request.grant_type, request.audience, request.resource, request.scopes, request.requested_token_type,
        request.subject_token_type, request.extra_parameters, request.extra_headers,
    ) == ("token_exchange", (), (), ("openid",), None, ACCESS_TOKEN, (), ())  # fmt: skip
    assert config.result == ResultPolicy(
        validation="full",
        allowed_scopes=None,
        allowed_audience=None,
        max_lifetime=None,
        narrowing="enforce",
        same_subject=None,
    )
    assert CachePolicy(enabled=True, ttl=3600, ttl_neg=2.0, refresh_ahead=True) == config.cache
    assert (
        CredentialSources(header=True, header_name=None, query=False, cookie_name=None) == config.credential
    )
    assert UpstreamHeader(name="authorization", scheme="bearer") == config.upstream_header
    assert (
        config.hide_credentials, config.run_on_preflight, config.audience_required, config.scopes_required,
        config.audience_claim, config.scopes_claim, config.leeway,
    ) == (True, True, (), (), ("aud",), ("scope",), 0.0)  # fmt: skip
    assert (
        config.timeout_ms, config.deadline_ms, config.max_token_size, config.ssl_verify, config.ca_file,
        config.insecure_allow_http, config.strict, config.flow,
    ) == (10000, 5000, 8192, True, None, False, False, None)  # fmt: skip
    assert config.warnings == ()


def test_every_field_may_be_null() -> None:
    required = {"issuer", "client_id", "token_exchange"}
    nulls: dict[str, object] = {
        name: None for name in CONFIG.fields if name not in required | {"client_secret"}
    }
    exchange = CONFIG.fields["token_exchange"].fields
    nulls |= {f"token_exchange.{name}": None for name in exchange if name != "subject_token_issuers"}

    assert load() == load(nulls)


def test_an_empty_record_is_an_absent_field_whatever_its_type() -> None:
    names = (
        "scopes",
        "audience",
        "timeout",
        "token_endpoint",
        "hide_credentials",
        "upstream_access_token_header",
    )

    assert load() == load({name: {} for name in names})


def spelt_out(field: Field) -> Any:
    """Return the default of everything in *field*, as Kong fills it in."""
    if field.type == "record":
        return {name: spelt_out(child) for name, child in field.fields.items()}
    return field.default


def test_every_default_may_be_spelt_out() -> None:
    full = spelt_out(CONFIG)
    full |= {name: BASE[name] for name in ("issuer", "client_id", "client_secret")}
    full["token_exchange"]["subject_token_issuers"] = BASE["token_exchange"]["subject_token_issuers"]

    assert load() == load_config(full)


def test_what_kong_adds_is_left_aside_and_leaves_the_identity_alone() -> None:
    added = {
        "__plugin_id": "b1", "__seq__": 17, "__key__": "plugins:x", "__ws_id": "w", "route_id": "r",
        "service_id": "s", "consumer_id": {}, "$refs": {"client_secret": ["{vault://env/x}"]},
        "token_exchange.request.$refs": {"a": "b"},
    }  # fmt: skip
    raw = make()
    raw["token_exchange"]["request"] = {"$refs": {"a": "b"}}
    raw |= {name: value for name, value in added.items() if "." not in name}

    assert load() == load_config(raw)


def test_the_identity_tells_configurations_apart() -> None:
    variants: list[dict[str, object]] = [
        {},
        {"client_secret": ["other"]},
        {"token_exchange.request.scopes": ["a"]},
        {"token_exchange.request.scopes": ["a", "b"]},
        {"token_exchange.strict": None, "leeway": 1},
    ]
    identities = {load(changes).identity for changes in variants}

    assert len(variants) == len(identities)
    assert all(len(identity) == 64 and int(identity, 16) >= 0 for identity in identities)


def test_the_identity_does_not_depend_on_the_order_of_members() -> None:
    assert load().identity == load_config(dict(reversed(list(make().items())))).identity


def test_nothing_printed_shows_the_secret() -> None:
    config = load()

    assert SECRET not in repr(config)
    assert SECRET not in str(config)


def test_whole_floats_are_whole_numbers() -> None:
    config = load({"token_exchange.deadline": 1500.0, "token_exchange.cache.ttl": 60.0})

    assert (config.deadline_ms, config.cache.ttl) == (1500, 60)
    assert isinstance(config.deadline_ms, int)


# --- names and types ------------------------------------------------------------------

WRONG_TYPES: list[tuple[str, str, object, str]] = [
    ("record-for-string", "issuer", {"a": 1}, "must be a string"),
    ("number-for-string", "issuer", 1, "must be a string"),
    ("string-for-array", "client_id", "gateway", "must be an array"),
    ("record-for-array", "audience", {"1": "a"}, "must be an array"),
    ("number-in-array", "audience[0]", 7, "must be a string"),
    ("null-in-array", "audience[0]", None, "must not be null"),
    ("bool-for-number", "timeout", True, "must be a number"),
    ("string-for-number", "timeout", "100", "must be a number"),
    ("nan", "leeway", float("nan"), "finite"),
    ("infinity", "leeway", float("inf"), "finite"),
    ("huge", "timeout", 10**400, "from 1 to"),
    ("fraction-for-integer", "token_exchange.deadline", 1.5, "whole"),
    ("zero-for-boolean", "ssl_verify", 0, "true or false"),
    ("string-for-boolean", "token_exchange.strict", "false", "true or false"),
    ("array-for-record", "token_exchange", [], "must be a record"),
    ("array-for-inner-record", "token_exchange.request", ["x"], "must be a record"),
    ("string-for-entry", f"{ENTRY}[0]", PARTNER, "must be a record"),
    ("empty-string", "token_endpoint", "", "must not be empty"),
    ("line-break", "token_endpoint", "https://idp.example.com/\n", "control"),
    ("nul", "client_id[0]", "a\x00", "control"),
    ("lone-surrogate", "client_id[0]", "a\ud800", "control"),
    ("not-one-of", "token_exchange.grant_type", "password", "one of jwt_bearer, token_exchange"),
    ("unresolved-reference", "client_secret[0]", "{vault://env/gateway}", "reference"),
    ("below", "token_exchange.deadline", 0, "from 1 to"),
    ("above", "token_exchange.deadline", 55_001, "to 55000"),
    ("negative-leeway", "leeway", -1, "from 0"),
    ("zero-ttl", "token_exchange.cache.ttl", 0, "from 1"),
    ("long-ttl-neg", "token_exchange.cache.ttl_neg", 61, "from 0 to 60"),
    ("negative-ttl-neg", "token_exchange.cache.ttl_neg", -1, "from 0 to 60"),
    ("negative-kong-ttl-neg", "cache_ttl_neg", -1, "from 0"),
    ("token-size", "token_exchange.max_token_size", 255, "from 256"),
    ("hmac", f"{ENTRY}[0].algorithms", ["HS256"], "one of RS256"),
    ("alg-none", f"{ENTRY}[0].algorithms", ["none"], "one of RS256"),
    ("empty-limit", "token_exchange.result.allowed_scopes", [], "leave it out"),
    ("empty-clients", f"{ENTRY}[0].clients", [], "leave it out"),
    ("empty-claim-path", "scopes_claim", [], "leave it out"),
]


@pytest.mark.parametrize(
    ("path", "value", "message"), [row[1:] for row in WRONG_TYPES], ids=[row[0] for row in WRONG_TYPES]
)
def test_a_wrong_value_is_refused_by_its_path(path: str, value: object, message: str) -> None:
    parent = path.partition("[")[0]
    changes: dict[str, object] = {parent: [None]} if parent == "audience" and "[" in path else {}
    error = refuse({**changes, path: value})

    assert error.path.startswith(path)
    assert message in error.message
    assert error.reason == "config_invalid"


@pytest.mark.parametrize("raw", [None, [], "x", 3])
def test_a_configuration_that_is_no_record_is_refused(raw: Any) -> None:
    with pytest.raises(ConfigError, match="config: must be a record"):
        load_config(raw)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("isuer", "did you mean issuer?"),
        ("token_exchange.strikt", "did you mean strict?"),
        ("token_exchange.request.audiences", "did you mean audience?"),
        (f"{ENTRY}[0].isser", "did you mean issuer?"),
        ("token_exchange.__seq__", "unknown field"),
        ("session_secret", "unknown field"),
    ],
)
def test_an_unknown_field_is_refused_with_a_hint(path: str, told: str) -> None:
    error = refuse({path: "x"})

    assert path == error.path
    assert told in error.message


def test_an_unknown_name_is_shown_short_and_printable() -> None:
    error = refuse({"\u202e\n" + "x" * 1000: 1})

    assert error.path == "??" + "x" * 62


@pytest.mark.parametrize(
    ("path"),
    ["issuer", "client_id", "token_exchange", ENTRY, f"{ENTRY}[0].issuer"],
)
def test_what_is_required_is_missed_by_its_path(path: str) -> None:
    for absent in (None, {}):
        error = refuse({path: absent})
        expected = ENTRY if path == "token_exchange" else path
        assert (expected, "required") == (error.path, error.message)


@pytest.mark.parametrize("path", ["client_id", ENTRY])
def test_an_empty_array_is_not_enough_where_one_is_required(path: str) -> None:
    assert (path, "must not be empty") == (refuse({path: []}).path, refuse({path: []}).message)


# --- not supported yet ----------------------------------------------------------------


def leaves(path: str, field: Field) -> list[tuple[str, Field]]:
    if field.type != "record":
        return [(path, field)]
    return [leaf for name, child in field.fields.items() for leaf in leaves(f"{path}.{name}", child)]


def another_value(field: Field) -> object:
    """Return a value of the right type that is not the default."""
    if field.one_of:
        return next(choice for choice in field.one_of if choice != field.default)
    if field.type == "array":
        assert field.elements is not None
        if field.elements.type == "record":
            return [{name: another_value(child) for name, child in field.elements.fields.items()}]
        if field.elements.type == "array":
            return [["x"]]
        extra = [choice for choice in field.elements.one_of if choice not in (field.default or [])]  # type: ignore[operator]
        return [*(field.default or []), extra[0] if extra else "x"]  # type: ignore[misc]
    by_type: dict[str, object] = {"string": "x", "boolean": not field.default, "map": {"a": "b"}}
    return by_type.get(field.type, field.between[1] if field.between else 7)


LATER = [
    leaf for name, field in CONFIG.fields.items() if field.only_default for leaf in leaves(name, field)
] + [
    leaf
    for name in ("retry",)
    for leaf in leaves(f"token_exchange.{name}", CONFIG.fields["token_exchange"].fields[name])
]  # fmt: skip


@pytest.mark.parametrize(("path", "field"), LATER, ids=[path for path, _ in LATER])
def test_a_field_of_a_later_release_is_refused_at_any_other_value(path: str, field: Field) -> None:
    error = refuse({path: another_value(field)})

    assert error.path.startswith(path)
    assert field.only_default == error.message


def test_out_16_there_is_no_passage_for_the_anonymous() -> None:
    error = refuse({"anonymous": "guest"})

    assert "anonymous" == error.path


def test_the_order_of_a_default_means_nothing() -> None:
    assert load({"consumer_by": ["username", "custom_id"]}).client.client_id == "gateway"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("client_auth", ["private_key_jwt"]),
        ("client_auth", ["client_secret_jwt"]),
        ("client_auth", ["tls_client_auth"]),
        ("token_exchange.map_identities_from", "subject_token"),
        ("auth_methods", ["bearer", "introspection"]),
        ("auth_methods", ["session"]),
        ("auth_methods", []),
    ],
)
def test_a_choice_of_a_later_release_is_refused(path: str, value: object) -> None:
    error = refuse({path: value})

    assert error.path.startswith(path)
    assert NOT_YET in error.message


@pytest.mark.parametrize("path", ["verify_signature", "verify_claims", "enable_hs_signatures"])
def test_checks_cannot_be_turned_off(path: str) -> None:
    error = refuse({path: path == "enable_hs_signatures"})

    assert path == error.path
    assert NOT_YET not in error.message


# --- issuers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_issuer", "identifier", "discovery_url"),
    [
        (
            "https://a.example/r",
            "https://a.example/r",
            "https://a.example/r/.well-known/openid-configuration",
        ),
        ("https://a.example/", "https://a.example/", "https://a.example/.well-known/openid-configuration"),
        ("https://A.example", "https://A.example", "https://A.example/.well-known/openid-configuration"),
        (
            "https://a.example/r/.well-known/openid-configuration",
            "https://a.example/r",
            "https://a.example/r/.well-known/openid-configuration",
        ),
        (
            "https://a.example/r/.well-known/openid-configuration?p=1",
            "https://a.example/r",
            "https://a.example/r/.well-known/openid-configuration?p=1",
        ),
        (
            "https://a.example/.well-known/oauth-authorization-server/r",
            "https://a.example/r",
            "https://a.example/.well-known/oauth-authorization-server/r",
        ),
    ],
)
def test_a_discovery_url_gives_the_identifier(given_issuer: str, identifier: str, discovery_url: str) -> None:
    target = load({"issuer": given_issuer}).target
    (entry,) = load({f"{ENTRY}[0].issuer": given_issuer}).issuers

    assert (identifier, discovery_url) == (target.issuer, target.discovery_url)
    assert (identifier, discovery_url) == (entry.issuer, entry.discovery_url)


BAD_URLS = [
    ("relative", "/realms/a"),
    ("no-host", "https:///realms"),
    ("no-slashes", "https:realms"),
    ("other-scheme", "ftp://idp.example.com"),
    ("user-information", "https://user:pw@idp.example.com"),
    ("user-only", "https://user@idp.example.com"),
    ("fragment", "https://idp.example.com/#x"),
    ("empty-fragment", "https://idp.example.com/#"),
    ("space", "https://idp.example.com/a b"),
    ("backslash-in-path", "https://idp.example.com/a\\b"),
    ("backslash", "https://idp.example.com\\@evil.example"),
    ("not-ascii", "https://\u0456dp.example.com"),
    ("bad-port", "https://idp.example.com:99999"),
    ("bad-address", "https://[::1"),
    ("escaped-host", "https://idp%2eexample.com"),
]


@pytest.mark.parametrize("url", [row[1] for row in BAD_URLS], ids=[row[0] for row in BAD_URLS])
@pytest.mark.parametrize(
    "path", ["issuer", "token_endpoint", "jwks_endpoint", f"{ENTRY}[0].issuer", f"{ENTRY}[0].jwks_uri"]
)
def test_what_is_no_url_is_refused(path: str, url: str) -> None:
    error = refuse({path: url})

    assert path == error.path
    assert "pw" not in str(error)


@pytest.mark.parametrize("url", ["https://idp.example.com/?a=b", "https://a.example/x/.well-known/y/z"])
def test_what_cannot_be_an_issuer_is_refused(url: str) -> None:
    assert refuse({"issuer": url}).path == "issuer"


HTTP = "must be https"


@pytest.mark.parametrize(
    "path", ["issuer", "token_endpoint", "jwks_endpoint", f"{ENTRY}[0].issuer", f"{ENTRY}[0].jwks_uri"]
)
def test_http_is_for_loopback_or_asked_for(path: str) -> None:
    for host in ("localhost:8080", "127.0.0.1", "127.9.9.9:1", "[::1]:8080"):
        assert load({path: f"http://{host}/realms/a"}).warnings == ()
    for host in ("idp.example.com", "10.0.0.1", "localhost.example.com", "127.1", "0.0.0.0", "notlocalhost"):
        error = refuse({path: f"http://{host}/realms/a"})
        assert path == error.path
        assert HTTP in error.message
        warned = load({path: f"http://{host}/realms/a", "insecure_allow_http": True}).warnings
        assert [path] == [warning.partition(":")[0] for warning in warned]


def test_a_pseudo_issuer_is_compared_and_never_contacted() -> None:
    config = load(
        {
            "issuer": "http://idp.internal:8080/realms/a",
            "using_pseudo_issuer": True,
            "token_endpoint": "https://idp.example.com/token",
            "jwks_endpoint": "https://idp.example.com/certs",
        }
    )

    assert config.target == TargetIssuer(
        issuer="http://idp.internal:8080/realms/a",
        discovery_url=None,
        token_endpoint="https://idp.example.com/token",
        jwks_uri="https://idp.example.com/certs",
    )
    assert (
        config.target_rules.discovery_url,
        config.target_rules.jwks_uri,
    ) == (None, "https://idp.example.com/certs")


@pytest.mark.parametrize("missing", ["token_endpoint", "jwks_endpoint"])
def test_a_pseudo_issuer_needs_its_endpoints(missing: str) -> None:
    endpoints = {
        "token_endpoint": "https://a.example/t",
        "jwks_endpoint": "https://a.example/k",
        missing: None,
    }
    error = refuse({"using_pseudo_issuer": True, **endpoints})

    assert (missing, "required with using_pseudo_issuer") == (error.path, error.message)


def test_an_issuer_that_is_no_url_needs_a_key_set() -> None:
    (entry,) = load(
        {f"{ENTRY}[0]": {"issuer": "kubernetes/serviceaccount", "jwks_uri": "https://k8s.example/keys"}}
    ).issuers

    assert (
        entry.issuer,
        entry.discovery_url,
        entry.jwks_uri,
    ) == ("kubernetes/serviceaccount", None, "https://k8s.example/keys")
    assert f"{ENTRY}[0].issuer" == refuse({f"{ENTRY}[0].issuer": "kubernetes/serviceaccount"}).path


def test_a_foreign_issuer_is_listed_once() -> None:
    error = refuse({ENTRY: [{"issuer": PARTNER}, {"issuer": "https://b.example"}, {"issuer": PARTNER}]})

    assert f"{ENTRY}[2].issuer" == error.path


@pytest.mark.parametrize("other", [PARTNER + "/", PARTNER.upper().replace("HTTPS", "https")])
def test_issuers_that_differ_by_case_or_slash_are_two_and_a_warning(other: str) -> None:
    config = load({ENTRY: [{"issuer": PARTNER}, {"issuer": other}]})

    assert [PARTNER, other] == [entry.issuer for entry in config.issuers]
    assert [f"{ENTRY}[1].issuer"] == [warning.partition(":")[0] for warning in config.warnings]


@pytest.mark.parametrize(("target", "listed"), [(TARGET, TARGET + "/"), (TARGET + "/", TARGET)])
def test_an_entry_that_misses_the_target_by_a_slash_is_a_warning(target: str, listed: str) -> None:
    config = load({"issuer": target, ENTRY: [{"issuer": listed}]})

    assert [f"{ENTRY}[0].issuer"] == [warning.partition(":")[0] for warning in config.warnings]


# --- conditions -----------------------------------------------------------------------

NO_CONDITIONS: list[object] = [
    None,
    {},
    {"has_audience": None, "missing_audience": None, "has_scopes": None, "missing_scopes": None},
    {"has_audience": [], "missing_audience": {}, "has_scopes": [], "missing_scopes": []},
]


@pytest.mark.parametrize("conditions", NO_CONDITIONS)
def test_empty_conditions_are_none(conditions: object) -> None:
    (entry,) = load({f"{ENTRY}[0].conditions": conditions}).issuers
    assert entry.conditions is None

    error = refuse({ENTRY: [{"issuer": TARGET, "conditions": conditions}]})
    assert f"{ENTRY}[0].conditions" == error.path
    assert "required" in error.message


@pytest.mark.parametrize("name", ["has_audience", "missing_audience", "has_scopes", "missing_scopes"])
def test_conditions_are_for_the_target_issuer(name: str) -> None:
    error = refuse({f"{ENTRY}[0].conditions": {name: ["x"]}})
    assert f"{ENTRY}[0].conditions" == error.path

    (entry,) = load({ENTRY: [{"issuer": TARGET, "conditions": {name: ["x", "y"]}}]}).issuers
    assert Conditions(**{name: ("x", "y")}) == entry.conditions


def test_an_empty_condition_beside_a_stated_one_is_absent() -> None:
    conditions = {"has_scopes": ["a"], "missing_scopes": [], "has_audience": None}
    (entry,) = load({ENTRY: [{"issuer": TARGET, "conditions": conditions}]}).issuers

    assert Conditions(has_scopes=("a",)) == entry.conditions


def test_a_condition_holds_one_scope() -> None:
    error = refuse({ENTRY: [{"issuer": TARGET, "conditions": {"has_scopes": ["a", "b c"]}}]})

    assert f"{ENTRY}[0].conditions.has_scopes[1]" == error.path


def test_entries_of_the_target_keep_their_order_and_share_verification() -> None:
    first = {**TARGET_ENTRY, "audience": ["gateway", "orders"], "subject_token_type": "urn:x:one"}
    second = {"issuer": TARGET, "conditions": {"missing_scopes": ["orders"]}, "algorithms": ["ES256"]}
    config = load({ENTRY: [first, second, {"issuer": PARTNER}]})

    assert [entry.conditions.has_audience for entry in config.issuers[:2] if entry.conditions] == [
        ("gateway",),
        (),
    ]
    for rules in (*config.issuers[:2], config.target_rules):
        assert (rules.audience, rules.algorithms) == (("gateway", "orders"), ("ES256",))
    assert [entry.subject_token_type for entry in config.issuers[:2]] == ["urn:x:one", ACCESS_TOKEN]
    assert config.target_rules.conditions is None
    assert (config.issuers[2].audience, config.issuers[2].algorithms) == ((), ASYMMETRIC_ALGORITHMS)


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        ("algorithms", ["RS256"], ["ES256"]),
        ("audience", ["a"], ["b"]),
        ("clients", ["a"], ["b"]),
        ("required_claims", ["a"], ["b"]),
        ("typ", ["at+jwt"], ["JWT"]),
        ("max_age", 60, 61),
    ],
)
def test_entries_of_the_target_cannot_disagree_about_verification(
    name: str, one: object, two: object
) -> None:
    error = refuse({ENTRY: [{**TARGET_ENTRY, name: one}, {**TARGET_ENTRY, name: two}]})
    assert f"{ENTRY}[1].{name}" == error.path

    assert len(load({ENTRY: [{**TARGET_ENTRY, name: one}, {**TARGET_ENTRY, name: one}]}).issuers) == 2


def test_the_key_set_of_the_target_is_at_top_level() -> None:
    error = refuse({ENTRY: [{**TARGET_ENTRY, "jwks_uri": "https://other.example/keys"}]})
    assert f"{ENTRY}[0].jwks_uri" == error.path

    same = "https://idp.example.com/keys"
    (entry,) = load({"jwks_endpoint": same, ENTRY: [{**TARGET_ENTRY, "jwks_uri": same}]}).issuers
    assert same == entry.jwks_uri


# --- signatures of subject tokens -----------------------------------------------------


@pytest.mark.parametrize(
    ("verify", "skip", "verified", "warned"),
    [
        (True, False, True, None),
        (None, False, True, None),
        (False, False, True, "verify_signature"),
        (True, True, True, "insecure_skip_subject_signature"),
        (False, True, False, "verify_signature"),
    ],
)
def test_only_two_switches_turn_verification_off(
    *, verify: bool | None, skip: bool, verified: bool, warned: str | None
) -> None:
    entry = {"issuer": PARTNER, "verify_signature": verify, "insecure_skip_subject_signature": skip}
    config = load({ENTRY: [entry]})

    assert verified is config.issuers[0].verify_signature
    expected = [] if warned is None else [f"{ENTRY}[0].{warned}"]
    assert expected == [warning.partition(":")[0] for warning in config.warnings]


@pytest.mark.parametrize("verify", [True, False, None])
def test_tokens_of_the_target_are_always_verified(*, verify: bool | None) -> None:
    config = load({ENTRY: [{**TARGET_ENTRY, "verify_signature": verify}]})

    assert config.issuers[0].verify_signature
    assert config.target_rules.verify_signature
    error = refuse({ENTRY: [{**TARGET_ENTRY, "insecure_skip_subject_signature": True}]})
    assert f"{ENTRY}[0].insecure_skip_subject_signature" == error.path


# --- the client -----------------------------------------------------------------------


def test_the_first_client_is_used() -> None:
    config = load(
        {
            "client_id": ["one", "two"],
            "client_secret": ["s1", "s2"],
            "client_auth": ["client_secret_post", "client_secret_basic"],
        }
    )

    assert config.client.client_secret is not None
    assert (
        config.client.client_id,
        config.client.client_secret.reveal(),
        config.client.method,
    ) == ("one", "s1", "client_secret_post")
    assert [warning.partition(":")[0] for warning in config.warnings] == ["client_id"]


def test_a_public_client_has_no_secret() -> None:
    assert load({"client_auth": ["none"], "client_secret": None}).client.client_secret is None
    ignored = load({"client_auth": ["none"]})
    assert ignored.client.client_secret is None
    assert [warning.partition(":")[0] for warning in ignored.warnings] == ["client_secret"]


def test_the_secret_may_be_in_a_file() -> None:
    client = load({"client_secret": None, "client_secret_file": "/run/secrets/gateway"}).client
    assert (None, "/run/secrets/gateway") == (client.client_secret, client.client_secret_file)
    ignored = load({"client_auth": ["none"], "client_secret": None, "client_secret_file": "/run/secrets/x"})
    assert ignored.client.client_secret_file is None
    assert [warning.partition(":")[0] for warning in ignored.warnings] == ["client_secret_file"]


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"client_secret_file": "/run/secrets/gateway"}, "client_secret_file"),
        ({"client_secret": None, "client_secret_file": "gateway"}, "client_secret_file"),
        ({"client_secret": None, "client_secret_file": ""}, "client_secret_file"),
        ({"client_secret": None, "client_secret_file": "/a\n"}, "client_secret_file"),
        ({"client_secret": None}, "client_secret"),
        ({"client_secret": []}, "client_secret"),
        ({"client_secret": [SECRET, SECRET]}, "client_secret"),
        ({"client_id": ["a", "b"]}, "client_secret"),
        ({"client_secret": [""]}, "client_secret[0]"),
        ({"client_auth": ["client_secret_post", "client_secret_post"]}, "client_auth"),
    ],
)
def test_clients_and_secrets_are_paired(changes: dict[str, object], path: str) -> None:
    assert path == refuse(changes).path


def test_a_linter_may_see_references() -> None:
    raw = make({"client_secret": ["{vault://env/s}"], "issuer": "{vault://env/i}"})
    raw["token_exchange"]["request"] = {}
    config = load_config(raw, allow_references=True)

    assert config.target.issuer == "{vault://env/i}"
    with pytest.raises(ConfigError) as caught:
        load_config(make({"token_endpoint": "{vault://env/t}"}), allow_references=True)
    assert caught.value.path == "token_endpoint"


# --- the request ----------------------------------------------------------------------


def test_request_wins_over_top_level() -> None:
    top: dict[str, object] = {
        "audience": ["a"],
        "scopes": ["s"],
        "token_post_args_names": ["p"],
        "token_post_args_values": ["1"],
        "token_headers_names": ["x-h"],
        "token_headers_values": ["2"],
    }
    inner: dict[str, object] = {
        "token_exchange.request.audience": ["b"],
        "token_exchange.request.scopes": ["t", "u v", "t"],
        "token_exchange.request.post_args_names": ["q"],
        "token_exchange.request.post_args_values": ["3"],
        "token_exchange.request.headers_names": ["x-i"],
        "token_exchange.request.headers_values": ["4 5"],
    }
    empty: dict[str, object] = {
        f"token_exchange.request.empty_{name}": True
        for name in ("audience", "scopes", "post_args", "headers")
    }

    def shape(changes: dict[str, object]) -> tuple[object, ...]:
        request = load(changes).request
        return request.audience, request.scopes, request.extra_parameters, request.extra_headers

    assert shape(top) == (("a",), ("s",), (("p", "1"),), (("x-h", "2"),))
    assert shape(top | inner) == (("b",), ("t", "u", "v"), (("q", "3"),), (("x-i", "4 5"),))
    assert shape(top | empty) == ((), (), (), ())
    assert shape(top) == shape(top | {path: [] for path in inner})
    assert shape(top) == shape(top | dict.fromkeys(inner))


def test_no_scope_is_sent_when_top_level_is_an_empty_array() -> None:
    assert load({"scopes": []}).request.scopes == ()
    assert load({"scopes": None}).request.scopes == ("openid",)


@pytest.mark.parametrize("name", ["audience", "scopes", "post_args", "headers"])
def test_empty_and_stated_at_once_is_a_contradiction(name: str) -> None:
    stem = f"token_exchange.request.{name}"
    stated = (
        {f"{stem}_names": ["x-a"], f"{stem}_values": ["b"]}
        if name in ("post_args", "headers")
        else {stem: ["a"]}
    )
    error = refuse({f"token_exchange.request.empty_{name}": True, **stated})

    assert f"token_exchange.request.empty_{name}" == error.path


PAIRS = [
    ("token_post_args", "token_post_args"),
    ("token_headers", "token_headers"),
    ("token_exchange.request.post_args", "token_exchange.request.post_args"),
    ("token_exchange.request.headers", "token_exchange.request.headers"),
]


@pytest.mark.parametrize("stem", [pair[0] for pair in PAIRS])
def test_names_and_values_are_paired_and_names_are_unique(stem: str) -> None:
    assert f"{stem}_values" == refuse({f"{stem}_names": ["x-a"]}).path
    assert f"{stem}_values" == refuse({f"{stem}_values": ["1"]}).path
    assert f"{stem}_names[1]" == refuse({f"{stem}_names": ["x-a", "x-a"], f"{stem}_values": ["1", "2"]}).path


RESERVED = [
    "grant_type", "subject_token", "subject_token_type", "actor_token", "actor_token_type", "audience",
    "resource", "scope", "requested_token_type", "assertion", "client_id", "client_secret",
    "client_assertion", "client_assertion_type",
]  # fmt: skip


@pytest.mark.parametrize("name", RESERVED)
def test_parameters_of_the_exchange_itself_are_refused(name: str) -> None:
    for stem in ("token_post_args", "token_exchange.request.post_args"):
        for spelling in (name, name.upper(), name.title()):
            error = refuse({f"{stem}_names": ["ok", spelling], f"{stem}_values": ["1", SECRET]})
            assert f"{stem}_names[1]" == error.path


@pytest.mark.parametrize(
    "name",
    ["Authorization", "Content-Type", "Content-Length", "Host", "Connection", "Transfer-Encoding",
     "Accept-Encoding", "Cookie", "Upgrade", "Expect", "bad name", "x:y", "\u00e9"],
)  # fmt: skip
def test_headers_that_frame_or_authenticate_are_refused(name: str) -> None:
    for stem in ("token_headers", "token_exchange.request.headers"):
        for spelling in (name, name.lower()):
            error = refuse({f"{stem}_names": [spelling], f"{stem}_values": ["1"]})
            assert f"{stem}_names[0]" == error.path


@pytest.mark.parametrize("value", [" x", "x ", "\u00e9"])
def test_a_header_value_is_printable(value: str) -> None:
    error = refuse({"token_headers_names": ["x-a"], "token_headers_values": [value]})

    assert error.path == "token_headers_values[0]"


def test_microsoft_adds_its_parameter_and_keeps_it() -> None:
    microsoft: dict[str, object] = {
        "token_exchange.grant_type": "jwt_bearer",
        "token_exchange.provider": "microsoft",
    }
    own: dict[str, object] = {
        "token_exchange.request.post_args_names": ["requested_token_use"],
        "token_exchange.request.post_args_values": ["on_behalf_of"],
    }

    assert load(microsoft).request.extra_parameters == (("requested_token_use", "on_behalf_of"),)
    assert refuse(microsoft | own).path == "token_exchange.request.post_args_names[0]"
    assert load({"token_exchange.grant_type": "jwt_bearer", **own}).request.extra_parameters == (
        ("requested_token_use", "on_behalf_of"),
    )
    assert refuse({"token_exchange.provider": "microsoft"}).path == "token_exchange.provider"


@pytest.mark.parametrize(
    "path", ["token_exchange.request.subject_token_type", f"{ENTRY}[0].subject_token_type"]
)
def test_subject_token_type_belongs_to_token_exchange(path: str) -> None:
    jwt = "urn:ietf:params:oauth:token-type:jwt"

    assert jwt == load({path: jwt}).issuers[0].subject_token_type
    assert path == refuse({path: "jwt"}).path
    assert path == refuse({path: jwt, "token_exchange.grant_type": "jwt_bearer"}).path


def test_types_and_resources_are_uris() -> None:
    prefix = "token_exchange.request"
    config = load({f"{prefix}.resource": ["https://api.example/a?b", "urn:x:y"]})

    assert config.request.resource == ("https://api.example/a?b", "urn:x:y")
    for bad in ("relative/path", "https://api.example/#f", "https://api.example/ x"):
        assert f"{prefix}.resource[0]" == refuse({f"{prefix}.resource": [bad]}).path
    refresh = "urn:ietf:params:oauth:token-type:refresh_token"
    assert f"{prefix}.requested_token_type" == refuse({f"{prefix}.requested_token_type": refresh}).path


@pytest.mark.parametrize("scope", ["a  b", " a", "a ", 'a"b', "a\\b", "\u00e9"])
def test_scopes_have_the_grammar_of_the_standard(scope: str) -> None:
    assert refuse({"scopes": [scope]}).path == "scopes[0]"
    assert refuse({"token_exchange.request.scopes": [scope]}).path == "token_exchange.request.scopes[0]"


# --- the credential and the upstream header -------------------------------------------


def test_credential_sources() -> None:
    config = load(
        {
            "bearer_token_param_type": ["query", "cookie", "header"],
            "bearer_token_cookie_name": "session",
            "bearer_token_header_name": "X-Token",
        }
    )

    assert (
        CredentialSources(header=True, header_name="X-Token", query=True, cookie_name="session")
        == config.credential
    )
    assert load({"bearer_token_header_name": "Authorization"}).credential.header_name is None


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"bearer_token_param_type": ["header", "body"]}, "bearer_token_param_type[1]"),
        ({"bearer_token_param_type": []}, "bearer_token_param_type"),
        ({"bearer_token_param_type": ["cookie"]}, "bearer_token_cookie_name"),
        (
            {"bearer_token_cookie_name": "a b", "bearer_token_param_type": ["cookie"]},
            "bearer_token_cookie_name",
        ),
        ({"bearer_token_header_name": "a b"}, "bearer_token_header_name"),
        ({"bearer_token_header_name": "Host"}, "bearer_token_header_name"),
        ({"bearer_token_header_name": "Cookie"}, "bearer_token_header_name"),
    ],
)
def test_credential_sources_that_are_refused(changes: dict[str, object], path: str) -> None:
    assert path == refuse(changes).path


def test_a_name_without_its_source_is_a_warning() -> None:
    config = load(
        {
            "bearer_token_cookie_name": "a",
            "bearer_token_header_name": "x-a",
            "bearer_token_param_type": ["query"],
        }
    )

    assert (config.credential.cookie_name, config.credential.header) == (None, False)
    assert [warning.partition(":")[0] for warning in config.warnings] == [
        "bearer_token_cookie_name",
        "bearer_token_header_name",
    ]


@pytest.mark.parametrize("methods", [["bearer"], list(KONG_AUTH_METHODS), list(reversed(KONG_AUTH_METHODS))])
def test_bearer_alone_and_kongs_default_mean_bearer(methods: list[str]) -> None:
    assert load().credential == load({"auth_methods": methods}).credential


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("authorization:bearer", UpstreamHeader(name="authorization", scheme="bearer")),
        ("X-Access:Bearer", UpstreamHeader(name="X-Access", scheme="bearer")),
        ("x-access", UpstreamHeader(name="x-access", scheme="")),
        ("x-access:", None),
        ("x-access:basic", None),
        (":bearer", None),
        ("x access:bearer", None),
        ("x:y:bearer", None),
        ("host", None),
        ("Content-Length:bearer", None),
        ("connection", None),
        ("", None),
    ],
)
def test_the_upstream_header(value: str, expected: UpstreamHeader | None) -> None:
    if expected is None:
        assert refuse({"upstream_access_token_header": value}).path == "upstream_access_token_header"
    else:
        assert expected == load({"upstream_access_token_header": value}).upstream_header


# --- checks, result, cache, flow ------------------------------------------------------


def test_required_values_are_alternatives_of_words() -> None:
    config = load({"audience_required": ["a b", "c"], "scopes_required": ["d"]})

    assert (frozenset({"a", "b"}), frozenset({"c"})) == config.audience_required
    assert (frozenset({"d"}),) == config.scopes_required
    assert refuse({"scopes_required": ["d", "  "]}).path == "scopes_required[1]"


@pytest.mark.parametrize(
    ("changes", "ttl"),
    [
        ({}, 3600),
        ({"cache_ttl": 10}, 10),
        ({"cache_ttl": 10, "token_exchange.cache.ttl": 20}, 20),
        ({"cache_ttl_max": 5, "token_exchange.cache.ttl": 20}, 5),
        ({"cache_ttl_max": 50}, 50),
        ({"cache_ttl_max": 50, "token_exchange.cache.ttl": 20}, 20),
    ],
)
def test_cache_ttl(changes: dict[str, object], ttl: int) -> None:
    assert CachePolicy(enabled=True, ttl=ttl, ttl_neg=2.0, refresh_ahead=True) == load(changes).cache


def test_result_limits_and_subjects() -> None:
    prefix = "token_exchange.result"
    result = load(
        {
            f"{prefix}.validation": "claims",
            f"{prefix}.allowed_scopes": ["a", "b"],
            f"{prefix}.allowed_audience": ["x"],
            f"{prefix}.max_lifetime": 300,
            f"{prefix}.narrowing": "audit",
            f"{prefix}.same_subject_claims": [{"subject_claim": "email", "result_claim": "sub"}],
        }
    ).result

    assert result == ResultPolicy(
        validation="claims",
        allowed_scopes=frozenset({"a", "b"}),
        allowed_audience=frozenset({"x"}),
        max_lifetime=300,
        narrowing="audit",
        same_subject=(ClaimPair(subject_claim="email", result_claim="sub"),),
    )
    assert [load({f"{prefix}.same_subject": word}).result.same_subject for word in ("sub", "off")] == [
        "sub",
        "off",
    ]


PAIR = [{"subject_claim": "a", "result_claim": "b"}]


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"same_subject": "sub", "same_subject_claims": PAIR}, "same_subject_claims"),
        ({"same_subject": "email"}, "same_subject"),
        ({"same_subject_claims": [{"subject_claim": "a"}]}, "same_subject_claims[0].result_claim"),
        ({"allowed_scopes": ["a b"]}, "allowed_scopes[0]"),
        ({"validation": "none", "allowed_audience": ["x"]}, "allowed_audience"),
        ({"validation": "none", "same_subject": "sub"}, "same_subject"),
        ({"validation": "none", "same_subject_claims": PAIR}, "same_subject_claims"),
    ],
)
def test_results_that_are_refused(changes: dict[str, object], path: str) -> None:
    assert f"token_exchange.result.{path}" == refuse({"token_exchange.result": changes}).path


def test_flow() -> None:
    members = {
        "name": "orders", "kind": "downscoping", "owner": "team", "justification": "one\ntwo\n",
        "review_by": "2027-06-30",
    }  # fmt: skip

    assert (
        Flow(
            name="orders",
            kind="downscoping",
            owner="team",
            justification="one\ntwo\n",
            review_by=date(2027, 6, 30),
        )
        == load({"token_exchange.flow": members}).flow
    )
    for bad in ("20270630", "2027-W26-3", "2027-02-30", "30.6.2027", "2027-06-30T00:00"):
        assert refuse({"token_exchange.flow": {"review_by": bad}}).path == "token_exchange.flow.review_by"


def test_a_ca_file_is_named_from_the_root() -> None:
    assert load({"ca_file": "/etc/ssl/idp.pem"}).ca_file == "/etc/ssl/idp.pem"
    assert refuse({"ca_file": "idp.pem"}).path == "ca_file"


# --- findings and strict --------------------------------------------------------------

CLEAN: dict[str, object] = {
    "audience_required": ["orders"],
    f"{ENTRY}[0].audience": ["gateway"],
    "token_exchange.result": {"allowed_scopes": ["orders"], "same_subject": "sub"},
}

SAME_SUBJECT = "token_exchange.result.same_subject"

FINDINGS: list[tuple[str, dict[str, object], str, str]] = [
    ("forwarding", {"audience_required": None}, "forwarding", "audience_required"),
    ("forwarding-empty", {"audience_required": []}, "forwarding", "audience_required"),
    ("no-limit", {"token_exchange.result.allowed_scopes": None}, "narrowing", "token_exchange.result"),
    ("audit", {"token_exchange.result.narrowing": "audit"}, "narrowing", "token_exchange.result.narrowing"),
    ("off", {"token_exchange.result.narrowing": "off"}, "narrowing", "token_exchange.result.narrowing"),
    ("subject-off", {SAME_SUBJECT: "off"}, "subject", SAME_SUBJECT),
    ("subject-unsaid", {SAME_SUBJECT: None}, "subject", SAME_SUBJECT),
    ("foreign-audience", {f"{ENTRY}[0].audience": None}, "issuer", f"{ENTRY}[0].audience"),
    ("claims", {"token_exchange.result.validation": "claims"}, "result", "token_exchange.result.validation"),
    ("query", {"bearer_token_param_type": ["header", "query"]}, "credential", "bearer_token_param_type"),
    ("hide", {"hide_credentials": False}, "credential", "hide_credentials"),
    ("leeway", {"leeway": 61}, "time", "leeway"),
]  # fmt: skip


def test_a_careful_configuration_has_no_findings_and_is_strict() -> None:
    assert load(CLEAN).findings == ()
    assert load({**CLEAN, "token_exchange.strict": True}).strict
    assert load({**CLEAN, "leeway": 60}).findings == ()


@pytest.mark.parametrize(
    ("changes", "topic", "path"), [row[1:] for row in FINDINGS], ids=[row[0] for row in FINDINGS]
)
def test_a_finding_and_what_strict_makes_of_it(changes: dict[str, object], topic: str, path: str) -> None:
    findings = load({**CLEAN, **changes}).findings
    assert [(topic, path)] == [(finding.topic, finding.path) for finding in findings]

    strict = {**CLEAN, **changes, "token_exchange.strict": True}
    if topic in ("forwarding", "narrowing", "subject"):
        error = refuse(strict)
        assert path == error.path
        assert "strict" in error.message
    else:
        assert load(strict).strict


def test_a_target_entry_may_say_whom_forwarded_tokens_are_for() -> None:
    entry = {**TARGET_ENTRY, "audience": ["orders"]}

    assert load({**CLEAN, "audience_required": None, ENTRY: [entry]}).findings == ()
    without = load({**CLEAN, "audience_required": None, ENTRY: [TARGET_ENTRY]}).findings
    assert [finding.topic for finding in without] == ["forwarding"]


def test_within_one_issuer_the_subject_is_proven_without_a_word() -> None:
    changes = {**CLEAN, "token_exchange.result.same_subject": None, ENTRY: [TARGET_ENTRY]}

    assert load(changes).findings == ()


def test_a_downscoping_flow_is_bounded_by_the_subject() -> None:
    changes = {
        **CLEAN,
        "token_exchange.result.allowed_scopes": None,
        "token_exchange.flow.kind": "downscoping",
    }

    assert load(changes).findings == ()


def test_unread_results_leave_the_subject_unproven() -> None:
    changes = {**CLEAN, "token_exchange.result": {"validation": "none", "allowed_scopes": ["orders"]}}
    del changes["audience_required"]

    assert [finding.topic for finding in load(changes).findings if finding.topic != "forwarding"] == [
        "subject",
        "result",
    ]


def test_an_audience_that_cannot_be_proven_is_an_error() -> None:
    changes = {"audience_required": ["api"], "token_exchange.result": {"validation": "none"}}

    with pytest.raises(ConfigError) as caught:
        load(changes)

    assert caught.value.path == "audience_required"


def test_what_a_result_that_is_not_read_may_not_have_is_an_error() -> None:
    error = refuse({"claims_forbidden": ["act"], "token_exchange.result": {"validation": "none"}})

    assert error.path == "claims_forbidden"
    assert load({"claims_forbidden": ["act", "a.b"]}).claims_forbidden == ("act", "a.b")


def test_unverified_certificates_are_a_warning() -> None:
    assert [warning.partition(":")[0] for warning in load({"ssl_verify": False}).warnings] == ["ssl_verify"]


# --- any JSON at all ------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([SECRET, PARTNER]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
PATHS = sorted(
    set(CONFIG.fields)
    | {f"token_exchange.{name}" for name in CONFIG.fields["token_exchange"].fields}
    | {f"token_exchange.request.{name}" for name in CONFIG.fields["token_exchange"].fields["request"].fields}
    | {f"{ENTRY}[0].{name}" for name in ("issuer", "conditions", "jwks_uri", "algorithms", "typ")}
)


@settings(max_examples=400, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(PATHS), json_values, max_size=3))
def test_any_json_loads_or_is_refused_and_the_secret_stays_out(changes: dict[str, object]) -> None:
    raw = make()
    for path, value in changes.items():
        try:
            put(raw, path, value)
        except (TypeError, KeyError, IndexError, AttributeError):
            continue
    told = "".join(tell(raw))

    assert SECRET not in told
    assert told.isascii()


def tell(raw: dict[str, Any]) -> list[str]:
    """Return everything that loading *raw* says."""
    try:
        config = load_config(raw)
    except ConfigError as error:
        return [str(error), *map(str, error.facts.values())]
    return [*config.warnings, *(finding.path + finding.message for finding in config.findings)]


@pytest.mark.parametrize("path", ["bearer_token_header_name", "upstream_access_token_header"])
@pytest.mark.parametrize("name", ["x_token", "x-to_ken", "a-b-c-d-e-f"])
def test_out_02_a_header_whose_spellings_cannot_all_be_cleared_is_an_error(path: str, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({path: name})

    assert caught.value.path == path


def test_entries_of_the_target_may_name_the_same_algorithms_in_another_order() -> None:
    entries = [
        {**TARGET_ENTRY, "algorithms": ["RS256", "ES256"]},
        {**TARGET_ENTRY, "algorithms": ["ES256", "RS256"]},
    ]

    assert set(load({ENTRY: entries}).target_rules.algorithms) == {"RS256", "ES256"}


# --- proof of possession --------------------------------------------------------------

POSSESSION = "token_exchange.proof_of_possession"


def test_no_proof_of_possession_is_accepted_unless_configured() -> None:
    assert not load().possession
    assert (load().possession.proof_lifetime_s, load().possession.origins) == (300.0, frozenset())


def test_dpop_with_its_origins() -> None:
    changes: dict[str, object] = {
        "proof_of_possession_dpop": "strict",
        "dpop_proof_lifetime": 60,
        f"{POSSESSION}.origins": ["https://API.example.com", "http://localhost:8000/"],
    }
    possession = load(changes).possession

    assert (possession.dpop, possession.mtls, possession.proof_lifetime_s) == ("strict", "off", 60.0)
    assert possession.origins == {"https://api.example.com:443", "http://localhost:8000"}


def test_an_origin_that_only_the_caller_states_is_a_finding() -> None:
    def paths(config: PluginConfig) -> set[str]:
        return {finding.path for finding in config.findings}

    changes: dict[str, object] = {"proof_of_possession_dpop": "optional"}
    assert f"{POSSESSION}.origins" in paths(load(changes))
    assert f"{POSSESSION}.origins" not in paths(
        load({**changes, f"{POSSESSION}.origins": ["https://a.test"]})
    )
    assert f"{POSSESSION}.origins" not in paths(load())


DPOP = {"proof_of_possession_dpop": "optional"}


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"proof_of_possession_dpop": "always"}, "proof_of_possession_dpop"),
        ({"dpop_proof_lifetime": 301}, "dpop_proof_lifetime"),
        ({"dpop_proof_lifetime": 0}, "dpop_proof_lifetime"),
        ({f"{POSSESSION}.origins": ["https://a.test"]}, f"{POSSESSION}.origins"),
        ({**DPOP, f"{POSSESSION}.origins": []}, f"{POSSESSION}.origins"),
        *(
            ({**DPOP, f"{POSSESSION}.origins": ["https://a.test", bad]}, f"{POSSESSION}.origins[1]")
            for bad in (
                "a.test",
                "https://a.test/orders",
                "https://a.test?x",
                "https://a.test/#",
                "ws://a.test",
            )
        ),
        ({**DPOP, "bearer_token_param_type": ["query"]}, "proof_of_possession_dpop"),
        ({**DPOP, "bearer_token_header_name": "x-token"}, "proof_of_possession_dpop"),
        ({**DPOP, "upstream_access_token_header": "DPoP"}, "upstream_access_token_header"),
    ],
)
def test_proofs_that_could_not_be_judged_do_not_load(changes: dict[str, object], path: str) -> None:
    assert refuse(changes).path == path


FROM_HEADER = "proof_of_possession_mtls_from_header"
CERTIFICATES: dict[str, object] = {
    "proof_of_possession_mtls": "optional",
    FROM_HEADER: {"certificate_header_name": "X-Client-Cert"},
    f"{POSSESSION}.trusted_ips": ["10.0.0.0/8", "2001:db8::1"],
}


def test_a_certificate_of_the_connection_needs_nothing_more() -> None:
    config = load({"proof_of_possession_mtls": "strict"})

    assert (config.possession.mtls, config.certificate_header) == ("strict", None)


def test_a_certificate_in_a_header_comes_from_trusted_addresses() -> None:
    header = load(CERTIFICATES).certificate_header

    assert header is not None
    assert (header.name, header.form) == ("x-client-cert", "url_encoded")
    addresses = {
        "10.1.2.3": True, "::ffff:10.1.2.3": True, "2001:db8::1": True, "11.1.2.3": False, "::1": False,
        "2001:db8::2": False, "": False, "unix:": False,
    }  # fmt: skip
    assert {address: header.believes(address) for address in addresses} == addresses


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"proof_of_possession_mtls": "off"}, FROM_HEADER),
        ({f"{POSSESSION}.trusted_ips": None}, f"{POSSESSION}.trusted_ips"),
        ({FROM_HEADER: None}, f"{POSSESSION}.trusted_ips"),
        ({f"{POSSESSION}.trusted_ips": ["10.0.0.0/8", "10.0.0.1/8"]}, f"{POSSESSION}.trusted_ips[1]"),
        ({f"{POSSESSION}.trusted_ips": ["proxy"]}, f"{POSSESSION}.trusted_ips[0]"),
        ({f"{POSSESSION}.trusted_ips": ["0.0.0.0/0"]}, f"{POSSESSION}.trusted_ips[0]"),
        ({f"{POSSESSION}.trusted_ips": ["10.0.0.0/8", "::/0"]}, f"{POSSESSION}.trusted_ips[1]"),
        ({FROM_HEADER: {"allow_partial_chain": False}}, f"{POSSESSION}.trusted_ips"),
        (
            {FROM_HEADER: {"certificate_header_format": "base64_encoded"}},
            f"{FROM_HEADER}.certificate_header_name",
        ),
        *(
            ({f"{FROM_HEADER}.certificate_header_name": name}, f"{FROM_HEADER}.certificate_header_name")
            for name in ("x cert", "x_cert", "a-b-c-d-e-f", "Authorization", "cookie", "DPoP", "Host")
        ),
        (
            {f"{FROM_HEADER}.certificate_header_name": "x-up", "upstream_access_token_header": "X-Up:bearer"},
            f"{FROM_HEADER}.certificate_header_name",
        ),
        (
            {f"{FROM_HEADER}.certificate_header_name": "x-in", "bearer_token_header_name": "X-In"},
            f"{FROM_HEADER}.certificate_header_name",
        ),
        (
            {
                f"{FROM_HEADER}.certificate_header_name": "x-actor",
                "token_exchange.request.actor_token": {"source": "header", "header_name": "X-Actor"},
            },
            f"{FROM_HEADER}.certificate_header_name",
        ),
        *(
            ({f"{FROM_HEADER}.{name}": value}, f"{FROM_HEADER}.{name}")
            for name, value in {
                "secure_source": False, "ca_certificates": ["b8a1"], "allow_partial_chain": True,
                "revocation_check_mode": "IGNORE_CA_ERROR", "cert_cache_ttl": 1, "http_timeout": 1,
                "http_proxy_host": "proxy", "https_proxy_port": 1, "ssl_verify": False,
                "certificate_header_format": "der",
            }.items()
        ),
    ],
)  # fmt: skip
def test_certificates_that_could_not_be_judged_do_not_load(changes: dict[str, object], path: str) -> None:
    flat = {**CERTIFICATES, FROM_HEADER: dict(CERTIFICATES[FROM_HEADER])}  # type: ignore[call-overload]
    for name, value in changes.items():
        record, _, member = name.partition(".")
        if record == FROM_HEADER and member:
            flat[FROM_HEADER][member] = value
        else:
            flat[name] = value
    assert refuse({name: value for name, value in flat.items() if value is not None}).path == path


# --- the metadata of a protected resource ---------------------------------------------

PUBLISHED: dict[str, object] = {"resource": "https://api.test/orders", "authorization_servers": [TARGET]}


def test_metadata_is_published_where_it_is_configured() -> None:
    assert load().resource_metadata is None
    assert load({"protected_resource_metadata": {"scopes_supported": None}}).resource_metadata is None
    changes: dict[str, object] = {
        "protected_resource_metadata": PUBLISHED,
        "bearer_token_param_type": ["header", "query"],
    }
    metadata = load(changes).resource_metadata

    assert metadata is not None
    assert json.loads(metadata.document)["bearer_methods_supported"] == ["header", "query"]
    named = load({"protected_resource_metadata": PUBLISHED, "bearer_token_header_name": "x-token"})
    assert named.resource_metadata is not None
    assert json.loads(named.resource_metadata.document)["bearer_methods_supported"] == []


def test_plain_http_is_published_of_loopback_or_on_request() -> None:
    local = {"resource": "http://localhost:8000/orders", "authorization_servers": ["http://127.0.0.1"]}
    remote = {**PUBLISHED, "resource": "http://api.test"}

    assert load({"protected_resource_metadata": local}).resource_metadata
    assert load({"protected_resource_metadata": remote, "insecure_allow_http": True}).resource_metadata


@pytest.mark.parametrize(
    ("changes", "member"),
    [
        ({"resource": None}, "resource"),
        ({"authorization_servers": None}, "authorization_servers"),
        ({"authorization_servers": []}, "authorization_servers"),
        *(
            ({"resource": bad}, "resource")
            for bad in (
                "api.test", "urn:api", "http://api.test", "https://api.test/#a", "https://api.test/?a",
                'https://api.test/"', "https://user@api.test/", "https://api.test/a%20b", "https://api.test/a//b",
                "https://api.test/a/../b",
            )
        ),
        ({"authorization_servers": [TARGET, "idp"]}, "authorization_servers[1]"),
        ({"scopes_supported": ["a b"]}, "scopes_supported[0]"),
        ({"scopes_supported": ['a"']}, "scopes_supported[0]"),
        *(
            ({"metadata_endpoint": bad}, "metadata_endpoint")
            for bad in ("about", "/about/", "/a?b", "/a#b", '/a"', "/", "/a/../b", "/a%41")
        ),
    ],
)  # fmt: skip
def test_metadata_that_could_mislead_does_not_load(changes: dict[str, object], member: str) -> None:
    record = {**PUBLISHED, **changes}
    assert refuse({"protected_resource_metadata": record}).path == f"protected_resource_metadata.{member}"
