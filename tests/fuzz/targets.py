"""
What is fuzzed: for each reader of outside bytes, its made-up input and what must hold of the outcome.

An attempt returns a word for what came of it; whatever it raises is a broken promise: an error
outside of our tree, something accepted that must not be.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from urllib.parse import unquote_to_bytes

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import strategies as st

from kong_token_exchange.core.claims import parse_claims
from kong_token_exchange.core.delegation import check_actors, is_actor, may_act
from kong_token_exchange.core.dpop import verify_proof
from kong_token_exchange.core.jwk import parse_jwk_set, select_verification_key
from kong_token_exchange.core.jws import ASYMMETRIC_ALGORITHMS, parse_compact, verify_signature
from kong_token_exchange.core.sealing import SealError, derive_seal_key, open_sealed, seal
from kong_token_exchange.core.target_uri import normalise_path, normalise_uri
from kong_token_exchange.errors import (
    GatewayError,
    InvalidTokenError,
    IssuerUnavailableError,
    MalformedRequestError,
    NonConformingResponseError,
    RejectionError,
    RemoteProtocolError,
)
from kong_token_exchange.pluginserver import wire
from kong_token_exchange.pluginserver.connection import Connection, State
from kong_token_exchange.protocol.bearer import is_b64token, parse_authorization, parse_token, render
from kong_token_exchange.protocol.certificate import certificate_digest
from kong_token_exchange.protocol.credentials import cookie_token, query_token
from kong_token_exchange.protocol.exchange import process_exchange_response
from kong_token_exchange.protocol.http_message import HttpResponse
from kong_token_exchange.protocol.metadata import is_acceptable_endpoint, process_metadata
from kong_token_exchange.protocol.shared_grant import process_shared_grant
from kong_token_exchange.secret import Secret
from tests.fuzz.mutants import Gate, mutants, unb64
from tests.support.fakes import token_document
from tests.support.minting import NOW, to_json
from tests.support.plugins import AUTHORIZATION, SCENARIO, Bench, Plugin
from tests.support.proofs import Holder
from tests.support.strategies import any_json, any_text, one_of_those_changed, spoilt
from tests.unit.core.pipeline import MAX_TOKEN, accept, issuer
from tests.unit.core.test_properties import any_key, judge

Attempt = Callable[[Any], str]


@dataclass(frozen=True)
class Target:
    name: str
    inputs: st.SearchStrategy[Any] = field(repr=False)
    attempt: Attempt = field(repr=False)


def told(error: RejectionError | GatewayError) -> str:
    """Return the reason of a refusal whose answer can be written, and holds constants alone."""
    answer = render(error)
    assert 400 <= answer.status < 600
    assert answer.body.isascii()
    return str(error.reason)


# --- the credential -------------------------------------------------------------------

SHORT = 40
header_values = st.one_of(
    any_text,
    any_text.map(lambda text: f"Bearer {text}"),
    st.binary(max_size=80).map(lambda data: data.decode("utf-8", "surrogateescape")),
    spoilt(b"Bearer abc.def.ghi").map(lambda data: data.decode("utf-8", "surrogateescape")),
    spoilt(b"a=1&access_token=abc.def.ghi&b=2").map(lambda data: data.decode("latin-1")),
    spoilt(b"a=1; session=abc.def.ghi; b=2").map(lambda data: data.decode("latin-1")),
)


def read_credential(value: str) -> str:
    outcome = "none"
    for read in (
        lambda: parse_authorization(value, max_length=SHORT),
        lambda: parse_token(value, max_length=SHORT),
        lambda: query_token(value, max_length=SHORT)[0],
        lambda: cookie_token(value, name="session", max_length=SHORT)[0],
    ):
        try:
            token = read()
        except MalformedRequestError as error:
            outcome = told(error)
            continue
        if token is not None:
            assert is_b64token(token)
            assert token.isascii()
            assert len(token) <= SHORT
            outcome = "a token"
    return outcome


# --- tokens ---------------------------------------------------------------------------

GOOD = {alg: issuer.mint(key=alg) for alg in ("RS256", "ES256", "EdDSA")}
# Headers of the same meaning that the issuer did sign are good tokens too, so nothing is crafted here.
unsigned = st.one_of(
    any_text,
    st.builds(lambda a, b, c: f"{a}.{b}.{c}", any_text, any_text, any_text),
    st.sampled_from(sorted(GOOD.values())).flatmap(
        lambda token: spoilt(token.encode()).map(lambda data: data.decode("utf-8", "surrogateescape"))
    ),
)


def refuse_token(text: str) -> str:
    if text in GOOD.values():
        return "a good one"
    try:
        accept(text)
    except InvalidTokenError as error:
        return told(error)
    raise AssertionError("accepted")


def judge_header(header: dict[str, Any]) -> str:
    try:
        accept(issuer.craft(to_json(header), to_json(issuer.claims()), key="ES256"))
    except InvalidTokenError as error:
        return told(error)
    return "accepted, as it was signed"


def judge_claims(payload: dict[str, Any]) -> str:
    token = issuer.craft(to_json(issuer.header("ES256")), to_json(payload), key="ES256")
    try:
        claims = accept(token)
    except RejectionError as error:
        return told(error)
    judge(claims)
    return "accepted, as it was signed"


CLAIM_NAMES = (
    "nbf",
    "scp",
    "client_id",
    "cid",
    "appid",
    "cnf",
    "typ",
    "token_use",
    "events",
    "act",
    "may_act",
)


_GATE: list[Gate] = []


def judge_mutants(seed: int) -> str:
    """Judge a handful of mutants of one seed by the real flow."""
    if not _GATE:
        _GATE.append(Gate())
    gate = _GATE[0]
    stream: Iterator[tuple[str, str]] = mutants(random.Random(seed), gate.goods)
    for _ in range(20):
        gate.judge(next(stream)[1])
    return "20 refused"


# --- actors, proofs and certificates --------------------------------------------------

any_act = st.recursive(
    st.one_of(any_json, one_of_those_changed({"iss": issuer.issuer, "sub": "agent", "client_id": "a"})),
    lambda inner: inner.map(lambda act: {"sub": "agent", "act": act}),
    max_leaves=4,
)


def judge_actors(members: tuple[Any, Any]) -> str:
    act, named = members
    try:
        subject = parse_claims(issuer.claims(act=act, may_act=named))
        actor = parse_claims(issuer.claims(sub="agent", azp="a"))
        outcome = f"{'may' if may_act(subject, actor) else 'may not'} act"
        is_actor(subject, actor)
        check_actors(subject, max_depth=3)
    except InvalidTokenError as error:
        return told(error)
    return outcome


HOLDER = Holder()
BOUND = issuer.mint(cnf=HOLDER.cnf)
PROOF = HOLDER.prove(BOUND)
proofs = st.one_of(
    any_text,
    spoilt(PROOF.encode()).map(lambda data: data.decode("latin-1")),
    st.builds(
        lambda header, claims: HOLDER.prove(BOUND, header=header, **claims),
        st.dictionaries(st.sampled_from(["typ", "alg", "jwk", "kid", "crit"]), any_json, max_size=2),
        st.dictionaries(
            st.sampled_from(["jti", "htm", "htu", "iat", "ath", "exp", "nbf"]), any_json, max_size=2
        ),
    ),
)


def judge_proof(text: str) -> str:
    try:
        proof = verify_proof(
            text,
            access_token=BOUND,
            jkt=HOLDER.jkt,
            method="GET",
            path="/orders",
            origins={"https://api.test:443"},
            now=float(NOW),
            lifetime=60.0,
        )
    except RejectionError as error:
        return told(error)
    assert NOW - 60 < proof.iat <= NOW + 5
    # Only what the holder signed comes this far; a proof that was changed has another signing input.
    signing_input, _, signature = text.rpartition(".")
    public: Any = HOLDER.private.public_key()
    public.verify(to_dss(signature), signing_input.encode(), ec.ECDSA(hashes.SHA256()))
    return "accepted, as it was signed"


def to_dss(signature: str) -> bytes:
    data = unb64(signature)
    return encode_dss_signature(int.from_bytes(data[:32], "big"), int.from_bytes(data[32:], "big"))


PEM = "-----BEGIN%20CERTIFICATE-----%0AMIIB%2B/==%0A-----END%20CERTIFICATE-----%0A"
certificates = st.one_of(
    any_text,
    spoilt(PEM.encode()).map(lambda data: data.decode("latin-1")),
    st.binary(max_size=60).map(lambda data: base64.b64encode(data).decode()),
    spoilt(base64.b64encode(unquote_to_bytes(PEM))).map(lambda data: data.decode("latin-1")),
)


def read_certificate(text: str) -> str:
    found = [certificate_digest(text, form) for form in ("url_encoded", "base64_encoded")]
    for digest in found:
        assert digest is None or (len(digest) == 43 and is_b64token(digest))
    return f"{len(found) - found.count(None)} of 2 forms"


uris = st.one_of(
    any_text,
    spoilt(b"https://api.test:443/orders/../%6frders/%2e%2E/a?x#y").map(lambda data: data.decode("latin-1")),
    st.builds(
        "{}://{}:{}{}".format,
        st.sampled_from(["http", "https", "HTTPS", "ftp"]),
        st.text("aA0.-[]:@", max_size=8),
        st.text("0123456789\u0663", max_size=7),
        st.text("/.%2eE~a;", max_size=12),
    ),
)


def read_uri(text: str) -> str:
    path = normalise_path(text)
    # Two spellings of one path must not take turns.
    assert normalise_path(path) == path or not text.startswith("/")
    found = normalise_uri(text)
    if found is None:
        return "no URI"
    assert normalise_uri("".join(found)) == found
    return "a URI"


# --- what issuers answer --------------------------------------------------------------

any_headers = st.dictionaries(
    st.sampled_from(["content-type", "retry-after", "location", "content-encoding", "www-authenticate"]),
    st.one_of(
        any_text, st.sampled_from(["application/json", "application/json; charset=utf-8", "text/html", "7"])
    ),
)
any_status = st.one_of(st.just(200), st.sampled_from([201, 204, 302, 400, 401, 403, 404, 429, 500, 503]))


def answers(good: dict[str, Any], *more: str) -> st.SearchStrategy[HttpResponse]:
    """Return answers around a good document: any status, any headers, any body."""
    bodies = st.one_of(
        one_of_those_changed(good, *more).map(to_json),
        spoilt(to_json(good)),
        any_json.map(to_json),
        st.binary(max_size=80),
    )
    headers = st.one_of(st.just({"content-type": "application/json"}), any_headers)
    return st.builds(HttpResponse, status=any_status, headers=headers, body=bodies)


ISSUER = "https://idp.test/realms/a"
METADATA_URL = f"{ISSUER}/.well-known/openid-configuration"
DOCUMENT = {"issuer": ISSUER, "jwks_uri": f"{ISSUER}/keys", "token_endpoint": f"{ISSUER}/token"}


def read_metadata(response: HttpResponse) -> str:
    try:
        found = process_metadata(response, issuer=ISSUER, url=METADATA_URL, allow_http=False)
    except IssuerUnavailableError as error:
        return told(error)
    assert found.issuer == ISSUER
    assert found.token_endpoint is None or found.token_endpoint.startswith("https://idp.test/")
    assert found.jwks_uri is None or is_acceptable_endpoint(found.jwks_uri, allow_http=False)
    return "believed"


def read_keys(body: bytes) -> str:
    try:
        jwks = parse_jwk_set(body)
    except IssuerUnavailableError as error:
        return told(error)
    return f"{'some' if jwks.keys else 'no'} keys"


def use_keys(members: list[Any]) -> str:
    good = issuer.keys["PS256"].jwk(kid="good")
    try:
        jwks = parse_jwk_set(to_json({"keys": [*members, good]}))
    except IssuerUnavailableError as error:
        return told(error)
    jws = parse_compact(GOOD["EdDSA"], max_bytes=MAX_TOKEN)
    for alg in ASYMMETRIC_ALGORITHMS:
        try:
            key = select_verification_key(jwks, alg=alg, kid=jws.kid)
            verify_signature(jws, key, algorithms=ASYMMETRIC_ALGORITHMS)
        except InvalidTokenError:
            continue
        assert key.kid == jws.kid
        return "verified with the issuer's own key"
    return "nothing fits"


SUBJECT = "aaa.bbb.ccc"
TOKEN = "ddd.eee.fff"
LONGEST = 100


def read_token_response(response: HttpResponse) -> str:
    for grant_type in ("token_exchange", "jwt_bearer"):
        try:
            found = process_exchange_response(
                response, grant_type=grant_type, subject_token=SUBJECT, max_token_size=LONGEST
            )
        except (RejectionError, GatewayError) as error:
            outcome = told(error)
            continue
        check_granted(found)
        outcome = "a token"
    return outcome


def check_granted(found: Any) -> None:
    token = found.access_token.reveal()
    assert is_b64token(token)
    assert token != SUBJECT
    assert len(token) <= LONGEST
    # One that was cut to a few characters stands in any text.
    assert len(token) < 8 or token not in repr(found)
    assert found.expires_in is None or 0 < found.expires_in < 2**31


def read_shared_grant(data: bytes) -> str:
    try:
        found, sent_at = process_shared_grant(
            data, grant_type="token_exchange", subject_token=SUBJECT, max_token_size=LONGEST
        )
    except NonConformingResponseError as error:
        return told(error)
    check_granted(found)
    assert 0 < sent_at < float("inf")
    return "a token"


SEAL_KEY = derive_seal_key(Secret("of the fuzz"))
PLAIN = b'{"access_token":"ddd.eee.fff"}'
SEALED = seal(PLAIN, entry=b"entry", key=SEAL_KEY, nonce=b"n" * 12)


def open_value(data: bytes) -> str:
    for entry in (b"entry", b"another"):
        try:
            plain = open_sealed(data, entry=entry, keys=[SEAL_KEY])
        except SealError as error:
            outcome = error.flaw
            continue
        assert (data, entry, plain) == (SEALED, b"entry", PLAIN)
        return "opened, unchanged"
    return outcome


SHARED = {**token_document(TOKEN), "sent_at": 1_800_000_000.5}


# --- the plugin socket ----------------------------------------------------------------


def conversation() -> tuple[bytes, ...]:
    """Return frames that Kong sends: commands, an event of a running instance, answers to it."""
    instance_id = Bench(Plugin()).start()
    calls = (
        wire.StartInstance(1, "test-plugin", b'{"a":1}'),
        wire.GetPluginNames(2),
        wire.GetPluginInfo(3, "test-plugin"),
        wire.GetInstanceStatus(4, instance_id),
        wire.HandleEvent(5, instance_id, "access"),
        wire.CloseInstance(6, 99),
    )
    sent = [wire.frame(wire.encode_call(call)) for call in calls]
    sent += [wire.frame(wire.encode_string("Bearer a.b.c")), wire.frame(b""), wire.frame(wire.encode_int(7))]
    return tuple(sent)


FRAMES = conversation()
# Commands, and an event with the answers to the two facts that its plugin asks for.
COMMANDS, EVENT, ANSWERS = (*FRAMES[:4], FRAMES[5]), FRAMES[4], FRAMES[6:]
turns = st.one_of(
    st.sampled_from(COMMANDS).map(lambda command: [command]),
    st.tuples(st.just(EVENT), st.sampled_from(ANSWERS), st.sampled_from(ANSWERS)).map(list),
)
# First what Kong does send, so that the rest meets a conversation in any of its states.
pieces = st.builds(
    lambda good, cut, odd, more: [*list(chain.from_iterable(good))[: cut or None], *odd, *more],
    st.lists(turns, max_size=4),
    st.integers(0, 6),
    st.lists(
        st.one_of(
            st.sampled_from(FRAMES).flatmap(spoilt),
            st.sampled_from(FRAMES).flatmap(lambda data: spoilt(data[4:])).map(wire.frame),
            st.binary(max_size=40).map(wire.frame),
            st.binary(max_size=12),
        ),
        max_size=2,
    ),
    st.lists(st.sampled_from(FRAMES), max_size=3),
)


def talk(sent: list[bytes]) -> str:
    """Feed a conversation to a connection; it may close, and must not raise nor send half a frame."""
    bench = Bench(Plugin(prefetch=(AUTHORIZATION, SCENARIO)))
    bench.start()
    connection: Connection = bench.connection()
    reader = wire.FrameReader()
    for piece in sent:
        reader.feed(connection.receive(piece))
        while reader.next_frame() is not None:
            pass
        assert 0 == reader.pending_bytes()
        if connection.state is State.DEAD:
            return "closed"
    return connection.state.name.lower()


DECODERS = (
    wire.decode_call,
    wire.decode_return,
    wire.decode_string,
    wire.decode_int,
    wire.decode_bool,
    wire.decode_number,
    wire.decode_byte_string,
    wire.decode_value,
    wire.decode_list,
    wire.decode_struct,
    wire.decode_kv,
    wire.decode_exit,
    wire.decode_raw_body,
    wire.decode_config,
)
payloads = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(FRAMES).flatmap(lambda data: spoilt(data[4:])),
    st.sampled_from(
        [
            wire.encode_exit(401, b"{}", {"a": "b"}),
            wire.encode_struct({"a": [1.5, None, {"b": "c"}]}),
            wire.encode_kv("a", ["b"]),
        ]
    ).flatmap(spoilt),
)


def decode(payload: bytes) -> str:
    refused = 0
    for read in DECODERS:
        try:
            read(payload)
        except RemoteProtocolError:
            refused += 1
    return "read by none" if refused == len(DECODERS) else "read by some"


# --- all of them ----------------------------------------------------------------------

TARGETS = (
    Target("credential", header_values, read_credential),
    Target("jws", unsigned, refuse_token),
    Target(
        "jws header", one_of_those_changed(issuer.header("ES256"), "crit", "jwk", "b64", "zip"), judge_header
    ),
    Target("claims", one_of_those_changed(issuer.claims(), *CLAIM_NAMES), judge_claims),
    Target("mutants", st.integers(0, 2**64), judge_mutants),
    Target("actors", st.tuples(any_act, st.one_of(any_act, any_json)), judge_actors),
    Target("proof", proofs, judge_proof),
    Target("certificate", certificates, read_certificate),
    Target("target uri", uris, read_uri),
    Target("metadata", answers(DOCUMENT, "introspection_endpoint"), read_metadata),
    Target(
        "key set",
        st.one_of(st.binary(max_size=80), any_json.map(to_json), spoilt(issuer.jwks("ES256"))),
        read_keys,
    ),
    Target("keys", st.lists(any_key, max_size=3), use_keys),
    Target("token response", answers(token_document(TOKEN), "error", "scope"), read_token_response),
    Target(
        "shared grant",
        st.one_of(one_of_those_changed(SHARED).map(to_json), spoilt(to_json(SHARED)), st.binary(max_size=60)),
        read_shared_grant,
    ),
    Target("sealed value", st.one_of(spoilt(SEALED), st.binary(max_size=80)), open_value),
    Target("frames", pieces, talk),
    Target("messages", payloads, decode),
)
