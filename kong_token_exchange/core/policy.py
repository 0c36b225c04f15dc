"""
Policy as values: whom the configuration trusts, and what may come out.

`config` builds these from Kong's JSON; `decision`, `narrowing` and the flow read them.

Source: docs/configuration.md; Kong openid-connect 3.16 `token_exchange`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kong_token_exchange.core.jws import ASYMMETRIC_ALGORITHMS
from kong_token_exchange.secret import Secret

# Actors in one token: a caller, an agent, its tool, and one more; each exchange adds one.
MAX_ACTORS = 4

# RFC 8693 section 3.
TOKEN_TYPE_ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 - a name, no secret
TOKEN_TYPE_ID_TOKEN = "urn:ietf:params:oauth:token-type:id_token"  # noqa: S105 - a name, no secret


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """
    When a token of the target issuer is exchanged; an empty member says nothing.

    `has_*` holds when every listed value is present, `missing_*` when at least one is absent.
    """

    has_audience: tuple[str, ...] = ()
    missing_audience: tuple[str, ...] = ()
    has_scopes: tuple[str, ...] = ()
    missing_scopes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Tell whether any condition is set."""
        return bool(self.has_audience or self.missing_audience or self.has_scopes or self.missing_scopes)


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectTokenIssuer:
    """One issuer whose tokens are accepted, and how they are proven."""

    issuer: str
    discovery_url: str | None
    jwks_uri: str | None = None
    verify_signature: bool = True
    conditions: Conditions | None = None
    algorithms: tuple[str, ...] = ASYMMETRIC_ALGORITHMS
    audience: tuple[str, ...] = ()
    clients: tuple[str, ...] = ()
    required_claims: tuple[str, ...] = ()
    typ: tuple[str, ...] = ()
    subject_token_type: str = TOKEN_TYPE_ACCESS_TOKEN
    max_age: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimPair:
    """A claim of the subject token and the claim of the result that must equal it."""

    subject_claim: str
    result_claim: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultPolicy:
    """
    What an exchanged token must be.

    `same_subject` is None where the configuration says nothing: `sub` within one issuer,
    nothing across issuers.
    """

    validation: Literal["full", "claims", "none"] = "full"
    allowed_scopes: frozenset[str] | None = None
    allowed_audience: frozenset[str] | None = None
    max_lifetime: int | None = None
    narrowing: Literal["enforce", "audit", "off"] = "enforce"
    same_subject: Literal["sub", "off"] | tuple[ClaimPair, ...] | None = None


PossessionMode = Literal["off", "optional", "strict"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PossessionPolicy:
    """
    How a token's holder proves the key that the token is bound to; all off refuses every bound token.

    With `strict` each token is bound and proven so; with `optional` each that is bound so.
    `proof_lifetime_s` is how old a DPoP proof may be. `origins` are those that callers use, each
    `scheme://host:port` in lower case; empty for the one that Kong sees.
    """

    dpop: PossessionMode = "off"
    mtls: PossessionMode = "off"
    proof_lifetime_s: float = 300.0
    origins: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        """Tell whether any proof is accepted."""
        return self.dpop != "off" or self.mtls != "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorPolicy:
    """
    Who may act for the subject, and where that party's token comes from.

    `verified` is False for a configured token that cannot be proven here: opaque, or of an issuer
    that is not configured. `clients` stands in place of that of the actor's issuer.
    """

    source: Literal["none", "header", "config"] = "none"
    header_name: str | None = None
    static_token: Secret | None = None
    token_type: str = TOKEN_TYPE_ACCESS_TOKEN
    verified: bool = True
    required: bool = False
    enforce_may_act: bool = False
    max_chain_depth: int = MAX_ACTORS
    clients: tuple[str, ...] = ()


# Seconds that a token endpoint may need; half of the deadline where that is less.
FAIR_TIME_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerPolicy:
    """
    When a token endpoint is left alone: after *failures* faults in a row (0: never), for *open_for_s*.

    Where it had less than *fair_time_s* to answer, it is not blamed for the deadline.
    """

    failures: int = 5
    open_for_s: float = 5.0
    fair_time_s: float = FAIR_TIME_S


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisPolicy:
    """
    Which Redis is used, and how it is reached.

    With `sentinels` the master named `sentinel_master` is asked of them; with `cluster_nodes` it is
    a cluster; else it is at `host` and `port`. `timeout_s` bounds one look-up as a whole, in seconds.
    """

    host: str
    port: int
    username: str | None
    password: Secret | None
    database: int
    connect_timeout_s: float
    read_timeout_s: float
    timeout_s: float
    ssl: bool
    ssl_verify: bool
    server_name: str | None
    pool_size: int
    sentinel_master: str | None = None
    sentinels: tuple[tuple[str, int], ...] = ()
    sentinel_username: str | None = None
    sentinel_password: Secret | None = None
    cluster_nodes: tuple[tuple[str, int], ...] = ()
    cluster_max_redirections: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedCachePolicy:
    """The second level: its Redis, and the secrets that seal entries; the first one writes."""

    redis: RedisPolicy
    seal_keys: tuple[Secret, ...]
