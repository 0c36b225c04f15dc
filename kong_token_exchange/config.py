"""
JSON configuration to a frozen `PluginConfig`.

`load_config` works in three steps: `read_members` checks names and types against
`schema.CONFIG` and fills in defaults; the `_build_*` functions check what the schema
cannot say and make the frozen parts; `_find_*` collects what loads and should be
known. Nothing here reads a file, the network or the clock.

A message names the place and the rule, never the value, except where the value is
a choice, a header or a parameter name: a value in the wrong place may be a secret.
Indexes in a path count from 0.

Source: docs/configuration.md.
"""

from __future__ import annotations

import difflib
import hashlib
import ipaddress
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, Literal, cast
from urllib.parse import SplitResult, urlsplit

from kong_token_exchange.core.dpop import PROOF_ALGORITHMS
from kong_token_exchange.core.jws import ASYMMETRIC_ALGORITHMS, parse_compact
from kong_token_exchange.core.policy import (
    FAIR_TIME_S,
    TOKEN_TYPE_ACCESS_TOKEN,
    ActorPolicy,
    BreakerPolicy,
    ClaimPair,
    Conditions,
    PossessionPolicy,
    RedisPolicy,
    ResultPolicy,
    SharedCachePolicy,
    SubjectTokenIssuer,
)
from kong_token_exchange.core.target_uri import normalise_uri
from kong_token_exchange.errors import ConfigError, InvalidTokenError
from kong_token_exchange.protocol.bearer import is_b64token
from kong_token_exchange.protocol.certificate import CertificateFormat
from kong_token_exchange.protocol.exchange import ExchangeParameters
from kong_token_exchange.protocol.resource_metadata import ResourceMetadata, build_metadata, metadata_paths
from kong_token_exchange.schema import (
    CONFIG,
    DEFAULT_NEGATIVE_TTL_S,
    KONG_AUTH_METHODS,
    MAX_NEGATIVE_TTL_S,
    NOT_YET,
    Field,
)
from kong_token_exchange.secret import Secret

# Sixteen spellings to clear; a header of a token in use has one or two (x-access-token).
MAX_HEADER_HYPHENS = 4

# A secret shorter than the key that is made of it weakens that key. Thirty-two random hex digits
# have about 14 different characters; fewer than 8 is a pattern, not chance.
MIN_SEAL_KEY_BYTES = 32
MIN_SEAL_KEY_VARIETY = 8
# One that writes, one that is leaving, one that is coming, and one to spare: each costs a look-up.
MAX_SEAL_KEYS = 4

ClientMethod = Literal["client_secret_basic", "client_secret_post", "none"]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Topic = Literal["forwarding", "narrowing", "subject", "actor", "issuer", "result", "credential", "time"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """
    Something that loads and that an operator should know; `check` prints it.

    With `strict` the topics forwarding, narrowing and subject are refused.
    """

    path: str
    message: str
    topic: Topic


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetIssuer:
    """The issuer that exchanges; identifiers are compared as exact strings."""

    issuer: str
    discovery_url: str | None
    token_endpoint: str | None
    jwks_uri: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientCredentials:
    """The client that we are at the token endpoint; its secret is here, or in a file, or there is none."""

    client_id: str
    client_secret: Secret | None
    client_secret_file: str | None
    method: ClientMethod


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePolicy:
    """Whether exchanged tokens are cached, for how many seconds at most, and refusals for how many."""

    enabled: bool
    ttl: int
    ttl_neg: float
    refresh_ahead: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CredentialSources:
    """Where the subject token is looked for; `header_name` None means `Authorization`."""

    header: bool
    header_name: str | None
    query: bool
    cookie_name: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateHeader:
    """The header in which *trusted* proxies hand on the client's certificate; its name in lower case."""

    name: str
    form: CertificateFormat
    trusted: tuple[Network, ...]

    def believes(self, address: str) -> bool:
        """Tell whether what comes from *address* is believed."""
        try:
            peer = ipaddress.ip_address(address)
        except ValueError:
            return False
        peer = getattr(peer, "ipv4_mapped", None) or peer
        return any(peer in network for network in self.trusted)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamHeader:
    """Where the result goes: scheme "bearer" gives `Bearer <token>`, "" the bare token."""

    name: str
    scheme: Literal["bearer", ""]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """What this exchange is for, in the words of its owner."""

    name: str | None
    kind: Literal["downscoping", "federation", "delegation", "impersonation", "transformation"] | None
    owner: str | None
    justification: str | None
    review_by: date | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginConfig:
    """
    One plugin configuration, checked and resolved.

    `target_rules` says how every token of the target issuer is verified, whether an
    entry lists that issuer or not; its `conditions` is None. `issuers` holds the
    entries as listed. In `audience_required` and `scopes_required` the members of
    one set are all needed, and any one of the sets is enough.

    `identity` is the SHA-256, in hex, of everything that was configured, secrets
    included, but for where and how the second level keeps entries: fit for keys,
    never for logs, where a short secret could be guessed from it.
    """

    identity: str
    target: TargetIssuer
    target_rules: SubjectTokenIssuer
    client: ClientCredentials
    issuers: tuple[SubjectTokenIssuer, ...]
    request: ExchangeParameters
    result: ResultPolicy
    cache: CachePolicy
    shared_cache: SharedCachePolicy | None
    breaker: BreakerPolicy
    credential: CredentialSources
    upstream_header: UpstreamHeader
    hide_credentials: bool
    run_on_preflight: bool
    audience_required: tuple[frozenset[str], ...]
    scopes_required: tuple[frozenset[str], ...]
    claims_forbidden: tuple[str, ...]
    audience_claim: tuple[str, ...]
    scopes_claim: tuple[str, ...]
    possession: PossessionPolicy
    certificate_header: CertificateHeader | None
    resource_metadata: ResourceMetadata | None
    leeway: float
    timeout_ms: int
    deadline_ms: int
    max_token_size: int
    ssl_verify: bool
    ca_file: str | None
    insecure_allow_http: bool
    strict: bool
    flow: Flow | None
    actor: ActorPolicy
    warnings: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


# What has been read: a field's name to its value, every field of the record present.
Members = dict[str, Any]

_DISCOVERY_PATH = "/.well-known/openid-configuration"
_REFRESH_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:refresh_token"  # noqa: S105 - RFC 8693 section 3

_PRINTABLE_ASCII = re.compile(r"[\x21-\x7e]+")
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 section 5.6.2
_SCOPE_TOKEN = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")  # RFC 6749 section 3.3
_HEADER_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")
_HOST = re.compile(r"[A-Za-z0-9._\-]+|[0-9A-Fa-f:.]+")
_DAY = re.compile(r"\d{4}-\d\d-\d\d")
_URI_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:")
_VAULT_REFERENCE = re.compile(r"\{vault://.*\}", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_CONTROL_BUT_BREAKS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")

_RESERVED_PARAMETERS = frozenset(
    {
        "grant_type", "subject_token", "subject_token_type", "actor_token", "actor_token_type", "audience",
        "resource", "scope", "requested_token_type", "assertion", "client_id", "client_secret",
        "client_assertion", "client_assertion_type",
    }
)  # fmt: skip
_ON_BEHALF_OF = ("requested_token_use", "on_behalf_of")

_HOP_BY_HOP = frozenset(
    {
        "connection", "content-length", "expect", "host", "keep-alive", "proxy-authorization",
        "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade",  # codespell:ignore te
    }
)  # fmt: skip
_RESERVED_HEADERS = _HOP_BY_HOP | {"accept-encoding", "authorization", "content-type", "cookie"}

# Members that Kong adds when it starts an instance.
_KONG_MEMBERS = frozenset({"route_id", "service_id", "consumer_id", "consumer_group_id"})

# More than a minute is no clock skew: it is a second life for expired tokens.
_LEEWAY_WORTH_A_FINDING = 60

_STRICT_TOPICS = frozenset({"forwarding", "narrowing", "subject"})


def load_config(raw: Mapping[str, object], *, allow_references: bool = False) -> PluginConfig:
    """
    Check a plugin's `config` and build what the plugin runs with.

    Kong resolves vault references before it starts an instance, so a reference that
    is still there is an error.

    Args:
        raw: The configuration as JSON, with or without the members that Kong adds.
        allow_references: Take vault references as they stand; for a linter, which
            sees the configuration before Kong does.

    Returns:
        The configuration; `warnings` and `findings` tell what an operator should know.

    Raises:
        ConfigError: the first mistake, with its path, such as
            `token_exchange.subject_token_issuers[1].issuer`.
    """
    reader = _Reader(allow_references=allow_references)
    members = reader.read_record(CONFIG, raw, "")
    notes = _Notes(insecure_allow_http=members["insecure_allow_http"])
    config = _build_config(members, notes)
    refused = [finding for finding in config.findings if finding.topic in _STRICT_TOPICS]
    if config.strict and refused:
        raise ConfigError(refused[0].path, f"{refused[0].message} (`strict` refuses this)")
    return config


# --- names, types and defaults --------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """Reads JSON by the schema; every member of the result has its type or is None."""

    allow_references: bool

    def read(self, field: Field, value: object, path: str) -> Any:
        """Return the value of one field, its default when it is unset, None when it has none."""
        if _is_unset(value):
            return self._read_unset(field, path)
        read = {
            "string": self._read_string,
            "boolean": self._read_boolean,
            "integer": self._read_number,
            "number": self._read_number,
            "array": self._read_array,
            "map": self._read_map,
            "record": self.read_record,
        }[field.type](field, value, path)
        if field.only_default and field.type != "record" and not _is_default(field, read):
            raise ConfigError(path, field.only_default)
        return read

    def read_record(self, field: Field, value: object, path: str) -> Members:
        """Return all members of a record, the unset ones as `read` gives them."""
        if not isinstance(value, Mapping):
            raise ConfigError(path or "config", "must be a record")
        for name in value:
            if not isinstance(name, str) or not (name in field.fields or _is_kongs_own(name, path)):
                raise _unknown_member(field, name, path)
        return {
            name: self.read(member, value.get(name), _join(path, name))
            for name, member in field.fields.items()
        }

    def _read_unset(self, field: Field, path: str) -> Any:
        if field.default is not None:
            return list(field.default) if isinstance(field.default, list) else field.default
        if field.type == "record" and (field.required or not _has_required(field)):
            return self.read_record(field, {}, path)
        if field.required and not field.only_default:
            raise ConfigError(path, "required")
        return None

    def _read_string(self, field: Field, value: object, path: str) -> str:
        if not isinstance(value, str):
            raise ConfigError(path, "must be a string")
        if not value:
            raise ConfigError(path, "must not be empty")
        if (_CONTROL_BUT_BREAKS if field.multiline else _CONTROL).search(value):
            raise ConfigError(path, "must not have control characters, line breaks included")
        if _VAULT_REFERENCE.fullmatch(value) and not (self.allow_references and field.referenceable):
            raise ConfigError(path, "is a vault reference that was not resolved")
        if value in field.refused:
            raise ConfigError(path, f"{value}: {field.refused[value]}")
        if field.one_of and value not in field.one_of:
            raise ConfigError(path, f"must be one of {', '.join(field.one_of)}")
        return value

    def _read_boolean(self, _field: Field, value: object, path: str) -> bool:
        if not isinstance(value, bool):
            raise ConfigError(path, "must be true or false")
        return value

    def _read_number(self, field: Field, value: object, path: str) -> int | float:
        if field.referenceable and isinstance(value, str):
            value = self._read_referenced_number(field, value, path)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(path, "must be a number")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(path, "must be a finite number")
        if value == int(value):
            value = int(value)  # Lua has one type of number: 300.0 is 300
        elif field.type == "integer":
            raise ConfigError(path, "must be a whole number")
        if field.between is not None and not field.between[0] <= value <= field.between[1]:
            raise ConfigError(path, f"must be from {field.between[0]} to {field.between[1]}")
        return value

    def _read_referenced_number(self, field: Field, value: str, path: str) -> object:
        """Return the number that a vault holds as text; a reference that may stand counts as the default."""
        text = self._read_string(field, value, path)
        if _is_reference(text):
            return field.default
        return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text

    def _read_array(self, field: Field, value: object, path: str) -> list[Any] | None:
        if not isinstance(value, list | tuple) or field.elements is None:
            raise ConfigError(path, "must be an array")
        if field.len_min is not None and len(value) < field.len_min:
            raise ConfigError(
                path, "must not be empty" + ("" if field.required else "; leave it out instead")
            )
        read = []
        for index, element in enumerate(value):
            if field.elements.type == "record":
                read.append(self.read_record(field.elements, element, f"{path}[{index}]"))
            elif _is_unset(element):
                raise ConfigError(f"{path}[{index}]", "must not be null")
            else:
                read.append(self.read(field.elements, element, f"{path}[{index}]"))
        return read

    def _read_map(self, field: Field, value: object, path: str) -> dict[str, Any]:
        if not isinstance(value, Mapping) or field.values is None:
            raise ConfigError(path, "must be a map")
        return {str(key): self.read(field.values, item, _join(path, str(key))) for key, item in value.items()}


def _is_unset(value: object) -> bool:
    """Tell whether nothing is stated: Kong may send null or `{}` for what was left out."""
    return value is None or (isinstance(value, Mapping) and not value)


def _is_default(field: Field, value: Any) -> bool:
    """Compare with the default; the order of an array of choices means nothing."""
    if field.type == "array":
        return sorted(map(str, value)) == sorted(map(str, field.default or []))  # type: ignore[arg-type]
    return bool(value == field.default)


def _has_required(field: Field) -> bool:
    return any(member.required and member.default is None for member in field.fields.values())


def _is_kongs_own(name: str, path: str) -> bool:
    """Tell whether Kong itself added the member; `$refs` may stand in any record."""
    return name == "$refs" or (not path and (name.startswith("__") or name in _KONG_MEMBERS))


def _unknown_member(field: Field, name: object, path: str) -> ConfigError:
    shown = "".join(char if _PRINTABLE_ASCII.fullmatch(char) else "?" for char in str(name)[:64])
    close = difflib.get_close_matches(shown, field.fields, n=1)
    return ConfigError(_join(path, shown), "unknown field" + (f"; did you mean {close[0]}?" if close else ""))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# --- what the schema cannot say -------------------------------------------------------


class _Notes:
    """Collects what loads and should be known."""

    def __init__(self, *, insecure_allow_http: bool) -> None:
        self.insecure_allow_http = insecure_allow_http
        self.warnings: list[str] = []
        self.findings: list[Finding] = []

    def warn(self, path: str, message: str) -> None:
        """Keep a warning, which is logged once at start."""
        self.warnings.append(f"{path}: {message}")

    def find(self, topic: Topic, path: str, message: str) -> None:
        """Keep a finding, which `check` prints."""
        self.findings.append(Finding(path=path, message=message, topic=topic))


def _build_config(members: Members, notes: _Notes) -> PluginConfig:
    exchange: Members = members["token_exchange"]
    target = _build_target(members, notes)
    issuers, target_rules = _build_issuers(exchange, target, notes)
    credential = _build_credential(members, notes)
    possession = _build_possession(members, exchange["proof_of_possession"])
    config = PluginConfig(
        identity=_identify(members),
        target=target,
        target_rules=target_rules,
        client=_build_client(members, notes),
        issuers=issuers,
        request=_build_request(members, exchange),
        result=_build_result(exchange["result"]),
        cache=_build_cache(members, exchange["cache"]),
        shared_cache=_build_shared_cache(members, exchange["cache"], notes),
        breaker=_build_breaker(exchange),
        credential=credential,
        upstream_header=_build_upstream_header(members["upstream_access_token_header"]),
        hide_credentials=members["hide_credentials"],
        run_on_preflight=members["run_on_preflight"],
        audience_required=_build_alternatives(members, "audience_required"),
        scopes_required=_build_alternatives(members, "scopes_required"),
        claims_forbidden=tuple(members["claims_forbidden"] or ()),
        audience_claim=tuple(members["audience_claim"]),
        scopes_claim=tuple(members["scopes_claim"]),
        possession=possession,
        certificate_header=_build_certificate_header(members, exchange["proof_of_possession"]),
        resource_metadata=_build_resource_metadata(members, credential, possession),
        leeway=float(members["leeway"]),
        timeout_ms=int(members["timeout"]),
        deadline_ms=exchange["deadline"],
        max_token_size=exchange["max_token_size"],
        ssl_verify=members["ssl_verify"],
        ca_file=_build_ca_file(members),
        insecure_allow_http=members["insecure_allow_http"],
        strict=exchange["strict"],
        flow=_build_flow(exchange["flow"]),
        actor=_build_actor(exchange, credential, (*issuers, target_rules), notes),
    )
    if config.result.validation == "none":
        for name in ("audience_required", "claims_forbidden"):
            if members[name]:
                raise ConfigError(name, "cannot be proven with token_exchange.result.validation none")
    _warn_of_unsafe(config, notes)
    for find in (
        _find_forwarding,
        _find_narrowing,
        _find_subject,
        _find_actor,
        _find_result,
        _find_credential,
        _find_possession,
        _find_time,
    ):
        find(config, notes)
    return replace(config, warnings=tuple(notes.warnings), findings=tuple(notes.findings))


def _identify(members: Members) -> str:
    """
    Hash what was read, so that a default that is spelt out changes nothing.

    Where the second level is and what seals it shapes no result: nodes that reach it in different
    ways, or in the middle of a rotation of keys, have to share their entries (ADR 0010).
    """
    exchange: Members = members["token_exchange"]
    cache = {name: value for name, value in exchange["cache"].items() if name != "seal_keys"}
    shaping = {name: value for name, value in members.items() if not name.startswith("cluster_cache_")}
    shaping["token_exchange"] = {**exchange, "cache": cache}
    canonical = json.dumps(shaping, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _is_reference(value: str) -> bool:
    """Tell whether the reader let a vault reference through, which is not looked into."""
    return _VAULT_REFERENCE.fullmatch(value) is not None


# --- URLs and issuers -----------------------------------------------------------------


def _split_url(value: str, path: str) -> SplitResult:
    """Split an absolute http or https URL; refuse what two parsers could read differently."""
    if not _PRINTABLE_ASCII.fullmatch(value) or "\\" in value:
        raise ConfigError(path, "must be a URL of printable ASCII characters")
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ConfigError(path, "must be a URL") from None
    if parts.scheme not in {"http", "https"} or not host:
        raise ConfigError(path, "must be an absolute http or https URL")
    if "@" in parts.netloc:
        raise ConfigError(path, "must not have user information")
    if "#" in value:
        raise ConfigError(path, "must not have a fragment")
    if not _HOST.fullmatch(host):
        raise ConfigError(path, "must have a host name or an address")
    return parts


def _check_url(value: str, path: str, notes: _Notes) -> str:
    """Require https, or http where it is allowed."""
    if _is_reference(value):
        return value
    parts = _split_url(value, path)
    if parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
        if not notes.insecure_allow_http:
            raise ConfigError(path, "must be https: http is for loopback, else set insecure_allow_http")
        notes.warn(path, "plain http: tokens and secrets are readable on the network")
    return value


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _parse_issuer(value: str, path: str) -> tuple[str, str | None]:
    """
    Return an issuer's identifier and the URL of its discovery document.

    A discovery URL gives the identifier when its well-known part is taken out; any
    other value is the identifier as it stands. What is no URL has no discovery.

    Source: OpenID Connect Discovery 1.0 section 4.1; RFC 8414 section 3.1.
    """
    if _is_reference(value):
        return value, value
    if not _PRINTABLE_ASCII.fullmatch(value):
        raise ConfigError(path, "must be printable ASCII characters")
    if not value.lower().startswith(("http://", "https://")):
        return value, None
    _split_url(value, path)
    before, mark, after = value.partition("/.well-known/")
    if "?" in before:
        raise ConfigError(path, "an issuer identifier has no query")
    if not mark:
        return value, value.removesuffix("/") + _DISCOVERY_PATH
    tenant = after.partition("?")[0].partition("/")[2].rstrip("/")
    if tenant and before.count("/") > 2:
        raise ConfigError(path, "is no discovery URL: it has path segments before and after /.well-known/")
    return (f"{before}/{tenant}" if tenant else before), value


def _build_target(members: Members, notes: _Notes) -> TargetIssuer:
    issuer, discovery_url = _parse_issuer(members["issuer"], "issuer")
    for name in ("token_endpoint", "jwks_endpoint"):
        if members[name] is not None:
            _check_url(members[name], name, notes)
        elif members["using_pseudo_issuer"]:
            raise ConfigError(name, "required with using_pseudo_issuer")
    if members["using_pseudo_issuer"]:
        discovery_url = None
    elif discovery_url is None:
        raise ConfigError("issuer", "must be an http or https URL, except with using_pseudo_issuer")
    else:
        _check_url(discovery_url, "issuer", notes)
    return TargetIssuer(
        issuer=issuer,
        discovery_url=discovery_url,
        token_endpoint=members["token_endpoint"],
        jwks_uri=members["jwks_endpoint"],
    )


# Members of an entry that are used before `conditions` choose among the entries.
_VERIFICATION = ("algorithms", "audience", "clients", "required_claims", "typ", "max_age")


def _build_issuers(
    exchange: Members, target: TargetIssuer, notes: _Notes
) -> tuple[tuple[SubjectTokenIssuer, ...], SubjectTokenIssuer]:
    """Build the listed entries, and the rules for every token of the target issuer."""
    path = "token_exchange.subject_token_issuers"
    entries = [
        (f"{path}[{index}]", *_parse_issuer(entry["issuer"], f"{path}[{index}].issuer"), entry)
        for index, entry in enumerate(exchange["subject_token_issuers"])
    ]
    default_type = exchange["request"]["subject_token_type"] or TOKEN_TYPE_ACCESS_TOKEN
    rules = _merge_verification([(at, entry) for at, issuer, _, entry in entries if issuer == target.issuer])
    target_rules = _build_entry(
        rules,
        issuer=target.issuer,
        discovery_url=target.discovery_url,
        jwks_uri=target.jwks_uri,
        verify_signature=True,
        subject_token_type=default_type,
    )
    built: list[SubjectTokenIssuer] = []
    for at, issuer, discovery_url, entry in entries:
        _check_subject_token_type(exchange, entry["subject_token_type"], f"{at}.subject_token_type")
        conditions = _build_conditions(entry["conditions"], f"{at}.conditions")
        if issuer == target.issuer:
            _check_target_entry(entry, conditions, at, target)
            own_type = entry["subject_token_type"] or default_type
            built.append(replace(target_rules, conditions=conditions, subject_token_type=own_type))
            continue
        if any(other.issuer == issuer for other in built):
            raise ConfigError(f"{at}.issuer", "is listed twice; only the target issuer may be")
        if conditions is not None:
            raise ConfigError(
                f"{at}.conditions",
                "only for the target issuer: tokens of another issuer are always exchanged",
            )
        built.append(
            _build_foreign(
                entry, notes, issuer=issuer, discovery_url=discovery_url, path=at, default_type=default_type
            )
        )
    _warn_of_near_duplicates(target, built, notes)
    return tuple(built), target_rules


def _merge_verification(entries: Sequence[tuple[str, Members]]) -> Members:
    """
    Merge what the target issuer's entries say about verification.

    A token is verified before conditions choose an entry, so what one entry states
    holds for all of them, and two entries cannot state different things.
    """
    merged: Members = dict.fromkeys(_VERIFICATION)
    for path, entry in entries:
        for name in _VERIFICATION:
            if entry[name] is None:
                continue
            if merged[name] is not None and not _states_the_same(merged[name], entry[name]):
                raise ConfigError(
                    f"{path}.{name}",
                    "differs between entries of the target issuer; a token is verified before one is chosen",
                )
            merged[name] = entry[name]
    return merged


def _states_the_same(one: object, other: object) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return set(one) == set(other)
    return one == other


def _build_entry(
    rules: Members,
    *,
    issuer: str,
    discovery_url: str | None,
    jwks_uri: str | None,
    verify_signature: bool,
    subject_token_type: str,
) -> SubjectTokenIssuer:
    return SubjectTokenIssuer(
        issuer=issuer,
        discovery_url=discovery_url,
        jwks_uri=jwks_uri,
        verify_signature=verify_signature,
        conditions=None,
        algorithms=tuple(rules["algorithms"] or ASYMMETRIC_ALGORITHMS),
        audience=tuple(rules["audience"] or ()),
        clients=tuple(rules["clients"] or ()),
        required_claims=tuple(rules["required_claims"] or ()),
        typ=tuple(rules["typ"] or ()),
        subject_token_type=subject_token_type,
        max_age=rules["max_age"],
    )


def _check_target_entry(
    entry: Members, conditions: Conditions | None, path: str, target: TargetIssuer
) -> None:
    """Check an entry for the target issuer, whose keys and verification are not the entry's to choose."""
    if conditions is None:
        raise ConfigError(
            f"{path}.conditions", "required for the target issuer: say which of its tokens are exchanged"
        )
    if entry["jwks_uri"] not in (None, target.jwks_uri):
        raise ConfigError(f"{path}.jwks_uri", "not for the target issuer: set jwks_endpoint")
    if entry["insecure_skip_subject_signature"]:
        raise ConfigError(
            f"{path}.insecure_skip_subject_signature", "tokens of the target issuer are always verified"
        )


def _build_foreign(
    entry: Members, notes: _Notes, *, issuer: str, discovery_url: str | None, path: str, default_type: str
) -> SubjectTokenIssuer:
    verify = _decide_verification(entry, path, notes)
    jwks_uri = entry["jwks_uri"]
    if jwks_uri is not None:
        _check_url(jwks_uri, f"{path}.jwks_uri", notes)
        discovery_url = None
    elif not verify:
        discovery_url = None
    elif discovery_url is None:
        raise ConfigError(f"{path}.issuer", "must be an http or https URL, except with jwks_uri")
    else:
        _check_url(discovery_url, f"{path}.issuer", notes)
    if not entry["audience"]:
        notes.find(
            "issuer",
            f"{path}.audience",
            "tokens meant for anybody are exchanged; name the audience that means this gateway",
        )
    return _build_entry(
        entry,
        issuer=issuer,
        discovery_url=discovery_url,
        jwks_uri=jwks_uri,
        verify_signature=verify,
        subject_token_type=entry["subject_token_type"] or default_type,
    )


def _decide_verification(entry: Members, path: str, notes: _Notes) -> bool:
    """Tell whether a foreign issuer's signatures are verified: only two switches turn it off."""
    confirmed = entry["insecure_skip_subject_signature"]
    if not entry["verify_signature"] and confirmed:
        notes.warn(f"{path}.verify_signature", "signatures are not verified: any caller can make up tokens")
        return False
    if not entry["verify_signature"]:
        notes.warn(
            f"{path}.verify_signature",
            "false has no effect without insecure_skip_subject_signature; signatures are verified",
        )
    elif confirmed:
        notes.warn(
            f"{path}.insecure_skip_subject_signature",
            "no effect without verify_signature: false; signatures are verified",
        )
    return True


def _build_conditions(members: Members, path: str) -> Conditions | None:
    """Build the conditions; none stated, or empty lists alone, are no conditions."""
    for name in ("has_scopes", "missing_scopes"):
        for index, scope in enumerate(members[name] or ()):
            _check_match(_SCOPE_TOKEN, scope, f"{path}.{name}[{index}]", "must be one scope")
    stated = {name: tuple(value) for name, value in members.items() if value}
    return Conditions(**stated) if stated else None


def _warn_of_near_duplicates(
    target: TargetIssuer, entries: Sequence[SubjectTokenIssuer], notes: _Notes
) -> None:
    """Warn where two issuers differ by case or a slash alone: one of them is likely a slip."""
    seen = {target.issuer.casefold().rstrip("/"): target.issuer}
    for index, entry in enumerate(entries):
        if seen.setdefault(entry.issuer.casefold().rstrip("/"), entry.issuer) != entry.issuer:
            notes.warn(
                f"token_exchange.subject_token_issuers[{index}].issuer",
                "differs from another issuer by letter case or a slash alone; issuers are compared exactly",
            )


# --- the request ----------------------------------------------------------------------


def _build_client(members: Members, notes: _Notes) -> ClientCredentials:
    ids, secrets = members["client_id"], members["client_secret"] or []
    file: str | None = members["client_secret_file"]
    methods = members["client_auth"] or []
    method = cast("ClientMethod", methods[0] if methods else "client_secret_basic")
    if len(methods) > len(ids):
        raise ConfigError("client_auth", "has more elements than client_id")
    if secrets and len(secrets) != len(ids):
        raise ConfigError("client_secret", "must have as many elements as client_id")
    if file is not None and not file.startswith("/"):
        raise ConfigError("client_secret_file", "must be an absolute path")
    if file is not None and secrets:
        raise ConfigError("client_secret_file", "stands instead of client_secret, not beside it")
    if method != "none" and not secrets and file is None:
        raise ConfigError("client_secret", f"required with {method}, or client_secret_file")
    if method == "none" and (secrets or file):
        notes.warn("client_secret" if secrets else "client_secret_file", "not used: client_auth is none")
    if len(ids) > 1:
        notes.warn("client_id", "only the first client is used")
    return ClientCredentials(
        client_id=ids[0],
        client_secret=None if method == "none" or not secrets else Secret(secrets[0]),
        client_secret_file=None if method == "none" else file,
        method=method,
    )


def _build_request(members: Members, exchange: Members) -> ExchangeParameters:
    request: Members = exchange["request"]
    grant_type, microsoft = exchange["grant_type"], exchange["provider"] == "microsoft"
    if microsoft and grant_type != "jwt_bearer":
        raise ConfigError("token_exchange.provider", "microsoft is for grant_type jwt_bearer")
    path = "token_exchange.request"
    _check_subject_token_type(exchange, request["subject_token_type"], f"{path}.subject_token_type")
    requested_type = request["requested_token_type"]
    if requested_type is not None:
        _check_uri(requested_type, f"{path}.requested_token_type")
        if requested_type == _REFRESH_TOKEN_TYPE:
            raise ConfigError(f"{path}.requested_token_type", "a refresh token must not go upstream")
    for index, resource in enumerate(request["resource"] or ()):
        _check_uri(resource, f"{path}.resource[{index}]")
    reserved = _RESERVED_PARAMETERS | ({_ON_BEHALF_OF[0]} if microsoft else set())
    parameters = _build_pairs(members, request, "post_args", _parameter_rule(reserved))
    return ExchangeParameters(
        grant_type=grant_type,
        audience=tuple(_choose(members, request, "audience")),
        resource=tuple(request["resource"] or ()),
        scopes=_build_scopes(members, request),
        requested_token_type=requested_type,
        subject_token_type=request["subject_token_type"] or TOKEN_TYPE_ACCESS_TOKEN,
        extra_parameters=(_ON_BEHALF_OF, *parameters) if microsoft else parameters,
        extra_headers=_build_pairs(members, request, "headers", _check_extra_header),
    )


_ACTOR_TOKEN = "token_exchange.request.actor_token"  # noqa: S105 - a path


def _build_actor(
    exchange: Members,
    credential: CredentialSources,
    trusted: Sequence[SubjectTokenIssuer],
    notes: _Notes,
) -> ActorPolicy:
    """Build where the acting party's token comes from and what it must be."""
    token, policy = exchange["request"]["actor_token"], exchange["actor"]
    source = token["source"]
    _check_uri(token["type"], f"{_ACTOR_TOKEN}.type")
    for name, used_with in (("header_name", "header"), ("static_token", "config")):
        if source == used_with and token[name] is None:
            raise ConfigError(f"{_ACTOR_TOKEN}.{name}", f"required with source {source}")
        if source != used_with and token[name] is not None:
            notes.warn(f"{_ACTOR_TOKEN}.{name}", f"not used: source is {source}")
    if source == "none":
        _check_no_actor(policy)
    elif exchange["grant_type"] == "jwt_bearer":
        raise ConfigError(f"{_ACTOR_TOKEN}.source", "not for grant_type jwt_bearer, which has no actor")
    if policy["required"] and exchange["result"]["validation"] == "none":
        raise ConfigError(
            "token_exchange.actor.required", "cannot be proven with token_exchange.result.validation none"
        )
    static = token["static_token"] if source == "config" else None
    verified = static is None or _is_verifiable(static, exchange, trusted)
    if not verified and (policy["enforce_may_act"] or policy["clients"]):
        rule = "enforce_may_act" if policy["enforce_may_act"] else "clients"
        raise ConfigError(
            f"token_exchange.actor.{rule}", "cannot be proven: the static_token is no JWT of a known issuer"
        )
    return ActorPolicy(
        source=source,
        header_name=_check_actor_header(token["header_name"], credential) if source == "header" else None,
        static_token=None if static is None else Secret(static),
        token_type=token["type"],
        verified=verified,
        required=policy["required"],
        enforce_may_act=policy["enforce_may_act"],
        max_chain_depth=policy["max_chain_depth"],
        clients=tuple(policy["clients"] or ()),
    )


def _check_no_actor(policy: Members) -> None:
    for name in ("required", "enforce_may_act", "clients"):
        if policy[name]:
            raise ConfigError(f"token_exchange.actor.{name}", f"needs {_ACTOR_TOKEN}.source header or config")


def _check_actor_header(name: str, credential: CredentialSources) -> str:
    path = f"{_ACTOR_TOKEN}.header_name"
    _check_header_name(name, path)
    if name.lower() in _RESERVED_HEADERS - {"authorization"}:
        raise ConfigError(path, "cannot be this header")
    if credential.header and name.lower() == (credential.header_name or "authorization").lower():
        raise ConfigError(path, "is the header of the subject token")
    return name


def _is_verifiable(token: str, exchange: Members, trusted: Sequence[SubjectTokenIssuer]) -> bool:
    """Tell whether a configured actor token is a JWT of an issuer whose keys are known."""
    path = f"{_ACTOR_TOKEN}.static_token"
    if _is_reference(token):
        return True
    if not is_b64token(token) or len(token) > exchange["max_token_size"]:
        raise ConfigError(path, "must be a token, not longer than token_exchange.max_token_size")
    try:
        issuer = parse_compact(token, max_bytes=exchange["max_token_size"]).payload.get("iss")
    except InvalidTokenError:
        return False
    return any(entry.issuer == issuer and entry.verify_signature for entry in trusted)


def _check_subject_token_type(exchange: Members, value: str | None, path: str) -> None:
    if value is None:
        return
    if exchange["grant_type"] == "jwt_bearer":
        raise ConfigError(path, "not for grant_type jwt_bearer, which has no such parameter")
    _check_uri(value, path)


def _check_uri(value: str, path: str) -> None:
    """Require an absolute URI without a fragment (RFC 8693 sections 2.1 and 3)."""
    if not _PRINTABLE_ASCII.fullmatch(value) or not _URI_SCHEME.match(value) or "#" in value:
        raise ConfigError(path, "must be an absolute URI without a fragment")


def _choose(members: Members, request: Members, name: str, *, top: str | None = None) -> list[str]:
    """Return what `request` says, or top level, or nothing where `empty_*` says so."""
    stem = name.removesuffix("_names").removesuffix("_values")
    if request[f"empty_{stem}"]:
        if request[name]:
            raise ConfigError(f"token_exchange.request.empty_{stem}", f"contradicts {name}")
        return []
    chosen: list[str] = request[name] or members[top or name] or []
    return chosen


def _build_scopes(members: Members, request: Members) -> tuple[str, ...]:
    path = "token_exchange.request.scopes" if request["scopes"] else "scopes"
    scopes: dict[str, None] = {}
    for index, element in enumerate(_choose(members, request, "scopes")):
        if _is_reference(element):
            scopes[element] = None
            continue
        for scope in element.split(" "):
            _check_match(_SCOPE_TOKEN, scope, f"{path}[{index}]", "must be scopes, one space between two")
            scopes[scope] = None
    return tuple(scopes)


def _build_pairs(
    members: Members, request: Members, name: str, check: Callable[[str, str, str, str], str]
) -> tuple[tuple[str, str], ...]:
    """
    Build the extra parameters or headers: those of `request`, else those at top level.

    *check* takes name, value and their paths, and returns the name by which
    duplicates are found. Both levels are checked, also the one that is overridden.
    """
    levels = [(f"token_{name}", members), (f"token_exchange.request.{name}", request)]
    for prefix, level in levels:
        stem = prefix.rpartition(".")[2]
        names, values = level[f"{stem}_names"] or [], level[f"{stem}_values"] or []
        if len(names) != len(values):
            raise ConfigError(f"{prefix}_values", f"must have as many elements as {stem}_names")
        seen: set[str] = set()
        for index, (key, value) in enumerate(zip(names, values, strict=True)):
            found = check(key, value, f"{prefix}_names[{index}]", f"{prefix}_values[{index}]")
            if found in seen:
                raise ConfigError(f"{prefix}_names[{index}]", "is listed twice")
            seen.add(found)
    names = _choose(members, request, f"{name}_names", top=f"token_{name}_names")
    values = _choose(members, request, f"{name}_values", top=f"token_{name}_values")
    return tuple(zip(names, values, strict=True))


def _parameter_rule(reserved: frozenset[str]) -> Callable[[str, str, str, str], str]:
    def check(name: str, _value: str, path: str, _value_path: str) -> str:
        if name.lower() in reserved:
            raise ConfigError(path, f"{name.lower()} is set by the exchange itself")
        return name

    return check


def _check_extra_header(name: str, value: str, path: str, value_path: str) -> str:
    _check_match(_TOKEN, name, path, "must be a header name")
    if name.lower() in _RESERVED_HEADERS:
        raise ConfigError(path, f"{name.lower()} is set by the exchange itself")
    _check_match(_HEADER_VALUE, value, value_path, "must be printable ASCII characters")
    return name.lower()


def _check_match(pattern: re.Pattern[str], value: str, path: str, message: str) -> None:
    if not pattern.fullmatch(value):
        raise ConfigError(path, message)


# --- the rest -------------------------------------------------------------------------


def _build_result(members: Members) -> ResultPolicy:
    path = "token_exchange.result"
    pairs, same_subject = members["same_subject_claims"], members["same_subject"]
    if pairs and same_subject:
        raise ConfigError(f"{path}.same_subject_claims", "cannot be combined with same_subject")
    for index, scope in enumerate(members["allowed_scopes"] or ()):
        _check_match(_SCOPE_TOKEN, scope, f"{path}.allowed_scopes[{index}]", "must be one scope")
    if members["validation"] == "none":
        unprovable = {"allowed_audience": members["allowed_audience"], "same_subject_claims": pairs}
        unprovable["same_subject"] = same_subject == "sub"
        for name, stated in unprovable.items():
            if stated:
                raise ConfigError(f"{path}.{name}", "cannot be proven with validation none")
    return ResultPolicy(
        validation=members["validation"],
        allowed_scopes=_build_limit(members["allowed_scopes"]),
        allowed_audience=_build_limit(members["allowed_audience"]),
        max_lifetime=members["max_lifetime"],
        narrowing=members["narrowing"],
        same_subject=tuple(ClaimPair(**pair) for pair in pairs) if pairs else same_subject,
    )


def _build_limit(values: list[str] | None) -> frozenset[str] | None:
    return None if values is None else frozenset(values)


def _build_breaker(exchange: Members) -> BreakerPolicy:
    breaker = exchange["breaker"]
    return BreakerPolicy(
        failures=breaker["failures"],
        open_for_s=breaker["open_for"] / 1000,
        # Nobody ever has a second where the whole request has less: such a deadline must count, too.
        fair_time_s=min(FAIR_TIME_S, exchange["deadline"] / 2000),
    )


def _build_cache(members: Members, cache: Members) -> CachePolicy:
    ttl = cache["ttl"] or int(members["cache_ttl"])
    if members["cache_ttl_max"] is not None:
        ttl = min(ttl, int(members["cache_ttl_max"]))
    ttl_neg = cache["ttl_neg"]
    if ttl_neg is None:
        ttl_neg = members["cache_ttl_neg"]
    if ttl_neg is None:
        ttl_neg = DEFAULT_NEGATIVE_TTL_S
    return CachePolicy(
        enabled=cache["enabled"],
        ttl=ttl,
        ttl_neg=float(min(ttl_neg, MAX_NEGATIVE_TTL_S)),
        refresh_ahead=cache["refresh_ahead"],
    )


def _build_shared_cache(members: Members, cache: Members, notes: _Notes) -> SharedCachePolicy | None:
    """Build the second level; what is set for it is checked even while it is off."""
    redis = _build_redis(members["cluster_cache_redis"], notes)
    seal_keys = _build_seal_keys(cache["seal_keys"] or [])
    items = members["cluster_cache_items"]
    if members["cluster_cache_strategy"] == "off" or not items:
        return None
    if "tokens" not in items:
        raise ConfigError("cluster_cache_items", "must list tokens: nothing else can be shared yet")
    if not seal_keys:
        raise ConfigError(
            "token_exchange.cache.seal_keys",
            "required with cluster_cache_strategy redis: seals what is shared",
        )
    if not cache["enabled"]:
        notes.warn("cluster_cache_strategy", "not used: token_exchange.cache.enabled is false")
        return None
    _warn_of_open_redis(redis, notes)
    return SharedCachePolicy(redis=redis, seal_keys=seal_keys)


def _build_seal_keys(values: list[str]) -> tuple[Secret, ...]:
    path = "token_exchange.cache.seal_keys"
    if len(values) > MAX_SEAL_KEYS:
        raise ConfigError(path, f"must have at most {MAX_SEAL_KEYS} elements")
    for index, value in enumerate(values):
        if _is_reference(value):
            continue
        if len(value.encode("utf-8")) < MIN_SEAL_KEY_BYTES:
            raise ConfigError(f"{path}[{index}]", f"must have at least {MIN_SEAL_KEY_BYTES} bytes")
        if len(set(value)) < MIN_SEAL_KEY_VARIETY:
            raise ConfigError(f"{path}[{index}]", "must be made at random, such as by `openssl rand -hex 32`")
        if value in values[:index]:
            raise ConfigError(f"{path}[{index}]", "is listed twice")
    return tuple(Secret(value) for value in values)


def _build_redis(members: Members, notes: _Notes) -> RedisPolicy:
    path = "cluster_cache_redis"
    timeouts = {name: members[name] for name in ("connect_timeout", "send_timeout", "read_timeout")}
    for name, value in timeouts.items():
        if value < 1:
            raise ConfigError(f"{path}.{name}", "must be at least 1")
    for name in ("database", "cluster_max_redirections"):
        if members[name] < 0:
            raise ConfigError(f"{path}.{name}", "must not be negative")
    if members["username"] is not None and members["password"] is None:
        raise ConfigError(f"{path}.password", "required with username")
    if members["server_name"] is not None and not members["ssl"]:
        notes.warn(f"{path}.server_name", "not used: ssl is false")
    _check_redis_host(members["host"], f"{path}.host")
    return RedisPolicy(
        host=members["host"],
        port=members["port"],
        username=members["username"],
        password=_secret_or_none(members["password"]),
        database=members["database"],
        connect_timeout_s=timeouts["connect_timeout"] / 1000,
        read_timeout_s=max(timeouts["read_timeout"], timeouts["send_timeout"]) / 1000,
        timeout_s=max(timeouts.values()) / 1000,
        ssl=members["ssl"],
        ssl_verify=members["ssl_verify"],
        server_name=members["server_name"],
        pool_size=members["keepalive_pool_size"],
        sentinel_master=members["sentinel_master"],
        sentinels=_build_sentinels(members),
        sentinel_username=members["sentinel_username"],
        sentinel_password=_secret_or_none(members["sentinel_password"]),
        cluster_nodes=_build_cluster_nodes(members),
        cluster_max_redirections=members["cluster_max_redirections"],
    )


def _build_sentinels(members: Members) -> tuple[tuple[str, int], ...]:
    """Build the Sentinels' addresses; Kong, too, requires all three members or none."""
    path = "cluster_cache_redis"
    names = ("sentinel_master", "sentinel_nodes", "sentinel_role")
    stated = [name for name in names if members[name] is not None]
    for name in names:
        if stated and name not in stated:
            raise ConfigError(f"{path}.{name}", f"required with {stated[0]}")
    if stated and members["cluster_nodes"] is not None:
        raise ConfigError(f"{path}.cluster_nodes", "cannot be combined with Sentinel")
    nodes = members["sentinel_nodes"] or []
    for index, node in enumerate(nodes):
        _check_redis_host(node["host"], f"{path}.sentinel_nodes[{index}].host")
    return tuple((node["host"], node["port"]) for node in nodes)


def _build_cluster_nodes(members: Members) -> tuple[tuple[str, int], ...]:
    path = "cluster_cache_redis"
    nodes = members["cluster_nodes"] or []
    for index, node in enumerate(nodes):
        _check_redis_host(node["ip"], f"{path}.cluster_nodes[{index}].ip")
    if nodes and members["database"]:
        raise ConfigError(f"{path}.database", "must be 0: a cluster has no other")
    return tuple((node["ip"], node["port"]) for node in nodes)


def _check_redis_host(host: str, path: str) -> None:
    if not _is_reference(host):
        _check_match(_HOST, host, path, "must be a host name or an address")


def _secret_or_none(value: str | None) -> Secret | None:
    return None if value is None else Secret(value)


def _warn_of_open_redis(redis: RedisPolicy, notes: _Notes) -> None:
    path = "cluster_cache_redis"
    hosts = [host for host, _ in redis.cluster_nodes or redis.sentinels] or [redis.host]
    if redis.ssl and not redis.ssl_verify:
        notes.warn(f"{path}.ssl_verify", "the certificate of Redis is not verified")
    elif redis.password is not None and not redis.ssl and not all(map(_is_loopback, hosts)):
        notes.warn(f"{path}.ssl", "without TLS the password of Redis is readable on the network")


def _build_credential(members: Members, notes: _Notes) -> CredentialSources:
    methods = set(members["auth_methods"])
    if methods != {"bearer"} and methods != set(KONG_AUTH_METHODS):
        raise ConfigError("auth_methods", f"only bearer is supported; any other method is {NOT_YET}")
    sources = set(members["bearer_token_param_type"])
    if not sources:
        raise ConfigError("bearer_token_param_type", "must not be empty")
    cookie, header = members["bearer_token_cookie_name"], members["bearer_token_header_name"]
    if cookie is not None:
        _check_match(_TOKEN, cookie, "bearer_token_cookie_name", "must be a cookie name")
    elif "cookie" in sources:
        raise ConfigError("bearer_token_cookie_name", "required with bearer_token_param_type cookie")
    if header is not None:
        _check_header_name(header, "bearer_token_header_name")
        if header.lower() in _RESERVED_HEADERS - {"authorization"}:
            raise ConfigError("bearer_token_header_name", "cannot be this header")
    for name, source in (("bearer_token_cookie_name", "cookie"), ("bearer_token_header_name", "header")):
        if members[name] is not None and source not in sources:
            notes.warn(name, f"not used: bearer_token_param_type does not hold {source}")
    return CredentialSources(
        header="header" in sources,
        header_name=None if header is None or header.lower() == "authorization" else header,
        query="query" in sources,
        cookie_name=cookie if "cookie" in sources else None,
    )


def _check_header_name(name: str, path: str) -> None:
    # nginx and CGI-style upstreams take "-" and "_" for the same, so every spelling has to be cleared
    # from a request (OUT-02): two to the power of the hyphens.
    _check_match(_TOKEN, name, path, "must be a header name")
    if "_" in name or name.count("-") > MAX_HEADER_HYPHENS:
        raise ConfigError(path, f"must have no underscore and at most {MAX_HEADER_HYPHENS} hyphens")


def _build_upstream_header(value: str) -> UpstreamHeader:
    """Read `name:bearer` or `name`; other headers than a token's own cannot be overwritten."""
    path = "upstream_access_token_header"
    name, colon, scheme = value.partition(":")
    _check_match(_TOKEN, name, path, "must be a header name, or a header name and :bearer")
    _check_header_name(name, path)
    if name.lower() in _RESERVED_HEADERS - {"authorization"}:
        raise ConfigError(path, "cannot be this header")
    if not colon:
        return UpstreamHeader(name=name, scheme="")
    if scheme.lower() != "bearer":
        raise ConfigError(path, "must be a header name, or a header name and :bearer")
    return UpstreamHeader(name=name, scheme="bearer")


def _build_possession(members: Members, facts: Members) -> PossessionPolicy:
    path, dpop = "token_exchange.proof_of_possession", members["proof_of_possession_dpop"]
    if facts["origins"] and dpop == "off":
        raise ConfigError(f"{path}.origins", "only with proof_of_possession_dpop")
    if dpop != "off":
        _check_dpop_places(members)
    return PossessionPolicy(
        dpop=dpop,
        mtls=members["proof_of_possession_mtls"],
        proof_lifetime_s=float(members["dpop_proof_lifetime"]),
        origins=frozenset(
            _parse_origin(origin, f"{path}.origins[{index}]")
            for index, origin in enumerate(facts["origins"] or ())
        ),
    )


def _check_dpop_places(members: Members) -> None:
    """Require that the scheme `DPoP` can be offered and that its proof does not meet our own header."""
    header = members["bearer_token_header_name"]
    if "header" not in members["bearer_token_param_type"]:
        raise ConfigError("proof_of_possession_dpop", "needs bearer_token_param_type header")
    if header is not None and header.lower() != "authorization":
        raise ConfigError(
            "proof_of_possession_dpop", "needs the token in Authorization (RFC 9449 section 7.1)"
        )
    if members["upstream_access_token_header"].partition(":")[0].lower() == "dpop":
        raise ConfigError(
            "upstream_access_token_header", "cannot be this header with proof_of_possession_dpop"
        )
    if (members["token_exchange"]["request"]["actor_token"]["header_name"] or "").lower() == "dpop":
        raise ConfigError(
            f"{_ACTOR_TOKEN}.header_name", "cannot be this header with proof_of_possession_dpop"
        )


def _build_certificate_header(members: Members, facts: Members) -> CertificateHeader | None:
    path, trusted = "token_exchange.proof_of_possession.trusted_ips", facts["trusted_ips"]
    record = members["proof_of_possession_mtls_from_header"]
    at = "proof_of_possession_mtls_from_header"
    if record["certificate_header_name"] is None:
        if record["certificate_header_format"] != "url_encoded":
            raise ConfigError(f"{at}.certificate_header_name", "required")
        if trusted:
            raise ConfigError(path, "only with proof_of_possession_mtls_from_header")
        return None
    if members["proof_of_possession_mtls"] == "off":
        raise ConfigError(at, "only with proof_of_possession_mtls")
    if not trusted:
        raise ConfigError(path, "required with proof_of_possession_mtls_from_header")
    name = record["certificate_header_name"].lower()
    at += ".certificate_header_name"
    _check_header_name(name, at)
    others = (
        members["bearer_token_header_name"],
        members["upstream_access_token_header"].partition(":")[0],
        members["token_exchange"]["request"]["actor_token"]["header_name"],
    )
    if name in _RESERVED_HEADERS | {"dpop"} or name in {other.lower() for other in others if other}:
        raise ConfigError(at, "cannot be this header")
    return CertificateHeader(
        name=name,
        form=record["certificate_header_format"],
        trusted=tuple(_parse_network(value, f"{path}[{index}]") for index, value in enumerate(trusted)),
    )


# What Kong's router and its normalised path leave as it is.
_PLAIN_PATH = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,;=:@\-]+)+")


def _build_resource_metadata(
    members: Members, source: CredentialSources, possession: PossessionPolicy
) -> ResourceMetadata | None:
    path, record = "protected_resource_metadata", members["protected_resource_metadata"]
    if not any(record.values()):
        return None
    for name in ("resource", "authorization_servers"):
        if not record[name]:
            raise ConfigError(f"{path}.{name}", "required")
    resource, servers = record["resource"], record["authorization_servers"]
    endpoint, allow_http = record["metadata_endpoint"], members["insecure_allow_http"]
    _check_published(resource, f"{path}.resource", allow_http=allow_http)
    for index, server in enumerate(servers):
        _check_published(server, f"{path}.authorization_servers[{index}]", allow_http=allow_http)
    for index, scope in enumerate(record["scopes_supported"] or ()):
        _check_match(_SCOPE_TOKEN, scope, f"{path}.scopes_supported[{index}]", "must be one scope")
    places = ("metadata_endpoint" if endpoint else "resource", "resource")
    for place, found in zip(places, metadata_paths(resource, endpoint), strict=True):
        # A document must not stand in the place of something else.
        if not _PLAIN_PATH.fullmatch(found) or {".", ".."} & set(found.split("/")):
            raise ConfigError(f"{path}.{place}", "must have a path of plain segments, without escapes")
    return build_metadata(
        resource=resource,
        endpoint=endpoint,
        authorization_servers=servers,
        scopes=record["scopes_supported"] or (),
        bearer_methods=[
            *(["header"] if source.header and source.header_name is None else []),
            *(["query"] if source.query else []),
        ],
        possession=possession,
        proof_algorithms=PROOF_ALGORITHMS,
    )


def _check_published(value: str, path: str, *, allow_http: bool) -> None:
    """Require an https URL that a quoted string can hold; http to loopback only, or where it is allowed."""
    parts = _split_url(value, path)
    if '"' in value or "?" in value:
        raise ConfigError(path, "must not have a query or quotes")
    if parts.scheme == "http" and not (_is_loopback(parts.hostname or "") or allow_http):
        raise ConfigError(path, "must be https: http is for loopback, else set insecure_allow_http")


def _parse_network(value: str, path: str) -> Network:
    try:
        network = ipaddress.ip_network(value)
    except ValueError:
        raise ConfigError(path, "must be an address or a network, such as 10.0.0.0/8") from None
    if network.prefixlen == 0:
        # A certificate is public: this is `secure_source: false` by another name.
        raise ConfigError(path, "trusts every address: any client could send a certificate")
    return network


def _parse_origin(value: str, path: str) -> str:
    found = normalise_uri(value)
    if found is None or found[1] != "/" or "?" in value or "#" in value:
        raise ConfigError(path, "must be an origin, such as https://api.example.com")
    return found[0]


def _build_alternatives(members: Members, name: str) -> tuple[frozenset[str], ...]:
    alternatives = tuple(frozenset(element.split()) for element in members[name] or ())
    for index, words in enumerate(alternatives):
        if not words:
            raise ConfigError(f"{name}[{index}]", "must not be blank")
    return alternatives


def _build_ca_file(members: Members) -> str | None:
    ca_file: str | None = members["ca_file"]
    if ca_file is not None and not ca_file.startswith("/"):
        raise ConfigError("ca_file", "must be an absolute path")
    return ca_file


def _build_flow(members: Members) -> Flow | None:
    if not any(members.values()):
        return None
    return Flow(**{**members, "review_by": _parse_day(members["review_by"], "token_exchange.flow.review_by")})


def _parse_day(value: str | None, path: str) -> date | None:
    if value is None:
        return None
    try:
        day = date.fromisoformat(value)
    except ValueError:
        day = None
    if day is None or not _DAY.fullmatch(value):  # Python also reads 20270630 and 2027-W26-3
        raise ConfigError(path, "must be a day, YYYY-MM-DD")
    return day


# --- what loads and should be known ---------------------------------------------------


def _warn_of_unsafe(config: PluginConfig, notes: _Notes) -> None:
    if not config.ssl_verify:
        notes.warn(
            "ssl_verify", "certificates are not verified: anybody on the way can read and forge answers"
        )


def _find_forwarding(config: PluginConfig, notes: _Notes) -> None:
    if not config.audience_required and not config.target_rules.audience:
        notes.find(
            "forwarding",
            "audience_required",
            "a token of the target issuer goes upstream whomever it is meant for; set audience_required,"
            " or audience in an entry for the target issuer",
        )


def _find_narrowing(config: PluginConfig, notes: _Notes) -> None:
    result, path = config.result, "token_exchange.result"
    limits = (result.allowed_scopes, result.allowed_audience, result.max_lifetime)
    downscoping = config.flow is not None and config.flow.kind == "downscoping"
    if result.narrowing != "enforce":
        notes.find("narrowing", f"{path}.narrowing", "a result beyond the limits is not refused")
    elif not downscoping and all(limit is None for limit in limits):
        notes.find(
            "narrowing",
            path,
            "nothing bounds the result; set allowed_scopes, allowed_audience or max_lifetime",
        )


def _find_subject(config: PluginConfig, notes: _Notes) -> None:
    same_subject, path = config.result.same_subject, "token_exchange.result.same_subject"
    foreign = any(entry.issuer != config.target.issuer for entry in config.issuers)
    if same_subject == "off":
        notes.find("subject", path, "the result may be another subject's")
    elif config.result.validation == "none":
        notes.find("subject", "token_exchange.result.validation", "none leaves the subject unproven")
    elif same_subject is None and foreign:
        notes.find(
            "subject",
            path,
            "across issuers the subject is unproven; set same_subject_claims, or same_subject",
        )


def _find_actor(config: PluginConfig, notes: _Notes) -> None:
    actor, path = config.actor, "token_exchange.actor"
    if actor.source == "none":
        return
    if not actor.required:
        # With strict refused like any limit that is not set: leaving the actor out is asking for more.
        notes.find(
            "narrowing",
            f"{path}.required",
            "a request without an actor, and a result that names none, are impersonation; both pass",
        )
    if not actor.verified:
        notes.find(
            "actor", f"{_ACTOR_TOKEN}.static_token", "is no JWT of a known issuer: it is sent without a proof"
        )
    elif not actor.enforce_may_act:
        notes.find(
            "actor", f"{path}.enforce_may_act", "who may act for whom is left to the token endpoint alone"
        )


def _find_result(config: PluginConfig, notes: _Notes) -> None:
    if config.result.validation != "full":
        notes.find(
            "result", "token_exchange.result.validation", "the signature of the result is not verified"
        )


def _find_credential(config: PluginConfig, notes: _Notes) -> None:
    if config.credential.query:
        notes.find("credential", "bearer_token_param_type", "a token in a query is written to access logs")
    if not config.hide_credentials:
        notes.find("credential", "hide_credentials", "the caller's own token may go upstream as well")


def _find_possession(config: PluginConfig, notes: _Notes) -> None:
    if config.possession.dpop != "off" and not config.possession.origins:
        notes.find(
            "credential",
            "token_exchange.proof_of_possession.origins",
            "the host that a proof is for is compared with what the caller says in Host; name the origins",
        )


def _find_time(config: PluginConfig, notes: _Notes) -> None:
    if config.leeway > _LEEWAY_WORTH_A_FINDING:
        notes.find("time", "leeway", "more than a minute lets expired tokens live on")
