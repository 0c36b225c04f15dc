"""
The configuration's one definition, in the terms of Kong's schema language.

`CONFIG` is read by four readers: `plugin_schema()` is what Kong's query command
gets, `json_schema()` becomes schema.json for editors and CI, `reference_markdown()`
becomes the tables of docs/configuration.md, and `config.py` checks types and fills
in defaults with it. A test keeps the files equal to this module.

    python -m kong_token_exchange.schema schema.json docs/configuration.md

writes both files again.

Names, types and defaults are those of the `openid-connect` plugin of Kong Gateway
3.16 wherever it has the field, so that a block can be moved over unchanged. Where
we differ, `difference` says so beside the field.

Source: docs/configuration.md; Kong 3.9.1 kong/db/schema/metaschema.lua (attributes).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from kong_token_exchange.core.jws import ASYMMETRIC_ALGORITHMS
from kong_token_exchange.core.policy import MAX_ACTORS, TOKEN_TYPE_ACCESS_TOKEN

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
FieldType = Literal["string", "boolean", "integer", "number", "array", "map", "record"]

NAME = "token-exchange"

NOT_YET = "not supported yet"

KONG_AUTH_METHODS = (
    "authorization_code", "bearer", "client_credentials", "introspection", "kong_oauth2",
    "password", "refresh_token", "session", "userinfo",
)  # fmt: skip

# A header line may be 8 KB in nginx's default (large_client_header_buffers 4 8k), so
# no longer token arrives in a header; every verifier then has bounded work.
DEFAULT_MAX_TOKEN_SIZE = 8192

# Kong waits 60 s (lua_socket_read_timeout) for a plugin server; we must answer before.
MAX_DEADLINE_MS = 55_000

# Long enough that a client which tries again and again costs one call, short enough that nobody waits
# for what was mended at the issuer.
DEFAULT_NEGATIVE_TTL_S = 2
MAX_NEGATIVE_TTL_S = 60

_INT31 = 2_147_483_646


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """
    One field of the configuration.

    The attributes up to `encrypted` are Kong's. Those after it are ours and never
    reach Kong, whose metaschema refuses an attribute that it does not know:
    `only_default` is the message for any other value than the default, `refused`
    maps single values to a message, `difference` tells how we differ from Kong's
    `openid-connect`, `multiline` admits line breaks in a string.
    """

    type: FieldType
    description: str = ""
    default: Json = None
    required: bool = False
    one_of: tuple[str, ...] = ()
    between: tuple[int, int] | None = None
    len_min: int | None = None
    elements: Field | None = None
    values: Field | None = None
    fields: Mapping[str, Field] = field(default_factory=dict)
    referenceable: bool = False
    encrypted: bool = False
    only_default: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)
    difference: str = ""
    multiline: bool = False


# --- short forms ----------------------------------------------------------------------


def _text(
    description: str,
    *,
    default: str | None = None,
    required: bool = False,
    one_of: tuple[str, ...] = (),
    referenceable: bool = False,
    encrypted: bool = False,
    refused: Mapping[str, str] | None = None,
    difference: str = "",
    multiline: bool = False,
) -> Field:
    return Field(
        type="string",
        description=description,
        default=default,
        required=required,
        one_of=one_of,
        referenceable=referenceable,
        encrypted=encrypted,
        refused=refused or {},
        difference=difference,
        multiline=multiline,
    )


def _texts(
    description: str,
    *,
    default: Sequence[str] | None = None,
    required: bool = False,
    one_of: tuple[str, ...] = (),
    len_min: int | None = None,
    referenceable: bool = False,
    encrypted: bool = False,
    refused: Mapping[str, str] | None = None,
    difference: str = "",
) -> Field:
    return Field(
        type="array",
        description=description,
        default=None if default is None else list(default),
        required=required,
        len_min=len_min,
        elements=Field(type="string", one_of=one_of, referenceable=referenceable, refused=refused or {}),
        encrypted=encrypted,
        difference=difference,
    )


def _flag(description: str, *, default: bool, difference: str = "", only_default: str = "") -> Field:
    return Field(
        type="boolean",
        description=description,
        default=default,
        difference=difference,
        only_default=only_default,
    )


def _number(
    description: str,
    *,
    type: Literal["integer", "number"] = "number",  # noqa: A002 - Kong's word
    default: int | None = None,
    between: tuple[int, int] | None = None,
    difference: str = "",
) -> Field:
    return Field(type=type, description=description, default=default, between=between, difference=difference)


def _integer(
    description: str, *, default: int | None = None, between: tuple[int, int] | None = None
) -> Field:
    return _number(description, type="integer", default=default, between=between)


def _record(
    description: str, fields: Mapping[str, Field], *, required: bool = False, difference: str = ""
) -> Field:
    return Field(
        type="record", description=description, fields=fields, required=required, difference=difference
    )


def _records(
    description: str,
    fields: Mapping[str, Field],
    *,
    len_min: int | None = None,
    required: bool = False,
    difference: str = "",
) -> Field:
    return Field(
        type="array",
        description=description,
        len_min=len_min,
        required=required,
        elements=Field(type="record", fields=fields),
        difference=difference,
    )


def _later(later: Field, message: str = NOT_YET) -> Field:
    """Mark a field, with everything in it, as accepted at its default only."""
    fields = {name: _later(member, message) for name, member in later.fields.items()}
    return replace(later, fields=fields, only_default=message)


# --- fields that every release of ours reads ------------------------------------------

_TARGET: dict[str, Field] = {
    "issuer": _text(
        "The target issuer: its identifier, exactly as in the `iss` of its tokens, or the URL of its"
        " discovery document, from which a trailing `/.well-known/...` is stripped.",
        required=True,
        referenceable=True,
        difference="A discovery URL loses a slash at the end of the identifier; where `iss` ends in a"
        " slash, give the identifier.",
    ),
    "using_pseudo_issuer": _flag(
        "Fetch no discovery document: `issuer` only names the `iss` of tokens. Then `token_endpoint` and"
        " `jwks_endpoint` are required.",
        default=False,
    ),
    "token_endpoint": _text("The token endpoint; wins over the one of the discovery document."),
    "jwks_endpoint": _text(
        "The key set of the target issuer; wins over `jwks_uri` of the discovery document."
    ),
}

_CLIENT: dict[str, Field] = {
    "client_id": _texts(
        "The client that the gateway is at the token endpoint.",
        required=True,
        len_min=1,
        referenceable=True,
        encrypted=True,
        difference="The first client is used; a request cannot choose another.",
    ),
    "client_secret": _texts(
        "The secrets of `client_id`, paired by position.",
        referenceable=True,
        encrypted=True,
        difference="The first secret is used; open-source Kong does not encrypt it at rest.",
    ),
    "client_auth": _texts(
        "How the client authenticates; without it `client_secret_basic`.",
        one_of=(
            "client_secret_basic",
            "client_secret_jwt",
            "client_secret_post",
            "none",
            "private_key_jwt",
            "self_signed_tls_client_auth",
            "tls_client_auth",
        ),
        refused=dict.fromkeys(
            ("client_secret_jwt", "private_key_jwt", "self_signed_tls_client_auth", "tls_client_auth"),
            NOT_YET,
        ),
        difference="The first method is used.",
    ),
}

_CREDENTIAL: dict[str, Field] = {
    "auth_methods": _texts(
        "The kinds of credentials that are accepted: `bearer`.",
        default=["bearer"],
        one_of=KONG_AUTH_METHODS,
        difference="Kong's default, all nine methods, is accepted and means `bearer`; any other method beside"
        " `bearer` is refused.",
    ),
    "bearer_token_param_type": _texts(
        "Where the bearer token is looked for: `header`, `query` (the argument `access_token`), `cookie`.",
        default=["header"],
        one_of=("body", "cookie", "header", "query"),
        refused={"body": "a token in the request body is not supported; leave `body` out"},
        difference="Kong's default is body, header and query. `header` means `Authorization` alone, and"
        " `body` is refused.",
    ),
    "bearer_token_cookie_name": _text("The cookie that holds the bearer token, with `cookie` above."),
    "bearer_token_header_name": _text("Look into this header, and no other, for the bearer token."),
    "run_on_preflight": _flag("Run on CORS preflight (`OPTIONS`) requests as well.", default=True),
    "hide_credentials": _flag(
        "Take the caller's credential out of the request wherever it was found, also when the result goes"
        " upstream in another header; and `Authorization` in any case.",
        default=True,
        difference="Kong leaves an `Authorization` that it has not read; set `false` where the upstream needs"
        " the caller's. An exchanged token's credential is taken out even then.",
    ),
    "upstream_access_token_header": Field(
        type="string",
        description="The header in which the token goes upstream: `name:bearer`, or `name` for a bare token.",
        default="authorization:bearer",
        required=True,
        difference="It cannot be null: a request without a proven token does not go upstream.",
    ),
}

_CHECKS: dict[str, Field] = {
    "audience_required": _texts(
        "Audiences that the token going upstream must have: each element is an alternative (OR), the words"
        " inside one element are all needed (AND).",
    ),
    "scopes_required": _texts(
        "Scopes that the token going upstream must have: each element is an alternative (OR), the words"
        " inside one element are all needed (AND).",
    ),
    "claims_forbidden": _texts(
        "Claims that the token going upstream must not have, whatever their value; a dot leads into an"
        " object: `realm_access.roles`.",
    ),
    "audience_claim": _texts("The path of the claim that holds the audience.", default=["aud"], len_min=1),
    "scopes_claim": _texts("The path of the claim that holds the scopes.", default=["scope"], len_min=1),
    "leeway": _number(
        "Seconds of clock skew granted to `exp`, `nbf` and `iat`.", default=0, between=(0, 3600)
    ),
    "verify_signature": _flag(
        "Verify the signature of tokens.",
        default=True,
        only_default="must be true: tokens of the target issuer are always verified",
        difference="`false` is refused.",
    ),
    "verify_claims": _flag(
        "Verify the standard claims of tokens.",
        default=True,
        only_default="must be true: the standard claims are always checked",
        difference="`false` is refused.",
    ),
    "enable_hs_signatures": _flag(
        "Accept signatures made with a shared secret.",
        default=False,
        only_default="not supported: only asymmetric signatures are accepted",
        difference="`true` is refused.",
    ),
}

_NO_CHAIN = "not supported: a plugin server cannot read Kong's certificates; who ends TLS verifies the chain"
_NO_REVOCATION = "not supported: revocation is not checked here, but where TLS ends"

_CERTIFICATE_HEADER = _record(
    "Where the client's certificate is when a proxy in front of Kong ends TLS: in a header that this proxy"
    " sets and that no client can. It is taken instead of the certificate of the connection.",
    {
        # Kong fills in a record that is absent with its defaults, so nothing in it may be required.
        "certificate_header_name": _text(
            "The name of the header. Without it the whole record is as if it were absent.",
            difference="Kong requires it.",
        ),
        "certificate_header_format": _text(
            "How it is written: `url_encoded` is PEM, percent-encoded; `base64_encoded` is base64 of DER or"
            " PEM.",
            default="url_encoded",
            one_of=("base64_encoded", "url_encoded"),
        ),
        "secure_source": replace(
            _flag(
                "Take the header from trusted addresses only, which are those of"
                " `token_exchange.proof_of_possession.trusted_ips`.",
                default=True,
                difference="A plugin server cannot see Kong's `trusted_ips`. `false` is refused.",
            ),
            only_default="must be true: a certificate is public, so anybody could send one",
        ),
        "ca_certificates": replace(
            _texts(
                "Ids of the CA certificates trusted.",
                difference="Refused: a plugin server cannot read them. The token names one certificate, and"
                " who ends TLS verifies its chain.",
            ),
            only_default=_NO_CHAIN,
        ),
        "allow_partial_chain": _flag(
            "Accept a chain that ends before the root.", default=False, only_default=_NO_CHAIN
        ),
        "revocation_check_mode": replace(
            _text(
                "How revocation is checked.",
                default="SKIP",
                one_of=("IGNORE_CA_ERROR", "SKIP", "STRICT"),
                difference="Kong's default is IGNORE_CA_ERROR. Revocation is not checked here, so only"
                " `SKIP` is accepted.",
            ),
            only_default=_NO_REVOCATION,
        ),
        **{
            name: replace(member, only_default=_NO_REVOCATION)
            for name, member in {
                "cert_cache_ttl": _number("Milliseconds that a revocation answer is cached.", default=60000),
                "http_timeout": _number("Milliseconds for OCSP and CRL.", default=30000),
                "http_proxy_host": _text("The proxy for http."),
                "http_proxy_port": _integer("The port of that proxy.", between=(0, 65535)),
                "https_proxy_host": _text("The proxy for https."),
                "https_proxy_port": _integer("The port of that proxy.", between=(0, 65535)),
                "ssl_verify": _flag("Verify the certificate of the OCSP or CRL server.", default=True),
            }.items()
        },
    },
    difference="Without `proof_of_possession_mtls` it is refused.",
)

_POSSESSION: dict[str, Field] = {
    "proof_of_possession_dpop": _text(
        "Whether a DPoP proof (RFC 9449) is asked for: `strict` of every request, `optional` for tokens that"
        " are bound to a key (`cnf.jkt`).",
        default="off",
        one_of=("off", "optional", "strict"),
        difference="With `off` a bound token is refused. No nonce is asked for.",
    ),
    "dpop_proof_lifetime": _number(
        "Seconds that a DPoP proof is good after its `iat`; it is remembered for as long.",
        default=300,
        between=(1, 300),
        difference="At most 300.",
    ),
    "proof_of_possession_mtls": _text(
        "Whether the client's certificate (RFC 8705) is asked for: `strict` of every request, `optional` for"
        " tokens that are bound to one (`cnf.x5t#S256`).",
        default="off",
        one_of=("off", "optional", "strict"),
        difference="With `off` a bound token is refused. The certificate of the connection is there only"
        " where Kong's nginx asks for it.",
    ),
    "proof_of_possession_mtls_from_header": _CERTIFICATE_HEADER,
}

_PUBLISHED: dict[str, Field] = {
    "protected_resource_metadata": _record(
        "Tell callers where tokens for this API come from (RFC 9728): a document that needs no token, and its"
        " address in every challenge.",
        # Kong fills in a record that is absent with its defaults, so nothing in it may be required.
        {
            "resource": _text(
                "The URI of the API, as callers know it.",
                difference="Kong requires it; required here as soon as another member is set.",
            ),
            "authorization_servers": _texts(
                "The issuers whose tokens callers should bring.",
                len_min=1,
                difference="Kong requires it; required here as soon as another member is set.",
            ),
            "scopes_supported": _texts(
                "Scopes to advertise, in the document and in a challenge with 401.", len_min=1
            ),
            "metadata_endpoint": _text(
                "The path of the document. Without it the path of `resource` and"
                " `/.well-known/oauth-protected-resource` after it.",
                difference="The path of RFC 9728 section 3.1, the well-known part in front, is answered as"
                " well where the route matches it.",
            ),
        },
    ),
}

_REQUEST: dict[str, Field] = {
    "audience": _texts("The audiences asked for, each sent as one `audience` parameter."),
    "scopes": _texts(
        "The scopes asked for, sent as one `scope` parameter.",
        default=["openid"],
        referenceable=True,
    ),
    "token_post_args_names": _texts(
        "Names of extra parameters of the token request; those that the exchange itself sets are refused."
    ),
    "token_post_args_values": _texts("Values paired by position with `token_post_args_names`."),
    "token_headers_names": _texts(
        "Names of extra headers of the token request; those that frame or authenticate it are refused."
    ),
    "token_headers_values": _texts("Values paired by position with `token_headers_names`."),
}

_TRANSPORT: dict[str, Field] = {
    "ssl_verify": _flag(
        "Verify the certificate of the issuers' servers.",
        default=True,
        difference="Trust is `ca_file`, or the plugin server's own: it cannot see Kong's"
        " `lua_ssl_trusted_certificate`.",
    ),
    "timeout": _number(
        "Milliseconds for one network operation; `token_exchange.deadline` wins.",
        default=10000,
        between=(1, _INT31),
    ),
    "cache_ttl": _number(
        "Seconds that an exchanged token is cached at most; see `token_exchange.cache.ttl`.",
        default=3600,
        between=(1, _INT31),
        difference="A result without any expiry is not cached.",
    ),
    "cache_ttl_max": _number(
        "Bounds `cache_ttl` and `token_exchange.cache.ttl`, in seconds.", between=(1, _INT31)
    ),
    "cache_ttl_neg": _number(
        "Seconds that a refusal by the token endpoint is cached; see `token_exchange.cache.ttl_neg`.",
        between=(0, _INT31),
        difference=f"More than {MAX_NEGATIVE_TTL_S} counts as {MAX_NEGATIVE_TTL_S}.",
    ),
}

_OWN: dict[str, Field] = {
    "ca_file": _text(
        "A PEM file of the certificates trusted for the issuers' servers, instead of the system's."
    ),
    "insecure_allow_http": _flag(
        "Allow plain http to issuers that are not on loopback; tokens and the client secret are then readable"
        " on the network.",
        default=False,
    ),
    "client_secret_file": _text(
        "A file with the secret of the first client, instead of `client_secret`; read again when it changes."
    ),
}

# --- token_exchange -------------------------------------------------------------------

_CONDITIONS = _record(
    "When a token of the target issuer is exchanged; all stated members must hold. Not for another issuer,"
    " whose tokens are always exchanged.",
    {
        "has_audience": _texts("Every one of these audiences is present."),
        "missing_audience": _texts("At least one of these audiences is absent."),
        "has_scopes": _texts("Every one of these scopes is present."),
        "missing_scopes": _texts("At least one of these scopes is absent."),
    },
    difference="An entry for the target issuer without conditions, and conditions on another issuer, are"
    " refused. Null, `{}` and empty lists are no conditions.",
)

_SUBJECT_TOKEN_ISSUERS = _records(
    "The issuers whose tokens are accepted beside the target's own, and when the target's own are exchanged."
    " The first entry that matches decides.",
    {
        "issuer": _text(
            "The `iss` of the tokens, compared as an exact string; a discovery URL is read as in `issuer`.",
            required=True,
        ),
        "conditions": _CONDITIONS,
        "verify_signature": _flag(
            "Verify the signature of this issuer's tokens before they are exchanged.",
            default=True,
            difference="Kong's default is false. `false` takes effect only together with"
            " `insecure_skip_subject_signature`; tokens of the target issuer are always verified.",
        ),
        "jwks_uri": _text(
            "The key set of this issuer, instead of discovery; for the target issuer use `jwks_endpoint`."
        ),
        "algorithms": _texts(
            "The signature algorithms accepted from this issuer; without it all asymmetric ones.",
            one_of=ASYMMETRIC_ALGORITHMS,
            len_min=1,
        ),
        "audience": _texts("The token's `aud` must hold one of these.", len_min=1),
        "clients": _texts(
            "The clients (`azp`, `client_id`, `cid`, `appid`) whose tokens are accepted.", len_min=1
        ),
        "required_claims": _texts(
            "Claims that the token must have, not null; a dot leads into an object: `realm_access.roles`.",
            len_min=1,
        ),
        "typ": _texts("The accepted values of the token's `typ` header, such as `at+jwt`.", len_min=1),
        "subject_token_type": _text(
            "The `subject_token_type` sent for this issuer's tokens; wins over that of `request`."
        ),
        "max_age": _integer("Seconds since `iat` after which a token is refused.", between=(1, _INT31)),
        "insecure_skip_subject_signature": _flag(
            "Confirm `verify_signature: false`: any caller can then make up this issuer's tokens, and only"
            " the token endpoint notices.",
            default=False,
        ),
    },
    len_min=1,
    required=True,
)

_ACTOR_TOKEN = _record(
    "The token of the party that acts for the subject (RFC 8693). Not for `jwt_bearer`.",
    {
        "source": _text(
            "Where the actor token comes from: a header of the request, or this configuration.",
            default="none",
            one_of=("config", "header", "none"),
        ),
        "header_name": _text(
            "The request header that holds it, with `source: header`. It never goes upstream.",
            difference="The token is verified like a subject token, so its issuer must be a configured one.",
        ),
        "static_token": _text(
            "The token itself, with `source: config`.",
            referenceable=True,
            encrypted=True,
            difference="A JWT of a configured issuer is verified at every request. Open-source Kong does not"
            " encrypt it at rest.",
        ),
        "type": _text("The `actor_token_type` that is sent.", default=TOKEN_TYPE_ACCESS_TOKEN),
    },
)

_EXCHANGE_REQUEST = _record(
    "What the exchange request says, in place of the fields of the same meaning at top level.",
    {
        "audience": _texts("The audiences asked for; win over `audience` at top level."),
        "empty_audience": _flag("Ask for no audience, whatever top level says.", default=False),
        "scopes": _texts("The scopes asked for; win over `scopes` at top level."),
        "empty_scopes": _flag("Send no scope, whatever top level says.", default=False),
        "post_args_names": _texts("Names of extra parameters; win over `token_post_args_names`."),
        "post_args_values": _texts("Values paired by position with `post_args_names`."),
        "empty_post_args": _flag("Send no extra parameters, whatever top level says.", default=False),
        "headers_names": _texts("Names of extra headers; win over `token_headers_names`."),
        "headers_values": _texts("Values paired by position with `headers_names`."),
        "empty_headers": _flag("Send no extra headers, whatever top level says.", default=False),
        "actor_token": _ACTOR_TOKEN,
        "resource": _texts("Absolute URIs, each sent as one `resource` parameter (RFC 8693, RFC 8707)."),
        "requested_token_type": _text("The `requested_token_type` parameter; not sent without it."),
        "subject_token_type": _text(
            f"The `subject_token_type` parameter; without it `{TOKEN_TYPE_ACCESS_TOKEN}`."
            " Not for `jwt_bearer`."
        ),
    },
)

_CACHE = _record(
    "The cache of exchanged tokens.",
    {
        "enabled": _flag("Whether exchanged tokens are cached.", default=True),
        "ttl": _integer(
            "Seconds that an exchanged token is cached at most; wins over `cache_ttl`. The expiry of either"
            " token wins when it is earlier.",
            between=(1, _INT31),
        ),
        "ttl_neg": _integer(
            "Seconds that the token endpoint's refusal of a subject token is cached, 0 for not at all; wins"
            f" over `cache_ttl_neg`; {DEFAULT_NEGATIVE_TTL_S} without either. Faults, refusals of the"
            " gateway's own client and those of `jwt_bearer` are never cached.",
            between=(0, MAX_NEGATIVE_TTL_S),
        ),
        "refresh_ahead": _flag(
            "Renew a cached token in the background when it is used in the last fifth of its life and the"
            " subject token outlives it. Never for `jwt_bearer`, whose assertions may be good for one use.",
            default=True,
        ),
        "seal_keys": _texts(
            "With `cluster_cache_strategy: redis`: secrets under which shared entries are sealed; the first"
            " one writes, all of them read. Each at least 32 bytes, made at random; at most 4.",
            referenceable=True,
            encrypted=True,
        ),
    },
)

_RESULT = _record(
    "What the exchanged token must be before it goes upstream.",
    {
        "validation": _text(
            "`full` verifies the signature and the claims of the exchanged token, `claims` the claims alone,"
            " `none` nothing, for tokens that only the resource can read.",
            default="full",
            one_of=("full", "claims", "none"),
        ),
        "allowed_scopes": _texts("The scopes that the result may have.", len_min=1),
        "allowed_audience": _texts("The audiences that the result may have.", len_min=1),
        "max_lifetime": _integer("Seconds that the result may live at most.", between=(1, _INT31)),
        "narrowing": _text(
            "`enforce` refuses a result beyond these limits (and, for a flow of kind `downscoping`, beyond"
            " the subject's scopes), `audit` reports it, `off` does neither.",
            default="enforce",
            one_of=("enforce", "audit", "off"),
        ),
        "same_subject": _text(
            "`sub`: both tokens have the same `sub`; `off`: not compared. Without it, `sub` within the target"
            " issuer, and across issuers the subject counts as unproven.",
            one_of=("sub", "off"),
        ),
        "same_subject_claims": _records(
            "Pairs of claims that must be equal, instead of `same_subject`, where issuers name subjects"
            " differently.",
            {
                "subject_claim": _text("The claim of the subject token.", required=True),
                "result_claim": _text("The claim of the exchanged token.", required=True),
            },
            len_min=1,
        ),
    },
)

_ACTOR = _record(
    "What must be true of the party that acts for the subject; its token is `request.actor_token`.",
    {
        "required": _flag(
            "Refuse a request without an actor token, and a result that does not name the actor in `act`; a"
            " token that is forwarded must have `act` already.",
            default=False,
        ),
        "enforce_may_act": _flag(
            "The subject token must name the actor in `may_act`. Each member must equal the actor's claim of"
            " that name; an empty or absent `may_act` permits nobody.",
            default=False,
        ),
        "max_chain_depth": _integer(
            "How many actors `act` of any token may name, one nested in the other.",
            default=MAX_ACTORS,
            between=(1, 16),
        ),
        "clients": _texts(
            "The clients (`azp`, `client_id`, `cid`, `appid`) whose tokens are accepted as actor tokens,"
            " instead of `clients` of their issuer.",
            len_min=1,
        ),
    },
)

_FLOW = _record(
    "What this exchange is for; carried in every audit event.",
    {
        "name": _text("A short name of the flow."),
        "kind": _text(
            "What the exchange does to the token.",
            one_of=("downscoping", "federation", "delegation", "impersonation", "transformation"),
        ),
        "owner": _text("Who answers for the flow."),
        "justification": _text("Why the flow exists.", multiline=True),
        "review_by": _text("The day by which the flow is reviewed again: YYYY-MM-DD."),
    },
)

_RETRY = _later(
    _record(
        "Trying an exchange again after a fault.",
        {"attempts": _integer("How often a failed exchange is tried again.", default=0, between=(0, 3))},
    )
)

_BREAKER = _record(
    "Leaving a failing token endpoint alone for a while; refusals of a token are no faults.",
    {
        "failures": _integer(
            "Faults in a row that open the breaker; 0 for never.", default=5, between=(0, 1000)
        ),
        "open_for": _integer(
            "Milliseconds that it stays open; then one request goes first.",
            default=5000,
            between=(1, 600_000),
        ),
    },
)

_POSSESSION_FACTS = _record(
    "What a proof of possession is compared with.",
    {
        "origins": _texts(
            "The origins under which callers reach the API, such as `https://api.example.com`: a DPoP"
            " proof must be for one of them. Without it the origin is the one that Kong sees, and the host in"
            " it is the caller's own word.",
            len_min=1,
        ),
        "trusted_ips": _texts(
            "Addresses or networks (`10.0.0.0/8`) of the proxies whose certificate header is believed.",
            len_min=1,
        ),
    },
)

_TOKEN_EXCHANGE = _record(
    "Which tokens are exchanged, how the target issuer is asked, and what must come back.",
    {
        "subject_token_issuers": _SUBJECT_TOKEN_ISSUERS,
        "request": _EXCHANGE_REQUEST,
        "grant_type": _text(
            "`token_exchange` is OAuth 2.0 Token Exchange (RFC 8693), `jwt_bearer` the JWT bearer grant"
            " (RFC 7523).",
            default="token_exchange",
            one_of=("jwt_bearer", "token_exchange"),
        ),
        "provider": _text(
            "With `jwt_bearer`: `microsoft` adds `requested_token_use=on_behalf_of`.",
            default="standard",
            one_of=("microsoft", "standard"),
        ),
        "map_identities_from": _text(
            "Which token's claims identify the consumer.",
            default="exchanged_tokens",
            one_of=("exchanged_tokens", "subject_token"),
            refused={"subject_token": NOT_YET},
        ),
        "cache": _CACHE,
        "result": _RESULT,
        "flow": _FLOW,
        "strict": _flag(
            "Refuse a configuration that leaves forwarding, narrowing or subjects open, instead of reporting"
            " it.",
            default=False,
        ),
        "deadline": _integer(
            "Milliseconds for the whole request, everything included.",
            default=5000,
            between=(1, MAX_DEADLINE_MS),
        ),
        "max_token_size": _integer(
            "Bytes that a token may have. The default is the longest header line that nginx takes.",
            default=DEFAULT_MAX_TOKEN_SIZE,
            between=(256, 65536),
        ),
        "actor": _ACTOR,
        "proof_of_possession": _POSSESSION_FACTS,
        "retry": _RETRY,
        "breaker": _BREAKER,
    },
    required=True,
    difference="Required: without it there is nothing for this plugin to do.",
)

# --- fields of Kong's plugin that are accepted at Kong's default only -----------------

_SECRET_MEMBERS = frozenset({"d", "dp", "dq", "k", "oth", "p", "q", "qi", "r", "t"})
_JWK_MEMBERS = (
    "alg", "crv", "d", "dp", "dq", "e", "issuer", "k", "kid", "kty", "n", "oth", "p", "q", "qi", "r",
    "t", "use", "x", "x5t", "x5t#S256", "x5u", "y",
)  # fmt: skip


def _jwk() -> dict[str, Field]:
    members = {
        name: _text(
            f"The JWK member `{name}`.",
            referenceable=name in _SECRET_MEMBERS,
            encrypted=name in _SECRET_MEMBERS,
        )
        for name in _JWK_MEMBERS
    }
    members["key_ops"] = _texts("The JWK member `key_ops`.")
    members["x5c"] = _texts("The JWK member `x5c`.")
    return dict(sorted(members.items()))


def _secret(description: str) -> Field:
    return _text(description, referenceable=True, encrypted=True)


def _reference(description: str) -> Field:
    return _text(description, referenceable=True)


def _port() -> Field:
    return _integer("The port number.", default=6379, between=(0, 65535))


def _redis_oauth() -> dict[str, Field]:
    return {
        "auth_method": _text(
            "How the client authenticates.",
            default="client_secret_post",
            one_of=("client_secret_basic", "client_secret_jwt", "client_secret_post"),
        ),
        "client_id": _reference("The client id."),
        "client_secret": _secret("The client secret."),
        "client_secret_jwt_alg": _text(
            "The algorithm of `client_secret_jwt`.", default="HS512", one_of=("HS256", "HS512")
        ),
        "grant_type": _text(
            "The grant that gives the token.",
            default="client_credentials",
            one_of=("client_credentials", "password"),
        ),
        "password": _secret("The password of the `password` grant."),
        "redis_username": _reference("A fixed user name for Redis."),
        "redis_username_claim": _text("The claim that names the Redis user."),
        "scopes": _texts("The scopes asked for.", default=[]),
        "ssl_verify": _flag("Verify the certificate of the token endpoint.", default=True),
        "timeout": _integer("Milliseconds for the token endpoint.", default=10000, between=(0, _INT31)),
        "token_endpoint": _text("The token endpoint's URL."),
        "token_headers": _string_map("Extra headers of the token request."),
        "token_post_args": _string_map("Extra parameters of the token request."),
        "username": _reference("The user of the `password` grant."),
    }


def _string_map(description: str) -> Field:
    return Field(type="map", description=description, values=Field(type="string"))


def _redis_cloud() -> dict[str, Field]:
    return {
        "auth_provider": _text(
            "The provider of the Redis service.", one_of=("aws", "azure", "gcp", "oauth"), referenceable=True
        ),
        "aws_access_key_id": _secret("The AWS access key id."),
        "aws_assume_role_arn": _secret("The AWS role to assume."),
        "aws_cache_name": _reference("The name of the ElastiCache cluster."),
        "aws_is_serverless": _flag("Whether the cluster is serverless.", default=True),
        "aws_region": _reference("The AWS region."),
        "aws_role_session_name": _secret("The name of the AWS role session."),
        "aws_secret_access_key": _secret("The AWS secret access key."),
        "azure_client_id": _secret("The Azure client id."),
        "azure_client_secret": _secret("The Azure client secret."),
        "azure_tenant_id": _secret("The Azure tenant id."),
        "gcp_service_account_json": _secret("The GCP service account, as JSON."),
        "oauth": _record("OAuth 2.0 for the Redis service.", _redis_oauth()),
    }


def _redis_timeout(description: str) -> Field:
    return _number(
        f"{description} The largest of the three bounds what one request can lose to Redis.",
        type="integer",
        default=50,
        between=(0, _INT31),
        difference="Kong's default is 2000; 0 is refused.",
    )


def _redis() -> dict[str, Field]:
    return {
        "cloud_authentication": _later(_record("Authentication at a cloud's Redis service.", _redis_cloud())),
        "cluster_max_redirections": _integer("Redirections followed in a cluster.", default=5),
        "cluster_nodes": _records(
            "Nodes of a Redis cluster from which the others are found; makes it a cluster.",
            {"ip": _text("The host name.", default="127.0.0.1"), "port": _port()},
            len_min=1,
        ),
        "connect_timeout": _redis_timeout("Milliseconds to connect, TLS included."),
        "connection_is_proxied": _later(_flag("Whether a proxy stands before Redis.", default=False)),
        "database": _integer("The number of the database; a cluster has 0 alone.", default=0),
        "host": _text("The host name.", default="127.0.0.1", referenceable=True),
        "keepalive_backlog": _later(_integer("Connections that may wait for the pool.", between=(0, _INT31))),
        "keepalive_pool_size": replace(
            _integer("Connections kept in the pool.", default=256, between=(1, _INT31)),
            difference="A process uses at most 5.",
        ),
        "password": _secret("The password."),
        "port": replace(_port(), referenceable=True),
        "read_timeout": _redis_timeout("Milliseconds to read."),
        "send_timeout": _redis_timeout("Milliseconds to write."),
        "sentinel_master": _text("The name that the Sentinels know the master by; makes them asked for it."),
        "sentinel_nodes": _records(
            "The nodes of Redis Sentinel.",
            {"host": _text("The host name.", default="127.0.0.1"), "port": _port()},
            len_min=1,
        ),
        "sentinel_password": _secret("The password for Sentinel."),
        "sentinel_role": _text(
            "The role of the node that is used: `master`.",
            one_of=("any", "master", "slave"),
            refused=dict.fromkeys(("any", "slave"), "a cache is written, too; only the master can be"),
        ),
        "sentinel_username": _reference("The user name for Sentinel."),
        "server_name": _reference("The name that the certificate must have, instead of the host's."),
        "ssl": _flag("Use TLS to Redis, and to Sentinels.", default=False),
        "ssl_verify": _flag(
            "Verify the certificate of Redis.",
            default=True,
            difference="Trust is `ca_file`, or the plugin server's own.",
        ),
        "username": _reference("The user name, for an ACL."),
    }


def _claim_headers(description: str) -> Field:
    return _records(
        description,
        {
            "header": _text("The name of the header.", required=True),
            "path": _texts("The path of the claim.", required=True, len_min=1),
        },
    )


_LATER: dict[str, Field] = {
    "introspection_endpoint": _reference("The introspection endpoint."),
    "introspection_endpoint_auth_method": _text(
        "How the client authenticates at the introspection endpoint.",
        one_of=(
            "client_secret_basic",
            "client_secret_jwt",
            "client_secret_post",
            "none",
            "private_key_jwt",
            "self_signed_tls_client_auth",
            "tls_client_auth",
        ),
    ),
    "client_alg": _texts(
        "The algorithm of a signed client assertion.",
        one_of=(
            "ES256", "ES384", "ES512", "EdDSA", "HS256", "HS384", "HS512",
            "PS256", "PS384", "PS512", "RS256", "RS384", "RS512",
        ),
    ),
    "client_jwk": _records("The keys of `private_key_jwt`.", _jwk()),
    "tls_client_auth_ssl_verify": _flag("Verify the server during mTLS client authentication.", default=True),
    "keepalive": _flag("Keep connections to the issuer open.", default=True),
    "http_proxy": _text("The proxy for http."),
    "https_proxy": _text("The proxy for https."),
    "no_proxy": _text("Hosts that are reached without a proxy."),
    "http_proxy_authorization": _reference("The credentials for the http proxy."),
    "https_proxy_authorization": _reference("The credentials for the https proxy."),
    "cache_ttl_min": _number("The shortest time, in seconds, that anything is cached."),
    "cache_introspection": _flag("Cache introspection answers.", default=True),
    "rediscovery_lifetime": _number("Seconds between two attempts at discovery.", default=30),
    "upstream_headers": _claim_headers("Claims to set as headers of the request that goes upstream."),
    "upstream_headers_names": _texts("Names of headers that go upstream."),
    "upstream_headers_claims": _texts("Claims paired by position with `upstream_headers_names`."),
    "downstream_headers": _claim_headers("Claims to set as headers of the answer to the caller."),
    "consumer_claims": Field(
        type="array",
        description="Paths of the claims that identify the consumer.",
        elements=Field(type="array", elements=Field(type="string")),
    ),
    "consumer_by": _texts(
        "The fields by which a consumer is found.",
        default=["custom_id", "username"],
        one_of=("custom_id", "id", "username"),
    ),
    "consumer_optional": _flag("Go on when no consumer is found.", default=False),
    "consumer_groups_claim": _texts("The path of the claim that names consumer groups."),
    "anonymous": _text("The consumer used when authentication fails."),
    "credential_claim": _texts("The path of the claim that makes a virtual credential.", default=["sub"]),
    "display_errors": _flag("Show the caller why a request failed.", default=False),
    "expose_error_code": _flag("Send the error code of RFC 6750 to the caller.", default=True),
    "unauthorized_error_message": _text("The message of a 401 answer.", default="Unauthorized"),
    "forbidden_error_message": _text("The message of a 403 answer.", default="Forbidden"),
    "discovery_headers_names": _texts("Names of extra headers of the discovery request."),
    "discovery_headers_values": _texts("Values paired by position with `discovery_headers_names`."),
    "issuers_allowed": _texts("The issuers allowed in tokens.", referenceable=True),
    "extra_jwks_uris": _texts("Further key sets to trust.", referenceable=True),
}  # fmt: skip

_SHARED: dict[str, Field] = {
    "cluster_cache_strategy": _text(
        "`redis`: processes and nodes share exchanged tokens in Redis or Valkey, as a second level behind"
        " each one's memory.",
        default="off",
        one_of=("off", "redis"),
        difference="With `redis`, `token_exchange.cache.seal_keys` is required.",
    ),
    "cluster_cache_items": _texts(
        "What the shared cache holds: `tokens` are exchanged tokens, sealed. Empty: nothing, whatever the"
        " strategy.",
        default=["introspection"],
        one_of=("introspection", "tokens"),
        difference="With `redis`, `tokens` must be listed or nothing at all: nothing else is shared.",
    ),
    "cluster_cache_redis": _record("The Redis of the shared cache.", _redis()),
}

SECTIONS: dict[str, dict[str, Field]] = {
    "The target issuer": _TARGET,
    "The gateway as a client": _CLIENT,
    "The caller's credential and the upstream header": _CREDENTIAL,
    "Checks": _CHECKS,
    "Proof of possession": _POSSESSION,
    "What callers are told": _PUBLISHED,
    "The token request": _REQUEST,
    "Transport and cache": _TRANSPORT,
    "The cache that nodes share": _SHARED,
    "Additions at top level": _OWN,
}

CONFIG = _record(
    "The configuration of the plugin.",
    {
        **{name: member for section in SECTIONS.values() for name, member in section.items()},
        "token_exchange": _TOKEN_EXCHANGE,
        **{name: _later(member) for name, member in _LATER.items()},
    },
    required=True,
)

# --- Kong's schema language -----------------------------------------------------------

_PROTOCOLS = ["grpc", "grpcs", "http", "https"]


def _conditional(
    if_field: str, if_match: dict[str, Json], then_field: str, then_match: dict[str, Json]
) -> Json:
    return {
        "conditional": {
            "if_field": f"config.{if_field}",
            "if_match": if_match,
            "then_field": f"config.{then_field}",
            "then_match": then_match,
        }
    }


# Rules between fields that Kong can check when a plugin is configured; config.py has all.
_ENTITY_CHECKS: list[Json] = [
    _conditional("using_pseudo_issuer", {"eq": True}, "token_endpoint", {"required": True}),
    _conditional("using_pseudo_issuer", {"eq": True}, "jwks_endpoint", {"required": True}),
    _conditional(
        "bearer_token_param_type",
        {"contains": "cookie", "required": True},  # without `required`, Kong takes a null for a match
        "bearer_token_cookie_name",
        {"required": True},
    ),
    _conditional(
        "token_exchange.provider",
        {"eq": "microsoft"},
        "token_exchange.grant_type",
        {"eq": "jwt_bearer"},
    ),
    _conditional(
        "token_exchange.request.actor_token.source",
        {"eq": "header"},
        "token_exchange.request.actor_token.header_name",
        {"required": True},
    ),
    _conditional(
        "token_exchange.request.actor_token.source",
        {"eq": "config"},
        "token_exchange.request.actor_token.static_token",
        {"required": True},
    ),
    {"mutually_required": ["config.token_post_args_names", "config.token_post_args_values"]},
    {"mutually_required": ["config.token_headers_names", "config.token_headers_values"]},
]


def describe(member: Field) -> str:
    """Return the whole description: what it is, how we differ, what is not supported yet."""
    parts = [member.description, member.difference]
    if member.only_default == NOT_YET:
        parts.append("Not supported yet.")
    return " ".join(part for part in parts if part)


def kong_field(member: Field) -> dict[str, Json]:
    """Render one field as Kong's metaschema takes it: only the attributes that say something."""
    attributes: dict[str, Json] = {
        "description": describe(member) if member.description else None,
        "required": member.required or None,
        "default": member.default,
        "one_of": list(member.one_of) or None,
        "between": None if member.between is None else list(member.between),
        "len_min": member.len_min,
        "referenceable": member.referenceable or None,
        "encrypted": member.encrypted or None,
        "elements": None if member.elements is None else kong_field(member.elements),
        "keys": None if member.values is None else {"type": "string"},
        "values": None if member.values is None else kong_field(member.values),
    }
    result: dict[str, Json] = {"type": member.type}
    result.update({name: value for name, value in attributes.items() if value is not None})
    if member.type == "record":
        result["fields"] = [{name: kong_field(child)} for name, child in member.fields.items()]
    return result


def plugin_schema() -> dict[str, Json]:
    """
    Return the `Schema` member of the query command's answer.

    The plugin cannot be attached to a consumer: it runs before there is one.
    """
    protocols: dict[str, Json] = {
        "type": "set",
        "required": True,
        "default": list(_PROTOCOLS),
        "elements": {"type": "string", "one_of": list(_PROTOCOLS)},
        "description": "The protocols on which the plugin runs.",
    }
    consumer: dict[str, Json] = {
        "type": "foreign",
        "reference": "consumers",
        "eq": None,
        "description": "The plugin cannot be attached to a consumer.",
    }
    return {
        "name": NAME,
        "fields": [{"consumer": consumer}, {"protocols": protocols}, {"config": kong_field(CONFIG)}],
        "entity_checks": _ENTITY_CHECKS,
    }


# --- JSON Schema ----------------------------------------------------------------------


def json_schema() -> dict[str, Json]:
    """
    Return a JSON Schema (2020-12) of the plugin's `config`, for editors and CI.

    It checks what can be said of one field at a time; `kong-token-exchange check`
    knows the rules between fields.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Configuration of the token-exchange plugin for Kong Gateway",
        **_json_field(CONFIG),
    }


def json_schema_text() -> str:
    """Return schema.json: sorted, so that a change shows as the lines that changed."""
    return json.dumps(json_schema(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _json_field(member: Field) -> dict[str, Json]:
    result: dict[str, Json] = {}
    if member.description:
        result["description"] = describe(member)
    if member.default is not None:
        result["default"] = member.default
    result.update(_json_only_default(member) if member.only_default else _json_type(member))
    if not member.required or member.default is not None or member.only_default:
        _admit_null(result)
    return result


def _json_only_default(member: Field) -> dict[str, Json]:
    """Render a field that has one accepted value; a record may spell out its defaults."""
    if member.type == "record":
        properties: dict[str, Json] = {name: _json_field(child) for name, child in member.fields.items()}
        return {"type": "object", "properties": properties, "additionalProperties": False}
    if member.type == "array":
        default = member.default if isinstance(member.default, list) else []
        return {"type": "array", "items": {"enum": default}, "minItems": 0, "maxItems": len(default)}
    if member.type == "map":
        return {"type": "object", "maxProperties": 0}
    return {"enum": [] if member.default is None else [member.default]}


def _json_type(member: Field) -> dict[str, Json]:
    if member.type == "record":
        properties: dict[str, Json] = {name: _json_field(child) for name, child in member.fields.items()}
        required: list[Json] = [
            name for name, child in member.fields.items() if child.required and child.default is None
        ]
        result: dict[str, Json] = {
            "type": "object",
            "properties": properties,
            "additionalProperties": False,
        }
        return {**result, "required": required} if required else result
    if member.type == "array" and member.elements is not None:
        items = {**_json_type(member.elements)}
        bounds: dict[str, Json] = {} if member.len_min is None else {"minItems": member.len_min}
        return {"type": "array", "items": items, **bounds}
    if member.type == "string":
        allowed: list[Json] = [value for value in member.one_of if value not in member.refused]
        return {"type": "string", "enum": allowed} if allowed else {"type": "string", "minLength": 1}
    if member.between is not None:
        return {"type": member.type, "minimum": member.between[0], "maximum": member.between[1]}
    return {"type": member.type}


def _admit_null(result: dict[str, Json]) -> None:
    """Let null stand for an absent field, as Kong does."""
    kind, values = result.get("type"), result.get("enum")
    if isinstance(kind, str):
        result["type"] = [kind, "null"]
    if isinstance(values, list):
        result["enum"] = [*values, None]


# --- the reference page ---------------------------------------------------------------

BEGIN_MARK = "<!-- reference: begin; made from kong_token_exchange/schema.py -->"
END_MARK = "<!-- reference: end -->"


def reference_markdown() -> str:
    """Return the tables of docs/configuration.md, without the marks around them."""
    parts = []
    for title, section in SECTIONS.items():
        rows = {name: member for name, member in section.items() if member.only_default != NOT_YET}
        parts.append(f"### {title}\n\n{_table(rows)}")
        parts += [
            f"### `{name}`\n\n{describe(member)}\n\n{_table(member.fields)}"
            for name, member in rows.items()
            if member.type == "record"
        ]
    redis = [
        below
        for below in _records_below("cluster_cache_redis", _SHARED["cluster_cache_redis"])
        if below[1].only_default != NOT_YET
    ]
    for path, record in (*_records_below("token_exchange", _TOKEN_EXCHANGE), *redis):
        parts.append(f"### `{path}`\n\n{describe(record)}\n\n{_table(record.fields)}")
    parts.append(
        "### Accepted at the default only\n\n"
        "These fields load when they are absent or hold the default shown."
        " Any other value makes the configuration invalid: `not supported yet`.\n\n"
        + _table(
            {
                name: replace(member, only_default="")  # the sentence above says it for all
                for name, member in CONFIG.fields.items()
                if member.only_default == NOT_YET
            }
        )
    )
    return "\n\n".join(parts) + "\n"


def _records_below(path: str, record: Field) -> Iterator[tuple[str, Field]]:
    """Yield *record* and the records in it, each with its path, in reading order."""
    yield path, record
    for name, child in record.fields.items():
        if child.type == "record":
            yield from _records_below(f"{path}.{name}", child)
        elif child.elements is not None and child.elements.type == "record":
            inner = replace(child.elements, description=child.description, difference=child.difference)
            yield from _records_below(f"{path}.{name}[]", inner)


def _table(fields: Mapping[str, Field]) -> str:
    lines = ["| Field | Type | Default | Meaning |", "|---|---|---|---|"]
    for name, member in fields.items():
        lines.append(f"| `{name}` | {_type_words(member)} | {_default_words(member)} | {_cell(member)} |")
    return "\n".join(lines)


def _type_words(member: Field) -> str:
    if member.type == "array" and member.elements is not None:
        return f"array of {member.elements.type}s"
    return member.type


def _default_words(member: Field) -> str:
    if member.default is not None:
        return f"`{json.dumps(member.default)}`"
    return "required" if member.required else ""


def _cell(member: Field) -> str:
    words = [member.description]
    choices = member.one_of or (member.elements.one_of if member.elements is not None else ())
    if choices:
        words.append("One of " + ", ".join(f"`{choice}`" for choice in choices) + ".")
    if member.between is not None:
        words.append(f"From {member.between[0]} to {member.between[1]}.")
    if member.referenceable or (member.elements is not None and member.elements.referenceable):
        words.append("May be a vault reference.")
    if member.difference:
        words.append(f"*Differs:* {member.difference}")
    if member.only_default == NOT_YET:
        words.append("Not supported yet.")
    return " ".join(words).replace("|", "\\|")


def insert_reference(page: str) -> str:
    """
    Return *page* with the text between the marks replaced by the tables.

    Raises:
        ValueError: a mark is missing.
    """
    before, begin, rest = page.partition(BEGIN_MARK)
    _, end, after = rest.partition(END_MARK)
    if not begin or not end:
        raise ValueError("the page lacks the marks around the reference")
    return f"{before}{BEGIN_MARK}\n\n{reference_markdown()}\n{END_MARK}{after}"


def write_files(schema_path: Path, page_path: Path) -> None:
    """Write schema.json, and the tables into docs/configuration.md."""
    schema_path.write_text(json_schema_text(), encoding="utf-8")
    page_path.write_text(insert_reference(page_path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write_files(Path(sys.argv[1]), Path(sys.argv[2]))
