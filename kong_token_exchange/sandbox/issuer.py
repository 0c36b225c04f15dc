"""
An issuer to try the plugin against, shaped like a Keycloak 26 realm.

`Issuer` is pure: it holds keys and a realm, mints tokens and answers token
requests as values. `IssuerServer` puts any number of issuers behind HTTP with a
request log and scriptable faults.

The realms `internal` and `partner` of `default_realms` are those that
docker/keycloak sets up in a real Keycloak: same names, same secrets, and, for
what the stories do, the same answers, refusals included. What is modelled is
Keycloak's standard token exchange (V2) and its JWT authorization grant.
There are no sessions, no refresh tokens and no consent.

What Keycloak does not have is off by default: with `delegation` an issuer reads `actor_token`,
honours `may_act` and names the actor in `act`, as RFC 8693 has it; without it, as Keycloak, it
ignores actor tokens without a word.

Source: RFC 8693; RFC 7523; RFC 6749 section 2.3.1; OpenID Connect Discovery 1.0;
Keycloak 26 (behaviour).
"""

from __future__ import annotations

import base64
import json
import secrets
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qsl, unquote_plus

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from kong_token_exchange.sandbox.serving import HttpServer, Request, Response, json_headers

TOKEN_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"
ID_TOKEN = "urn:ietf:params:oauth:token-type:id_token"

# The longest life a JWT authorization grant may have left or have had (Keycloak's default).
MAX_ASSERTION_LIFE_S = 300

# Where the stories' issuers say they are; the name is stable, the address is resolved.
DEFAULT_BASE_URL = "http://keycloak:8080"

Answer = tuple[int, dict[str, str], bytes]


# --- keys -----------------------------------------------------------------------------


@dataclass(frozen=True)
class SigningKey:
    """A private key with the id and the algorithm it signs with."""

    kid: str
    algorithm: str
    private_key: Any

    @classmethod
    def generate(cls, algorithm: str = "RS256") -> SigningKey:
        """Return a new key: RSA 2048, or an elliptic curve for ES256 and ES384."""
        kid = secrets.token_urlsafe(16)
        if algorithm == "ES256":
            return cls(kid, algorithm, ec.generate_private_key(ec.SECP256R1()))
        if algorithm == "ES384":
            return cls(kid, algorithm, ec.generate_private_key(ec.SECP384R1()))
        return cls(kid, algorithm, rsa.generate_private_key(public_exponent=65537, key_size=2048))

    def sign(self, message: bytes, algorithm: str | None = None) -> bytes:
        """Return the JWS signature of *message*, with another algorithm of the same key type if asked."""
        return jwt.get_algorithm_by_name(algorithm or self.algorithm).sign(message, self.private_key)

    def verify(self, token: str) -> bool:
        """Tell whether *token* is signed by this key with its own algorithm."""
        try:
            jwt.decode(
                token,
                self.private_key.public_key(),
                algorithms=[self.algorithm],
                options={
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                    "verify_aud": False,
                    "verify_sub": False,
                    "verify_jti": False,
                },
            )
        except jwt.PyJWTError:
            return False
        return True

    def jwk(self) -> dict[str, Any]:
        """Return the public key as a JWK with `use` and `alg`."""
        exported = jwt.get_algorithm_by_name(self.algorithm).to_jwk(
            self.private_key.public_key(), as_dict=True
        )
        exported = {name: value for name, value in exported.items() if name != "key_ops"}
        return {**exported, "kid": self.kid, "use": "sig", "alg": self.algorithm}


def encode_jws(
    header: Mapping[str, Any], claims: Mapping[str, Any], signature: Callable[[bytes], bytes]
) -> str:
    """Return a compact JWS of exactly *header* and *claims*; *signature* gets the signing input."""
    signing_input = b".".join(_base64url(json.dumps(part).encode()) for part in (header, claims))
    return (signing_input + b"." + _base64url(signature(signing_input))).decode("ascii")


def _base64url(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


# --- the realm ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClientScope:
    """A client scope: an audience it adds, claims it brings, whether `scope` names it."""

    audience: str | None = None
    claims: tuple[str, ...] = ()
    in_scope_claim: bool = True


@dataclass(frozen=True, kw_only=True)
class Client:
    """A client of a realm; one without secret is an audience and nothing more."""

    secret: str | None = None
    password_grant: bool = False
    token_exchange: bool = False
    assertion_issuers: tuple[str, ...] = ()
    default_scopes: tuple[str, ...] = ()
    optional_scopes: tuple[str, ...] = ()
    audience: tuple[str, ...] = ()
    token_life_s: int = 300


@dataclass(frozen=True, kw_only=True)
class User:
    """A user; *linked* names his `sub` at another issuer."""

    id: str
    password: str
    email: str
    linked: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Realm:
    """What an issuer knows: clients, scopes and users by name, and the key finder for foreign issuers."""

    clients: Mapping[str, Client]
    scopes: Mapping[str, ClientScope]
    users: Mapping[str, User]


_DEFAULT_SCOPES = ("basic", "profile", "email")
_OPTIONAL_SCOPES = ("add-client-2-as-audience", "orders", "reports", "inventory")

_SCOPES = {
    "basic": ClientScope(claims=("sub",), in_scope_claim=False),
    "profile": ClientScope(claims=("preferred_username",)),
    "email": ClientScope(claims=("email",)),
    "add-client-2-as-audience": ClientScope(audience="client-2"),
    "orders": ClientScope(audience="orders-api"),
    "reports": ClientScope(audience="reports-api"),
    "inventory": ClientScope(audience="inventory-api"),
}

_INTERNAL_ALEX = "0b5c7a52-8e0f-4f5e-9a36-1d6f6c1a0001"
_PARTNER_ALEX = "9c2d41e7-3b1a-4c68-b7d2-5e8a7b2f0002"


def internal_realm(partner_issuer: str) -> Realm:
    """Return the realm of the APIs: two applications, the gateway's client, three audiences."""
    application = Client(
        secret="client-1-secret",
        password_grant=True,
        default_scopes=_DEFAULT_SCOPES,
        optional_scopes=_OPTIONAL_SCOPES,
    )
    return Realm(
        clients={
            "client-1": application,
            "client-short": replace(application, secret="client-short-secret", token_life_s=2),
            "client-2": replace(
                application,
                secret="client-2-secret",
                password_grant=False,
                token_exchange=True,
                assertion_issuers=(partner_issuer,),
            ),
            "orders-api": Client(),
            "reports-api": Client(),
            "inventory-api": Client(),
        },
        scopes=_SCOPES,
        users={
            "alex": User(
                id=_INTERNAL_ALEX,
                password="doe",
                email="alex@internal.example",
                linked={partner_issuer: _PARTNER_ALEX},
            )
        },
    )


def partner_realm(internal_issuer: str) -> Realm:
    """Return the realm of another organisation: an application whose tokens are for *internal_issuer*."""
    return Realm(
        clients={
            "partner-app": Client(
                secret="partner-app-secret",
                password_grant=True,
                default_scopes=_DEFAULT_SCOPES,
                audience=(internal_issuer,),
            )
        },
        scopes=_SCOPES,
        users={"alex": User(id=_PARTNER_ALEX, password="doe", email="alex@partner.example")},
    )


# --- the issuer -----------------------------------------------------------------------


class TokenError(Exception):
    """A refusal of the token endpoint, as RFC 6749 section 5.2 renders it."""

    def __init__(self, error: str, description: str, status: int = 400) -> None:
        super().__init__(description)
        self.error, self.description, self.status = error, description, status


class Form:
    """A decoded form: names with all their values."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in pairs:
            self._values.setdefault(name, []).append(value)

    def get(self, name: str) -> str | None:
        """Return the first value of *name*, or None."""
        values = self._values.get(name)
        return values[0] if values else None

    def all(self, name: str) -> list[str]:
        """Return every value of *name*."""
        return self._values.get(name, [])

    def repeated(self) -> set[str]:
        """Return the names that occur more than once."""
        return {name for name, values in self._values.items() if len(values) > 1}


class Issuer:
    """
    One issuer: keys, a realm, tokens.

    Args:
        issuer: The issuer identifier, also the base of its endpoints.
        realm: Clients, scopes, users.
        now: The clock, seconds since the epoch.
        trusted: Issuers whose assertions this one accepts, if a client may present them.

    `delegation` says whether actor tokens are read.
    """

    def __init__(
        self,
        issuer: str,
        realm: Realm,
        *,
        now: Callable[[], float] = time.time,
        trusted: Mapping[str, Issuer] | None = None,
    ) -> None:
        self.issuer = issuer
        self.realm = realm
        self.trusted: dict[str, Issuer] = dict(trusted or {})
        self.keys: list[SigningKey] = [SigningKey.generate("RS256"), SigningKey.generate("ES256")]
        self.delegation = False
        self._now = now
        self._used_assertions: dict[str, float] = {}

    # -- keys and metadata

    def rotate(self, algorithm: str = "RS256", *, keep_old: bool = True) -> SigningKey:
        """Sign with a new key from now on; the old ones stay published unless told otherwise."""
        key = SigningKey.generate(algorithm)
        self.keys = [key, *(self.keys if keep_old else [])]
        return key

    def key(self, algorithm: str = "RS256") -> SigningKey:
        """Return the newest key of *algorithm*."""
        return next(key for key in self.keys if key.algorithm == algorithm)

    def jwks(self) -> dict[str, Any]:
        """Return the published key set."""
        return {"keys": [key.jwk() for key in self.keys]}

    def discovery(self) -> dict[str, Any]:
        """Return the discovery document."""
        base = f"{self.issuer}/protocol/openid-connect"
        return {
            "issuer": self.issuer,
            "authorization_endpoint": f"{base}/auth",
            "token_endpoint": f"{base}/token",
            "jwks_uri": f"{base}/certs",
            "grant_types_supported": ["password", TOKEN_EXCHANGE, JWT_BEARER],
            "response_types_supported": ["code"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": sorted({key.algorithm for key in self.keys}),
            "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post"],
        }

    # -- tokens

    def mint(
        self,
        *,
        client: str = "client-1",
        user: str = "alex",
        scopes: Sequence[str] = (),
        life_s: float | None = None,
        key: SigningKey | None = None,
        header: Mapping[str, Any] | None = None,
        without: Iterable[str] = (),
        signature: Callable[[bytes], bytes] | None = None,
        **claims: Any,
    ) -> str:
        """
        Return an access token, good unless changed.

        Args:
            client: For whom (`azp`); its default scopes are always granted.
            user: Whose token.
            scopes: Optional scopes to add.
            life_s: Seconds until `exp`; negative gives an expired token. Default: the client's.
            key: Signs instead of the newest RS256 key; a stranger's key makes a forgery.
            header: Members to add to the JOSE header or to replace in it.
            without: Claims to leave out.
            signature: Makes the signature from the signing input, whatever `alg` says.
            claims: Claims to add or to replace.
        """
        payload = self._claims(client, user, scopes, life_s)
        payload.update(claims)
        for name in without:
            payload.pop(name, None)
        signer = key or self.key()
        jose = {"alg": signer.algorithm, "typ": "JWT", "kid": signer.kid, **(header or {})}
        return encode_jws(jose, payload, signature or signer.sign)

    def _claims(
        self, client_id: str, user_name: str, scopes: Sequence[str], life_s: float | None
    ) -> dict[str, Any]:
        client, user = self.realm.clients[client_id], self.realm.users[user_name]
        granted = list(dict.fromkeys((*client.default_scopes, *scopes)))
        models = [(name, self.realm.scopes[name]) for name in granted]
        audience = [*client.audience, *(model.audience for _, model in models if model.audience)]
        audience = list(dict.fromkeys(audience))
        now = int(self._now())
        claims: dict[str, Any] = {
            "exp": now + (client.token_life_s if life_s is None else life_s),
            "iat": now,
            "jti": str(uuid.uuid4()),
            "iss": self.issuer,
            "aud": audience[0] if len(audience) == 1 else audience,
            "typ": "Bearer",
            "azp": client_id,
            "sid": str(uuid.uuid4()),
            "scope": " ".join(name for name, model in models if model.in_scope_claim),
        }
        if not audience:
            del claims["aud"]
        values = {"sub": user.id, "preferred_username": user_name, "email": user.email}
        for _, model in models:
            claims.update({name: values[name] for name in model.claims})
        return claims

    def verify(self, token: str) -> dict[str, Any] | None:
        """Return the claims of a token that this issuer signed and that is active now, else None."""
        try:
            header, claims = (
                jwt.get_unverified_header(token),
                jwt.decode(token, options={"verify_signature": False}),
            )
        except jwt.PyJWTError:
            return None
        signer = next((key for key in self.keys if key.kid == header.get("kid")), None)
        if signer is None or not signer.verify(token) or claims.get("iss") != self.issuer:
            return None
        expiry = claims.get("exp")
        active = (
            isinstance(expiry, int | float)
            and expiry > self._now()
            and claims.get("typ", "Bearer") == "Bearer"
        )
        return claims if active else None

    # -- the token endpoint

    def answer_token_request(self, form: bytes | str, headers: Mapping[str, str]) -> Answer:
        """
        Answer a POST to the token endpoint.

        Args:
            form: The body, `application/x-www-form-urlencoded`.
            headers: The request's headers, any case.

        Returns:
            Status, headers, body.
        """
        text = form.decode("utf-8", "replace") if isinstance(form, bytes) else form
        try:
            answer = self._grant(Form(parse_qsl(text, keep_blank_values=True)), headers)
        except TokenError as refusal:
            body = {"error": refusal.error, "error_description": refusal.description}
            return refusal.status, _token_headers(), json.dumps(body).encode()
        return 200, _token_headers(), json.dumps(answer).encode()

    def _grant(self, form: Form, headers: Mapping[str, str]) -> dict[str, Any]:
        grants = {
            "password": self._grant_password,
            TOKEN_EXCHANGE: self._grant_token_exchange,
            JWT_BEARER: self._grant_jwt_bearer,
        }
        grant_type = form.get("grant_type")
        if grant_type is None:
            raise TokenError("invalid_request", "Missing form parameter: grant_type")
        if grant_type not in grants:
            raise TokenError("unsupported_grant_type", "Unsupported grant_type")
        client_id = self._authenticate(form, headers)
        allowed = {"audience", "resource"} if grant_type == TOKEN_EXCHANGE else set()
        if form.repeated() - allowed:
            raise TokenError("invalid_request", "duplicated parameter")
        return grants[grant_type](client_id, form)

    def _authenticate(self, form: Form, headers: Mapping[str, str]) -> str:
        """Return the authenticated client's id; the form wins over Basic, as in Keycloak."""
        client_id, secret = _basic_credentials(headers)
        client_id, secret = form.get("client_id") or client_id, form.get("client_secret") or secret
        if client_id is None:
            raise TokenError("invalid_client", "Missing client_id parameter", 400)
        client = self.realm.clients.get(client_id)
        if client is None or client.secret is None:
            raise TokenError("invalid_client", "Invalid client or Invalid client credentials", 401)
        if secret is None or not secrets.compare_digest(secret.encode(), client.secret.encode()):
            # Keycloak says unauthorized_client where RFC 6749 has invalid_client.
            raise TokenError("unauthorized_client", "Invalid client or Invalid client credentials", 401)
        return client_id

    def _grant_password(self, client_id: str, form: Form) -> dict[str, Any]:
        if not self.realm.clients[client_id].password_grant:
            raise TokenError("unauthorized_client", "Client not allowed for direct access grants")
        scopes = self._requested_scopes(client_id, form)
        user_name = form.get("username") or ""
        user = self.realm.users.get(user_name)
        if user is None or form.get("password") != user.password:
            raise TokenError("invalid_grant", "Invalid user credentials", 401)
        return self._token_answer(client_id, user_name, scopes)

    def _grant_token_exchange(self, client_id: str, form: Form) -> dict[str, Any]:
        self._check_exchange_request(client_id, form)
        subject = self.verify(form.get("subject_token") or "")
        user_name = self._user_by_id(subject.get("sub")) if subject else None
        if subject is None or user_name is None:
            raise TokenError("invalid_request", "Invalid token")
        requested_type = form.get("requested_token_type") or ACCESS_TOKEN
        if requested_type != ACCESS_TOKEN:
            raise TokenError("invalid_request", "requested_token_type unsupported")
        if any(name not in self.realm.clients for name in form.all("audience")):
            raise TokenError("invalid_client", "Audience not found")
        if subject.get("azp") != client_id and client_id not in _as_list(subject.get("aud")):
            raise TokenError("access_denied", "Client is not within the token audience", 403)
        scopes = self._requested_scopes(client_id, form)
        act = self._actor(form, subject) if self.delegation else None
        answer = self._token_answer(client_id, user_name, scopes, only_audience=form.all("audience"), act=act)
        return {**answer, "issued_token_type": ACCESS_TOKEN}

    def _actor(self, form: Form, subject: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return `act` for the result: the actor, with the subject's earlier one inside (RFC 8693 4.1)."""
        token, token_type = form.get("actor_token"), form.get("actor_token_type")
        if token is None and token_type is None:
            return None
        if token is None or token_type != ACCESS_TOKEN:
            raise TokenError("invalid_request", "actor_token and actor_token_type belong together")
        actor = self.verify(token)
        if actor is None or not isinstance(actor.get("sub"), str):
            raise TokenError("invalid_request", "Invalid actor token")
        permitted = subject.get("may_act")
        if permitted is not None and not (
            isinstance(permitted, dict)
            and permitted
            and all(actor.get(name) == value for name, value in permitted.items())
        ):
            raise TokenError("access_denied", "The actor may not act for the subject", 403)
        act = {"iss": self.issuer, "sub": actor["sub"], "client_id": actor.get("azp")}
        return {**act, "act": subject["act"]} if "act" in subject else act

    def _check_exchange_request(self, client_id: str, form: Form) -> None:
        for name in ("requested_subject", "requested_issuer", "subject_issuer"):
            if form.get(name) is not None:
                raise TokenError(
                    "invalid_request", f"Parameter '{name}' is not supported for standard token exchange"
                )
        if not self.realm.clients[client_id].token_exchange:
            raise TokenError(
                "invalid_request", "Standard token exchange is not enabled for the requested client"
            )
        for name in ("subject_token", "subject_token_type"):
            if form.get(name) is None:
                raise TokenError(
                    "invalid_request", f"Parameter '{name}' required for standard token exchange"
                )
        if form.get("subject_token_type") != ACCESS_TOKEN:
            raise TokenError("invalid_request", "Parameter 'subject_token' supports access tokens only")

    def _grant_jwt_bearer(self, client_id: str, form: Form) -> dict[str, Any]:
        assertion = form.get("assertion")
        if assertion is None:
            raise TokenError("invalid_grant", "Missing parameter:assertion")
        claims = _unverified_claims(assertion)
        client = self.realm.clients[client_id]
        if not client.assertion_issuers:
            raise TokenError(
                "invalid_grant", "JWT Authorization Grant is not supported for the requested client"
            )
        for name in ("iss", "sub"):
            if claims.get(name) is None:
                raise TokenError("invalid_grant", f"Missing claim: {name}")
        issuer = self.trusted.get(str(claims["iss"]))
        if issuer is None:
            raise TokenError("invalid_grant", "No Identity Provider for provided issuer")
        if issuer.issuer not in client.assertion_issuers:
            raise TokenError("invalid_grant", "Identity Provider is not allowed for the client")
        self._check_assertion_times(claims)
        self._use_assertion(claims)
        self._check_assertion_signature(assertion, issuer)
        user_name = self._user_by_link(issuer.issuer, str(claims["sub"]))
        if user_name is None:
            raise TokenError("invalid_grant", "User not found")
        scopes = self._requested_scopes(client_id, form)
        self._check_assertion_audience(claims)
        return self._token_answer(client_id, user_name, scopes)

    def _check_assertion_times(self, claims: Mapping[str, Any]) -> None:
        now, expiry, issued = self._now(), claims.get("exp"), claims.get("iat")
        if not isinstance(expiry, int | float):
            raise TokenError("invalid_grant", "Token exp claim is required")
        if expiry <= now:
            raise TokenError("invalid_grant", "Token is not active")
        if not isinstance(issued, int | float):
            if expiry - now > MAX_ASSERTION_LIFE_S:
                raise TokenError(
                    "invalid_grant",
                    "Token expiration is too far in the future and iat claim not present in token",
                )
        elif issued > now:
            raise TokenError("invalid_grant", "Token was issued in the future")
        elif now > issued + MAX_ASSERTION_LIFE_S:
            raise TokenError("invalid_grant", "Token was issued too far in the past to be used now")

    def _use_assertion(self, claims: Mapping[str, Any]) -> None:
        """Refuse an assertion that was presented before; a presented one counts even if refused later."""
        token_id, now = claims.get("jti"), self._now()
        if not isinstance(token_id, str):
            raise TokenError("invalid_grant", "Token jti claim is required")
        self._used_assertions = {jti: until for jti, until in self._used_assertions.items() if until > now}
        if token_id in self._used_assertions:
            raise TokenError("invalid_grant", "Token reuse detected")
        self._used_assertions[token_id] = min(float(claims["exp"]), now + MAX_ASSERTION_LIFE_S)

    def _check_assertion_signature(self, assertion: str, issuer: Issuer) -> None:
        header = jwt.get_unverified_header(assertion)
        if header.get("alg") != "RS256":
            raise TokenError("invalid_grant", "Invalid signature algorithm")
        signer = next((key for key in issuer.keys if key.kid == header.get("kid")), None)
        if signer is None or not signer.verify(assertion):
            raise TokenError("invalid_grant", "Invalid signature")

    def _check_assertion_audience(self, claims: Mapping[str, Any]) -> None:
        audience = _as_list(claims.get("aud"))
        if not {self.issuer, self.discovery()["token_endpoint"]} & set(audience):
            raise TokenError("invalid_grant", "Invalid token audience")
        if len(audience) > 1:
            raise TokenError("invalid_grant", "Multiple audiences not allowed")

    def _requested_scopes(self, client_id: str, form: Form) -> list[str]:
        client, text = self.realm.clients[client_id], form.get("scope") or ""
        known = {*client.default_scopes, *client.optional_scopes, "openid"}
        scopes = text.split()
        if any(name not in known for name in scopes):
            raise TokenError("invalid_scope", f"Invalid scopes: {text}")
        return [name for name in scopes if name != "openid"]

    def _token_answer(
        self,
        client_id: str,
        user_name: str,
        scopes: Sequence[str],
        only_audience: Sequence[str] = (),
        act: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        client = self.realm.clients[client_id]
        claims = self._claims(client_id, user_name, scopes, None)
        if act:
            claims["act"] = act
        if only_audience:
            # The audience parameter filters; it never adds.
            missing = [name for name in only_audience if name not in _as_list(claims.get("aud"))]
            if missing:
                raise TokenError("invalid_request", f"Requested audience not available: {', '.join(missing)}")
            claims["aud"] = only_audience[0] if len(only_audience) == 1 else list(only_audience)
        signer = self.key()
        token = encode_jws({"alg": signer.algorithm, "typ": "JWT", "kid": signer.kid}, claims, signer.sign)
        return {
            "access_token": token,
            "expires_in": client.token_life_s,
            "refresh_expires_in": 0,
            "token_type": "Bearer",
            "not-before-policy": 0,
            "session_state": claims["sid"],
            "scope": claims["scope"],
        }

    def _user_by_id(self, user_id: object) -> str | None:
        return next((name for name, user in self.realm.users.items() if user.id == user_id), None)

    def _user_by_link(self, issuer: str, subject: str) -> str | None:
        return next(
            (name for name, user in self.realm.users.items() if user.linked.get(issuer) == subject), None
        )


def _token_headers() -> dict[str, str]:
    return {"Content-Type": "application/json", "Cache-Control": "no-store", "Pragma": "no-cache"}


def _basic_credentials(headers: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Read client_secret_basic; both parts are form-encoded inside (RFC 6749 section 2.3.1)."""
    value = next((text for name, text in headers.items() if name.lower() == "authorization"), "")
    scheme, _, credentials = value.partition(" ")
    if scheme.lower() != "basic":
        return None, None
    try:
        user, separator, password = (
            base64.b64decode(credentials.strip(), validate=True).decode().partition(":")
        )
    except ValueError:
        return None, None
    return (unquote_plus(user), unquote_plus(password)) if separator else (None, None)


def _unverified_claims(token: str) -> dict[str, Any]:
    try:
        claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    except jwt.PyJWTError:
        raise TokenError("invalid_grant", "The provided assertion is not a valid JWT") from None
    return claims


def _as_list(audience: object) -> list[str]:
    if isinstance(audience, str):
        return [audience]
    return [name for name in audience if isinstance(name, str)] if isinstance(audience, list) else []


def default_realms(
    base_url: str = DEFAULT_BASE_URL, *, now: Callable[[], float] = time.time
) -> dict[str, Issuer]:
    """Return the issuers of the stories, `internal` and `partner`; internal accepts assertions of partner."""
    internal_name, partner_name = f"{base_url}/realms/internal", f"{base_url}/realms/partner"
    partner = Issuer(partner_name, partner_realm(internal_name), now=now)
    internal = Issuer(internal_name, internal_realm(partner_name), now=now, trusted={partner_name: partner})
    return {"internal": internal, "partner": partner}


# --- HTTP -----------------------------------------------------------------------------


class IssuerServer(HttpServer):
    """
    Issuers behind HTTP, at `/realms/<name>/...`; a context manager.

    The issuers keep the names they were made with, whatever port this listens on:
    whoever asks must resolve `keycloak:8080` to `address`.
    `log` counts the hits per path; `set_fault(issuer_path(...), Fault(...))` breaks one endpoint.
    """

    def __init__(
        self, issuers: Mapping[str, Issuer] | None = None, *, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        self.issuers = dict(default_realms() if issuers is None else issuers)
        super().__init__(self._route, host=host, port=port, name="sandbox-issuer")

    def token_path(self, name: str) -> str:
        """Return the path of a realm's token endpoint."""
        return f"/realms/{name}/protocol/openid-connect/token"

    def jwks_path(self, name: str) -> str:
        """Return the path of a realm's key set."""
        return f"/realms/{name}/protocol/openid-connect/certs"

    def discovery_path(self, name: str) -> str:
        """Return the path of a realm's discovery document."""
        return f"/realms/{name}/.well-known/openid-configuration"

    def last_form(self, name: str) -> list[tuple[str, str]] | None:
        """Return the form of the newest token request of a realm, in order."""
        request = self.log.last(self.token_path(name))
        return request.form if request else None

    def _route(self, request: Request) -> Response:
        for name, issuer in self.issuers.items():
            if request.path == self.token_path(name):
                return self._answer_token(issuer, request)
            if request.path in (self.jwks_path(name), self.discovery_path(name)):
                document = issuer.jwks() if request.path == self.jwks_path(name) else issuer.discovery()
                return Response(
                    200, json_headers({"Cache-Control": "no-cache"}), json.dumps(document).encode()
                )
        return Response(404, json_headers(), b'{"error":"Realm does not exist"}')

    def _answer_token(self, issuer: Issuer, request: Request) -> Response:
        if request.method != "POST":
            return Response(405, json_headers(), b'{"error":"HTTP 405 Method Not Allowed"}')
        media_type = (request.header("content-type") or "").partition(";")[0].strip().lower()
        if media_type != "application/x-www-form-urlencoded":
            return Response(415, json_headers(), b'{"error":"HTTP 415 Unsupported Media Type"}')
        status, headers, body = issuer.answer_token_request(request.body, dict(request.headers))
        return Response(status, tuple(headers.items()), body)
