"""
The Kong plugin: reads the request through the PDK, runs the flow, answers.

One instance serves one plugin configuration. `warm` answers from memory on the plugin
server's loop; what needs the network comes back through `access` in a pool thread. Both end
in an `Answer`, which is encoded once and, for a cached token, kept with it.

Source: docs/architecture.md; Kong openid-connect (priority, phase and protocols).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal, cast

from kong_token_exchange import __version__
from kong_token_exchange.config import PluginConfig, load_config
from kong_token_exchange.core.dpop import PROOF_ALGORITHMS
from kong_token_exchange.core.possession import Evidence
from kong_token_exchange.core.target_uri import request_origin
from kong_token_exchange.errors import (
    ConfigError,
    ConfigurationInvalidError,
    DeadlineError,
    MalformedRequestError,
    RejectionError,
    TokenExchangeError,
)
from kong_token_exchange.flow import Flow, FlowResult
from kong_token_exchange.pluginserver.contract import (
    Calls,
    Facts,
    Fetch,
    Outcome,
    Patience,
    exit_with,
    proceed,
)
from kong_token_exchange.ports import Clock, NotInMemoryError
from kong_token_exchange.protocol.bearer import (
    Challenge,
    ErrorAnswer,
    parse_authorization,
    parse_token,
    render,
    select_credential,
)
from kong_token_exchange.protocol.certificate import certificate_digest, header_of
from kong_token_exchange.protocol.credentials import Removal, cookie_token, query_token
from kong_token_exchange.published import PublishedInstance
from kong_token_exchange.schema import MAX_DEADLINE_MS, NAME, plugin_schema

# Where openid-connect stands: after the plugins that shape the request, before rate limiting and ACLs.
PRIORITY = 1050

# An operator reads of a fault once a minute, not once a request.
ALARM_INTERVAL_S = 60.0

# The most that Kong gives (kong.request.get_headers).
_MOST_HEADERS = "1000"

# `Connection` as nearly every client sends it: it names no header, so nothing is to be judged.
_PLAIN_CONNECTIONS = frozenset({"", "keep-alive", "close", "Keep-Alive", "Close"})

_log = logging.getLogger("kong_token_exchange.plugin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How one request ends: it goes on with these changes, or it is refused."""

    set_headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    clear_headers: tuple[str, ...] = ()
    raw_query: str | None = field(default=None, repr=False)
    shared: Mapping[str, str] = field(default_factory=dict, repr=False)
    refusal: ErrorAnswer | None = None
    alarm: str | None = None
    error: TokenExchangeError | None = field(default=None, repr=False)

    def encode(self) -> Outcome:
        """Encode the answer for our own plugin server."""
        if self.refusal is not None and self.alarm is not None:
            refusal = self.refusal
            return exit_with(refusal.status, refusal.body, refusal.headers, Calls().log("err", self.alarm))
        if self.refusal is not None:
            return _encode_refusal(self.refusal)
        calls = Calls()
        for name in self.clear_headers:
            calls.clear_header(name)
        for name, value in self.set_headers:
            calls.set_header(name, value)
        if self.raw_query is not None:
            calls.set_raw_query(self.raw_query)
        if self.shared:
            calls.ctx_shared_set("token_exchange", self.shared)
        return proceed(calls)

    def apply(self, kong: Any) -> None:
        """Give the answer through a PDK object, ours or kong-pdk's; nothing runs after an exit."""
        if self.refusal is not None:
            if self.alarm is not None:
                kong.log.err(self.alarm)
            kong.response.exit(
                self.refusal.status, self.refusal.body.decode("ascii"), dict(self.refusal.headers)
            )
            return
        for name in self.clear_headers:
            kong.service.request.clear_header(name)
        for name, value in self.set_headers:
            kong.service.request.set_header(name, value)
        if self.raw_query is not None:
            kong.service.request.set_raw_query(self.raw_query)
        if self.shared:
            kong.ctx.shared.set("token_exchange", dict(self.shared))


class Alarms:
    """
    What an operator must see, in Kong's own error log: each reason once in a while.

    Kong takes the plugin server's output at level *info*, which its default log level hides; a
    line written through `kong.log.err` is not hidden.
    """

    def __init__(self, clock: Clock, *, through_kong: bool = True) -> None:
        self._clock = clock
        self._through_kong = through_kong
        self._silent_until: dict[str, float] = {}

    def text(self, error: TokenExchangeError) -> str | None:
        """Return the line for this error, or None when it is the caller's fault or was said a moment ago."""
        if isinstance(error, RejectionError):
            return None
        now = self._clock.monotonic()
        if now < self._silent_until.get(error.reason, float("-inf")):
            return None
        # Reasons are constants of the code, so this stays small.
        self._silent_until[error.reason] = now + ALARM_INTERVAL_S
        facts = " ".join(f"{name}={value}" for name, value in error.facts.items())
        text = f"token-exchange: {error.status} {error.reason} {facts}".rstrip()[:1024]
        if self._through_kong:
            return text
        _log.error("%s", text)
        return None


# Refusals are few constants, rendered once each (protocol.bearer); so are their encodings.
_refusals: dict[int, tuple[ErrorAnswer, Outcome]] = {}


def _encode_refusal(answer: ErrorAnswer) -> Outcome:
    known = _refusals.get(id(answer))
    if known is not None and known[0] is answer:
        return known[1]
    outcome = exit_with(answer.status, answer.body, answer.headers)
    if len(_refusals) < 1024:
        _refusals[id(answer)] = (answer, outcome)
    return outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class _Credential:
    """The subject token and how its place is emptied; with it the actor token, where one is looked for."""

    token: str = field(repr=False)
    actor_token: str | None = field(default=None, repr=False)
    removal: Removal = field(default_factory=Removal, repr=False)
    scheme: Literal["bearer", "dpop"] = "bearer"


# A request that ends, or one that goes on with a result in its credential's place.
Decided = Answer | tuple[_Credential, FlowResult]


class TokenExchangeInstance:
    """One configuration at work; implements `pluginserver.contract.PluginInstance`."""

    def __init__(self, config: PluginConfig, flow: Flow, clock: Clock) -> None:
        self._config = config
        self._flow = flow
        self._clock = clock
        # nginx adds the request line to each line of its error log: where tokens travel in the query,
        # an alarm of ours would put one there.
        self._alarms = Alarms(clock, through_kong=not config.credential.query)
        # The headers a client must not have stripped: Kong removes what `Connection` lists after
        # the plugins have run (GW-20).
        self._protected = frozenset({"authorization", config.upstream_header.name.lower()})
        # An actor token is for the exchange alone, and what proves possession for us: they go upstream
        # in no case.
        self._never_upstream = _evidence_headers(config)
        if config.actor.header_name is not None:
            self._never_upstream += (config.actor.header_name,)
        self._protected |= {name.lower() for name in self._never_upstream}
        if config.hide_credentials:
            # Where the credential has a header of its own, nobody has looked at this one: beside the
            # token that was judged, an upstream might believe it.
            self._never_upstream += ("authorization",)
        self._readers: list[tuple[Fetch, str]] = [
            (Fetch("kong.nginx.get_var", "http_connection"), "connection")
        ]
        source = config.credential
        if source.header:
            self._readers.append((_header_fetch(source.header_name), "header"))
        if source.query:
            self._readers.append((Fetch("kong.request.get_raw_query"), "query"))
        if source.cookie_name is not None:
            self._readers.append((Fetch("kong.nginx.get_var", "http_cookie"), "cookie"))
        if config.actor.header_name is not None:
            self._readers.append((_header_fetch(config.actor.header_name), "actor"))
        if not config.run_on_preflight:
            self._readers.append((Fetch("kong.request.get_method"), "method"))
        self._readers += _evidence_readers(config)
        self._challenges = _challenges(config)
        self._kinds = tuple(kind for _, kind in self._readers)
        # A query or a cookie header differs from request to request: keeping answers for it is waste.
        # With a proof, the very same request must not get the same answer.
        self._proves = bool(config.possession)
        repeats = {"query", "cookie"}.isdisjoint(self._kinds) and not self._proves
        self._leases = flow.leases() if repeats else None
        self._patience = Patience(config.deadline_ms / 1000, self._waited_too_long)

    @property
    def prefetch(self) -> Sequence[Fetch]:
        """The facts that every request needs."""
        return tuple(fetch for fetch, _ in self._readers)

    def warm(self, facts: Facts) -> Outcome | None:
        """Answer from memory, or None where the network is needed."""
        leases = self._leases
        if leases is None or facts[0] not in _PLAIN_CONNECTIONS:
            return self._judge(facts, None)
        # No fact of an answer that stands holds a NUL: tokens are b64token, `Connection` is plain.
        key = sha256("\0".join(facts).encode("utf-8", "surrogatepass")).digest()
        return leases.find(key) or self._judge(facts, key)

    def _judge(self, facts: Facts, key: bytes | None) -> Outcome | None:
        try:
            decided = self._decide(dict(zip(self._kinds, facts, strict=True)), deadline=None)
        except NotInMemoryError:
            return None
        if isinstance(decided, Answer):
            return decided.encode()
        outcome = self._encode_result(*decided)
        result = decided[1]
        terms = self._flow.terms(result) if key is not None else None
        if self._leases is not None and key is not None and terms is not None:
            self._leases.give(key, terms, outcome, self._flow.hit_counter(result))
        return outcome

    def access(self, kong: Any) -> None:
        """Answer with whatever it takes, within the configured deadline."""
        # Counted from the arrival: the wait for a thread is the caller's time, too.
        received_at, share = getattr(kong, "received_at", None), getattr(kong, "share", None)
        if not isinstance(received_at, float):
            # Under kong-pdk, which has a stand-in for every name.
            received_at, share = self._clock.monotonic(), None
        deadline = received_at + self._config.deadline_ms / 1000
        facts = {kind: _fetch(kong, fetch) for fetch, kind in self._readers}
        decided = self._decide(facts, deadline=deadline)
        if share is not None:
            self._share(share, facts, decided)
        answer = decided if isinstance(decided, Answer) else self._go_on(*decided)
        answer.apply(kong)

    def close(self) -> None:
        """Nothing of its own to let go of: caches and connections are shared."""

    # --- requests that come together --------------------------------------------------

    def coalesce(self, facts: Facts) -> Patience | None:  # noqa: ARG002 - the contract hands facts over
        """Let requests with the same facts wait for one of them: nothing else decides about them."""
        # A proof may be used once, so requests with the same one are not to be answered alike.
        return None if self._proves else self._patience

    def _share(
        self,
        share: Callable[[Callable[[], Outcome | None]], None],
        facts: Mapping[str, Any],
        decided: Decided,
    ) -> None:
        """Offer what was decided to those who wait; each is counted and audited like one that asked."""
        if not isinstance(decided, Answer):
            share(lambda: self._repeat_result(*decided))
        elif decided.error is not None and not isinstance(decided.error, DeadlineError):
            # A deadline is that of the one who had it: the others may have time left.
            error = decided.error
            share(lambda: self._refuse(facts, error))

    def _repeat_result(self, credential: _Credential, result: FlowResult) -> Outcome:
        """Answer as with a result that was exchanged for another request a moment ago."""
        try:
            repeated = self._flow.repeat(result)
        except TokenExchangeError as error:
            return self._refusal(error, credential.scheme).encode()
        return self._encode_result(credential, repeated)

    def _refuse(self, facts: Mapping[str, Any], error: TokenExchangeError) -> Outcome:
        """Refuse one more request for what refused another."""
        credential = _Credential(token="")
        with contextlib.suppress(TokenExchangeError):
            credential = self._credential(facts)
        self._flow.record_refusal(error, subject=self._flow.known_subject(credential.token))
        return self._refusal(error, credential.scheme).encode()

    def _waited_too_long(self, facts: Facts) -> Outcome:
        return self._refuse(
            dict(zip(self._kinds, facts, strict=True)), DeadlineError(reason="deadline_waiting")
        )

    # --- deciding ---------------------------------------------------------------------

    def _encode_result(self, credential: _Credential, result: FlowResult) -> Outcome:
        exchanged = result.exchanged
        if exchanged is None or credential.removal != Removal():
            return self._go_on(credential, result).encode()
        # What leaves for a cached token is the same each time: encoded at its first hit.
        if exchanged.rendered is None:
            exchanged.rendered = self._go_on(credential, result).encode()
        return cast("Outcome", exchanged.rendered)

    def _refusal(self, error: TokenExchangeError, scheme: Literal["bearer", "dpop"]) -> Answer:
        answer = render(error, self._challenges[scheme])
        return Answer(refusal=answer, alarm=self._alarms.text(error), error=error)

    def _decide(self, facts: Mapping[str, Any], *, deadline: float | None) -> Decided:
        if not self._config.run_on_preflight and facts["method"] == "OPTIONS":
            return self._preflight(facts)
        try:
            credential = self._credential(facts)
        except TokenExchangeError as error:
            self._flow.record_refusal(error)
            return Answer(refusal=render(error, self._challenges["bearer"]))
        try:
            result = self._run(credential, facts, deadline)
        except TokenExchangeError as error:
            return self._refusal(error, credential.scheme)
        return credential, result

    def _run(self, credential: _Credential, facts: Mapping[str, Any], deadline: float | None) -> FlowResult:
        if not self._proves:
            return self._flow.run(credential.token, deadline=deadline, actor_token=credential.actor_token)
        return self._flow.run(
            credential.token,
            deadline=deadline,
            actor_token=credential.actor_token,
            evidence=_evidence(self._config, credential.scheme, facts),
        )

    def _credential(self, facts: Mapping[str, Any]) -> _Credential:
        limit = self._config.max_token_size
        listed = {name.strip().lower() for name in facts["connection"].split(",")}
        if not self._protected.isdisjoint(listed):
            raise MalformedRequestError(reason="connection_names_credential")
        header = query = cookie = None
        removal = Removal()
        scheme: Literal["bearer", "dpop"] = "bearer"
        if "header" in facts:
            parse = parse_token if self._config.credential.header_name else parse_authorization
            header = parse(facts["header"], max_length=limit)
            if header is None and self._config.possession.dpop != "off":
                scheme = "dpop"
                header = parse_authorization(facts["header"], max_length=limit, scheme=scheme)
        if "query" in facts:
            query, removal = query_token(facts["query"], max_length=limit)
        if "cookie" in facts:
            cookie, cookie_removal = cookie_token(
                facts["cookie"], name=self._config.credential.cookie_name or "", max_length=limit
            )
            removal = removal if query is not None else cookie_removal
        token = select_credential((header, query, cookie))
        return _Credential(
            token=token,
            actor_token=self._actor_token(facts),
            removal=removal,
            scheme="bearer" if header is None else scheme,
        )

    def _actor_token(self, facts: Mapping[str, Any]) -> str | None:
        name = self._config.actor.header_name
        if name is None:
            return None
        parse = parse_authorization if name.lower() == "authorization" else parse_token
        try:
            return parse(facts["actor"], max_length=self._config.max_token_size)
        except MalformedRequestError as error:
            raise MalformedRequestError(reason="actor_" + error.reason) from None

    def _preflight(self, facts: Mapping[str, Any]) -> Answer:
        """Let a preflight pass without any credential (`run_on_preflight: false`)."""
        removals = [self._config.credential.header_name or "authorization", self._config.upstream_header.name]
        removals += self._never_upstream
        query = cookie = Removal()
        if "query" in facts:
            query = query_token(facts["query"], max_length=len(facts["query"]), strict=False)[1]
        if "cookie" in facts:
            cookie = cookie_token(
                facts["cookie"],
                name=self._config.credential.cookie_name or "",
                max_length=len(facts["cookie"]),
                strict=False,
            )[1]
        return Answer(
            clear_headers=_clear(*removals, *(("cookie",) if cookie.cookie == "" else ())),
            set_headers=(("cookie", cookie.cookie),) if cookie.cookie else (),
            raw_query=query.raw_query,
        )

    def _go_on(self, credential: _Credential, result: FlowResult) -> Answer:
        config = self._config
        exchanged = result.exchanged
        token = exchanged.token.reveal() if exchanged is not None else credential.token
        name = config.upstream_header.name
        value = f"Bearer {token}" if config.upstream_header.scheme else token
        # The caller's own token stays only where it is forwarded and the operator said so.
        hide = exchanged is not None or config.hide_credentials
        removal = credential.removal if hide else Removal()
        emptied = [config.credential.header_name or "authorization"] if hide else []
        emptied += self._never_upstream
        if removal.cookie == "":
            emptied.append("cookie")
        headers = ((name, value), ("cookie", removal.cookie)) if removal.cookie else ((name, value),)
        return Answer(
            set_headers=headers,
            clear_headers=tuple(other for other in _clear(*emptied, name) if other != name.lower()),
            raw_query=removal.raw_query,
            shared=_shared_facts(result),
        )


def _header_fetch(header_name: str | None) -> Fetch:
    if header_name is None or header_name.lower() == "authorization":
        # nginx itself refuses a request with two of these.
        return Fetch("kong.request.get_header", "authorization")
    # Two headers of another name are joined by a comma here, and so refused; get_header would give one.
    return Fetch("kong.nginx.get_var", "http_" + header_name.lower().replace("-", "_"))


def _challenges(config: PluginConfig) -> Mapping[str, Challenge]:
    """Return how a refusal asks for credentials, by the scheme that the request used."""
    dpop, algs = config.possession.dpop, " ".join(PROOF_ALGORITHMS)
    both: dict[str, tuple[str, ...]] = {"bearer": ("Bearer", "DPoP"), "dpop": ("DPoP", "Bearer")}
    offered = {"off": ("Bearer",), "strict": ("DPoP",)}
    published = config.resource_metadata
    return {
        used: Challenge(
            schemes=offered.get(dpop, order),
            algs=algs if dpop != "off" else "",
            resource_metadata=published.url if published is not None else "",
            scope=published.scope if published is not None else "",
        )
        for used, order in both.items()
    }


def _evidence_headers(config: PluginConfig) -> tuple[str, ...]:
    names = ("dpop",) if config.possession.dpop != "off" else ()
    return names if config.certificate_header is None else (*names, config.certificate_header.name)


def _evidence_readers(config: PluginConfig) -> list[tuple[Fetch, str]]:
    """Return the facts that prove possession; none where nothing is to be proven."""
    readers: list[tuple[Fetch, str]] = []
    if config.possession.dpop != "off":
        readers += [
            # Several headers are joined by a comma here, and so refused; get_header would give one.
            (Fetch("kong.nginx.get_var", "http_dpop"), "dpop"),
            (Fetch("kong.request.get_method"), "method"),
            (Fetch("kong.request.get_path_with_query"), "path"),
        ]
        if not config.possession.origins:
            readers += [
                (Fetch("kong.request.get_forwarded_scheme"), "scheme"),
                (Fetch("kong.request.get_forwarded_host"), "host"),
                (Fetch("kong.request.get_forwarded_port"), "port"),
                (Fetch("kong.nginx.get_var", "http_host"), "authority"),
                (Fetch("kong.request.get_host"), "addressed"),
            ]
    if config.certificate_header is not None:
        readers += [
            (Fetch("kong.request.get_headers", _MOST_HEADERS), "headers"),
            (Fetch("kong.client.get_ip"), "peer"),
        ]
    elif config.possession.mtls != "off":
        readers.append((Fetch("kong.nginx.get_var", "ssl_client_escaped_cert"), "certificate"))
    return readers


def _evidence(config: PluginConfig, scheme: Literal["bearer", "dpop"], facts: Mapping[str, Any]) -> Evidence:
    x5t_s256 = _certificate(config, facts)
    if scheme == "bearer":
        return Evidence(x5t_s256=x5t_s256)
    origins = config.possession.origins
    if not origins:
        origin = request_origin(
            scheme=facts["scheme"],
            host=facts["host"],
            port=str(facts["port"]),
            authority=facts["authority"],
            addressed=facts["addressed"],
        )
        origins = frozenset() if origin is None else frozenset({origin})
    return Evidence(
        scheme=scheme,
        proof=facts["dpop"],
        method=facts["method"],
        path=facts["path"],
        origins=origins,
        x5t_s256=x5t_s256,
    )


def _certificate(config: PluginConfig, facts: Mapping[str, Any]) -> str | None:
    """Return the digest of the client's certificate, None without one that is to be believed."""
    source = config.certificate_header
    if source is None:
        return certificate_digest(facts.get("certificate", ""), "url_encoded")
    if not source.believes(facts["peer"]):
        return None
    return certificate_digest(header_of(facts["headers"], source.name), source.form)


def _clear(*names: str) -> tuple[str, ...]:
    """Return the names to clear, each in every spelling that nginx or a CGI-style upstream takes for it."""
    spelled: dict[str, None] = {}
    for name in names:
        parts = name.lower().split("-")
        for joints in itertools.product("-_", repeat=len(parts) - 1):
            spelled["".join(itertools.chain(*zip(parts, (*joints, ""), strict=True)))] = None
    return tuple(spelled)


def _shared_facts(result: FlowResult) -> dict[str, str]:
    facts = {
        "decision": result.decision,
        "relation": result.relation,
        "subject_issuer": result.subject.iss,
        "subject": result.subject.sub,
    }
    if result.subject.client is not None:
        facts["client"] = result.subject.client
    if result.actor is not None:
        facts |= {"actor_issuer": result.actor.iss, "actor": result.actor.sub}
    return facts


def _fetch(kong: Any, fetch: Fetch) -> Any:
    """Call a getter by name; kong-pdk answers (data, err) in its Lua style and None for an absent text."""
    target = kong
    for part in fetch.method.split(".")[1:]:
        target = getattr(target, part)
    argument = int(fetch.argument) if fetch.argument.isdigit() else fetch.argument
    value = target(argument) if argument else target()
    if isinstance(value, tuple):
        value = value[0]
    if isinstance(value, Mapping):
        return value
    return "" if value is None else str(value)


# --- an invalid configuration ---------------------------------------------------------


class MisconfiguredInstance:
    """
    Stands for a configuration that does not load: the constant 500 to every event.

    Kong's Admin API has already answered 201 by the time an instance starts, and the protocol
    has no error reply, so the path of the mistake goes to the log, once a minute.
    """

    prefetch: Sequence[Fetch] = ()

    def __init__(self, error: ConfigError, clock: Clock) -> None:
        # A file that was missing may be there at the next start of the very same configuration.
        self.start_again = error.path == "ca_file"
        self._error = ConfigurationInvalidError(
            reason="config_invalid", facts={"path": error.path, "mistake": error.message}
        )
        self._alarms = Alarms(clock)
        _log.error("configuration invalid, every request is refused: %s", error)

    def warm(self, facts: Facts) -> Outcome:  # noqa: ARG002 - the contract hands facts to every instance
        """Refuse."""
        return self._answer().encode()

    def access(self, kong: Any) -> None:
        """Refuse."""
        self._answer().apply(kong)

    def close(self) -> None:
        """Nothing to let go of."""

    def _answer(self) -> Answer:
        return Answer(refusal=render(self._error), alarm=self._alarms.text(self._error))


class TokenExchangePlugin:
    """
    What Kong is told about the plugin, and how an instance starts.

    Args:
        make_flow: Builds the flow of one configuration over the shared shells.
        clock: Times deadlines and messages.
        max_deadline_ms: What the server allows an event; a configuration that asks for more is
            invalid, since the server would answer first.
    """

    name = NAME
    version = __version__
    priority = PRIORITY
    phases = ("access",)
    schema: Mapping[str, Any] = plugin_schema()

    def __init__(
        self,
        make_flow: Callable[[PluginConfig], Flow],
        clock: Clock,
        *,
        max_deadline_ms: int = MAX_DEADLINE_MS,
    ) -> None:
        self._make_flow = make_flow
        self._clock = clock
        self._max_deadline_ms = max_deadline_ms

    def start(
        self, config: Mapping[str, Any]
    ) -> TokenExchangeInstance | PublishedInstance | MisconfiguredInstance:
        """Start an instance; one whose configuration is invalid refuses every request."""
        try:
            loaded = self._load(config)
            flow = self._make_flow(loaded)
        except ConfigError as error:
            return MisconfiguredInstance(error, self._clock)
        for warning in loaded.warnings:
            _log.warning("%s", warning)
        for finding in loaded.findings:
            _log.info("finding: %s: %s", finding.path, finding.message)
        instance = TokenExchangeInstance(loaded, flow, self._clock)
        published = loaded.resource_metadata
        return instance if published is None else PublishedInstance(instance, published)

    def _load(self, config: Mapping[str, Any]) -> PluginConfig:
        loaded = load_config(config)
        if loaded.deadline_ms > self._max_deadline_ms:
            limit = f"the plugin server answers after {self._max_deadline_ms} ms; see `serve --deadline`"
            raise ConfigError("token_exchange.deadline", limit)
        return loaded
