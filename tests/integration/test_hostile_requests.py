"""
What a caller can do to a request, through a gateway, judged by what the upstream received.

Names are those of docs/threats.md. Where nginx itself refuses, the sandbox must refuse alike; HTTP/2
is spoken by a real Kong alone.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kong_token_exchange.sandbox.issuer import Issuer, IssuerServer, SigningKey
from kong_token_exchange.sandbox.serving import Fault
from kong_token_exchange.sandbox.upstream import EchoUpstream
from tests.support.gateways import KongOnPath, SandboxBackend, kong_version
from tests.support.http2 import H2C, exchange_http2, header_block
from tests.support.stage import Stage, one_route, raw_request, raw_statuses

pytestmark = pytest.mark.integration

BARE = 'Bearer realm="kong"'


@pytest.fixture(params=["kong", "sandbox"], scope="module")
def started(request: pytest.FixtureRequest) -> Iterator[Stage]:
    """One start for the whole module: what is asked of it here changes no configuration."""
    if request.param == "kong" and kong_version() is None:
        pytest.skip("no real Kong: no `kong` on PATH")
    with IssuerServer() as issuers, EchoUpstream() as upstream:
        made = Stage(KongOnPath if request.param == "kong" else SandboxBackend, issuers, upstream)
        made.start(routes(real=request.param == "kong"))
        yield made
        made.gateway.stop()


@pytest.fixture
def stage(started: Stage) -> Stage:
    for server in (started.upstream, started.issuers):
        server.clear_faults()
        server.log.clear()
    return started


def routes(*, real: bool) -> dict[str, Any]:
    """
    Return `/orders` with the plugin and `/bare` without it.

    A real Kong has a gRPC route with it as well, and `/ordered` with others before and after it.
    """
    config = one_route()
    (service,) = config["services"]
    (route,) = service["routes"]
    found = [route, {"name": "bare", "paths": ["/bare"]}]
    if not real:
        return {**config, "services": [{**service, "routes": found}]}
    tell = 'kong.service.request.set_header("x-{}", kong.request.get_header("authorization"))'
    facts = 'kong.service.request.set_header("x-facts", kong.ctx.shared.token_exchange.decision)'
    others = [
        {"name": "pre-function", "config": {"access": [tell.format("before")]}},
        {"name": "post-function", "config": {"access": [tell.format("after"), facts]}},
    ]
    found.append({**route, "name": "ordered", "paths": ["/ordered"], "plugins": [*route["plugins"], *others]})
    calls = {
        **service,
        "name": "calls",
        "url": service["url"].replace("http://", "grpc://"),
        "routes": [
            {
                **route,
                "name": "calls",
                "protocols": ["grpc"],
                "paths": ["/orders.Orders"],
                "strip_path": False,
            }
        ],
    }
    return {**config, "services": [{**service, "routes": found}, calls]}


def bearer(token: str) -> bytes:
    return f"Authorization: Bearer {token}".encode()


def refused(stage: Stage, data: bytes, *statuses: int) -> None:
    """Require one of these answers, and that nothing has reached the upstream."""
    (status,) = raw_statuses(stage, data)
    assert status in statuses
    assert 0 == stage.upstream.hits


def passed(stage: Stage, data: bytes, token: str) -> None:
    """Require that the request passed with another token than the caller's."""
    before = stage.upstream.hits
    assert [200] == raw_statuses(stage, data)
    assert stage.upstream.hits == before + 1
    assert stage.forwarded() not in (None, token)


# --- the credential -------------------------------------------------------------------


# What stands in the header, `T` for a good token, and the status; 200 where it passes.
LINES: dict[str, tuple[bytes | None, int]] = {
    "HDR-01-absent": (None, 401),
    "HDR-02-empty": (b"", 401),
    "HDR-03-scheme-alone": (b"Bearer", 400),
    "HDR-04-lower-case": (b"bearer T", 200),
    "HDR-04-mixed-case": (b"bEARER T", 200),
    "HDR-05-two-spaces": (b"Bearer  T", 200),
    "HDR-06-tab": (b"Bearer\tT", 400),
    "HDR-07-trailing-tab": (b"Bearer T\t", 400),
    "HDR-09-comma": (b"Bearer T, Bearer T", 400),
    "HDR-09-parameter": (b'Bearer T, realm="x"', 400),
    "HDR-10-basic": (b"Basic YTpi", 401),
    "HDR-10-another-word": (b"Negotiate T", 401),
    "HDR-12-control": (b"Bearer T\x01", 400),
    "HDR-12-delete": (b"Bearer \x7fT", 400),
    "HDR-13-latin": (b"Bearer T\xe9", 400),
    "HDR-13-overlong-utf-8": (b"Bearer T\xc0\xaf", 400),
    "HDR-14-seven-kilobytes": (b"Bearer " + b"a" * 7000, 401),
    "HDR-14-nine-kilobytes": (b"Bearer " + b"a" * 9000, 400),
    "HDR-16-nul": (b"Bearer T\0", 400),
    "HDR-18-twice-bearer": (b"Bearer Bearer T", 400),
    "HDR-19-quotes": (b'Bearer "T"', 400),
    "HDR-19-percent": (b"Bearer T%20", 400),
    "HDR-20-braces": (b"Bearer {T}", 400),
    "HDR-21-carriage-return": (b"Bearer T\rX: y", 400),
    "HDR-25-no-scheme": (b"T", 401),
}


@pytest.mark.parametrize(("line", "status"), LINES.values(), ids=LINES.keys())
def test_a_credential_is_read_in_one_way(stage: Stage, line: bytes | None, status: int) -> None:
    token = stage.token()
    lines = [] if line is None else [b"Authorization: " + line.replace(b"T", token.encode())]

    assert [status] == raw_statuses(stage, raw_request(*lines))
    assert int(status == 200) == stage.upstream.hits
    assert stage.forwarded() != token


@pytest.mark.parametrize("second", ["the same", "another good one", "garbage", "Basic"])
def test_hdr_08_two_authorization_headers_are_a_bad_request(stage: Stage, second: str) -> None:
    token = stage.token()
    other = {
        "the same": bearer(token),
        "another good one": bearer(stage.token()),
        "garbage": bearer("garbage"),
        "Basic": b"Authorization: Basic YTpi",
    }[second]

    refused(stage, raw_request(bearer(token), other), 400)
    refused(stage, raw_request(other, b"X-Between: 1", bearer(token)), 400)
    passed(stage, raw_request(bearer(token)), token)


def test_hdr_15_folded_lines_and_spaces_before_the_colon_are_a_bad_request(stage: Stage) -> None:
    token = stage.token()

    refused(stage, raw_request(b"X-Before: a", b" " + bearer(token)), 400)
    refused(stage, raw_request(b"Authorization: Bearer", f" {token}".encode()), 400)
    refused(stage, raw_request(bearer(token), b"\tfolded"), 400)
    refused(stage, raw_request(bearer(token).replace(b":", b" :")), 400)
    refused(stage, raw_request(bearer(token).replace(b":", b"\t:")), 400)
    passed(stage, raw_request(bearer(token)), token)


def test_hdr_17_a_hundred_and_fifty_headers_do_not_hide_the_credential(stage: Stage) -> None:
    token = stage.token()
    others = [b"X-%d: %d" % (number, number) for number in range(150)]

    passed(stage, raw_request(*others, bearer(token)), token)
    passed(stage, raw_request(bearer(token), *others), token)
    assert [401] == raw_statuses(stage, raw_request(*others))
    # A header that the plugin must see is no less seen behind them.
    assert [400] == raw_statuses(stage, raw_request(bearer(token), *others, b"Connection: authorization"))
    assert 2 == stage.upstream.hits


@pytest.mark.parametrize(
    "name",
    [
        "Proxy-Authorization",
        "X-Forwarded-Authorization",
        "X_Authorization",
        "Authorization_",
        "_Authorization",
    ],
)
def test_hdr_18_hdr_22_look_alike_headers_are_no_credential(stage: Stage, name: str) -> None:

    answer = stage.get(headers={name: f"Bearer {stage.token()}"})

    assert (401, BARE) == (answer.status_code, answer.headers["WWW-Authenticate"])
    assert 0 == stage.upstream.hits


def test_hdr_24_a_credential_in_the_trailers_is_none(stage: Stage) -> None:
    token = stage.token()
    body = b"1\r\na\r\n0\r\n" + bearer(token) + b"\r\n\r\n"
    chunked = (b"Transfer-Encoding: chunked", b"Trailer: Authorization")

    refused(stage, raw_request(*chunked, method=b"POST", body=body), 401, 400)
    # Beside a good credential it changes nothing.
    other = bearer(stage.token()).replace(b"Bearer", b"bearer")
    raw_statuses(stage, raw_request(*chunked, other, method=b"POST", body=body))
    seen = stage.upstream.log.last()
    assert seen is None or token not in str(seen.headers)


HTTP2_ATTACKS = {
    "HDR-23-upper-case": [("Authorization", "Bearer {token}")],
    "HDR-23-line-break-in-a-name": [("x-a\r\nauthorization", "Bearer {token}")],
    "HDR-23-line-break-in-a-value": [("x-a", "1\r\nauthorization: Bearer {token}")],
    "HDR-23-nul-in-a-name": [("authorization\0", "Bearer {token}")],
    "HDR-23-colon-in-a-name": [("authorization:", "Bearer {token}")],
    "HDR-08-twice": [("authorization", "Bearer {token}"), ("authorization", "Bearer {token}")],
}


@pytest.mark.parametrize("attack", HTTP2_ATTACKS.values(), ids=HTTP2_ATTACKS.keys())
def test_names_and_values_that_http1_cannot_have_are_refused(
    stage: Stage, attack: list[tuple[str, str]]
) -> None:
    """Over HTTP/2 where there is a Kong; the sandbox lets no such connection through."""
    url = stage.gateway.http2_url
    token = stage.token()
    block = header_block("/orders", [(name, value.format(token=token)) for name, value in attack])

    if url is None:
        assert exchange_http2(stage.gateway.url, block) in (H2C.REFUSED, H2C.CLOSED)
        assert 0 == stage.upstream.hits
        return
    assert exchange_http2(url, block) in (400, 401, H2C.RESET, H2C.CLOSED)
    assert 0 == stage.upstream.hits
    good = header_block("/orders", [("authorization", f"Bearer {token}")])
    assert 200 == exchange_http2(url, good)
    assert stage.forwarded() not in (None, token)


# --- tokens ---------------------------------------------------------------------------


def public_secret(issuer: Issuer) -> bytes:
    return json.dumps(issuer.key().jwk(), separators=(",", ":")).encode()


Forge = Callable[[Issuer], dict[str, Any]]

FORGERIES: dict[str, Forge] = {
    "JWT-01-none": lambda _: {"header": {"alg": "none"}, "signature": lambda _: b""},
    "JWT-01-none-signed": lambda _: {"header": {"alg": "None"}},
    "JWT-03-public-key-as-secret": lambda issuer: {
        "header": {"alg": "HS256"},
        "signature": lambda data: hmac.digest(public_secret(issuer), data, "sha256"),
    },
    "JWT-04-other-algorithm": lambda _: {"header": {"alg": "RS512"}},
    "JWT-05-own-key": lambda _: {
        "key": (own := SigningKey.generate("RS256")),
        "header": {"jwk": own.jwk(), "kid": own.kid},
    },
    "JWT-06-jku": lambda _: {
        "key": SigningKey.generate("RS256"),
        "header": {"jku": "https://evil.test/keys"},
    },
    "JWT-07-kid-is-a-path": lambda _: {"header": {"kid": "../../../dev/null"}},
    "JWT-09-crit": lambda _: {"header": {"crit": ["exp"]}},
    "JWT-10-b64": lambda _: {"header": {"b64": False}},
    "JWT-11-logout": lambda _: {"header": {"typ": "logout+jwt"}},
    "JWT-12-nested": lambda _: {"header": {"cty": "JWT"}},
    "JWT-14-zip": lambda _: {"header": {"zip": "DEF"}},
    "JWT-29-empty-signature": lambda _: {"signature": lambda _: b""},
    "JWT-41-another-key": lambda issuer: {
        "key": SigningKey.generate("RS256"),
        "header": {"kid": issuer.key().kid},
    },
    "CLM-01-no-exp": lambda _: {"without": ["exp"]},
    "CLM-02-exp-is-text": lambda _: {"exp": "9999999999"},
    "CLM-03-iat-is-true": lambda _: {"iat": True},
    "CLM-08-expired": lambda _: {"life_s": -400},
    "CLM-09-not-yet": lambda _: {"nbf": 9_999_999_999},
    "CLM-12-no-issuer": lambda _: {"without": ["iss"]},
    "CLM-13-slash": lambda issuer: {"iss": issuer.issuer + "/"},
    "CLM-15-list": lambda issuer: {"iss": [issuer.issuer]},
    "CLM-21-no-subject": lambda _: {"without": ["sub"]},
    "CLM-22-line-break": lambda _: {"sub": "alex\r\nX-Admin: 1"},
    "CLM-26-id-token": lambda _: {"typ": "ID"},
    "CLM-26-refresh-token": lambda _: {"typ": "Refresh"},
    "CLM-27-bound-to-a-key": lambda _: {"cnf": {"x5t#S256": "A" * 43}},
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_token_that_is_not_good_ends_at_the_gateway(stage: Stage, forge: Forge) -> None:
    issuer = stage.issuers.issuers["internal"]

    answer = stage.get(token=stage.token(**forge(issuer)))

    assert (401, "invalid_token") == (answer.status_code, answer.json()["error"])
    assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]
    assert 0 == stage.upstream.hits
    # Nor is the issuer asked about it.
    assert 0 == stage.issuers.log.count(stage.issuers.token_path("internal"))


# --- paths, agents, connections -------------------------------------------------------

SPELLINGS = [
    b"/orders/../orders",
    b"/public/../orders",
    b"/orders/%2e%2e/orders",
    b"/%6frders",
    b"//orders",
    b"/orders//healthz",
    b"/orders;public",
    b"/orders/.well-known/openid-configuration",
    b"/orders?/public",
    b"/orders#/public",
    b"/orders%23/public",
    b"/orders/%00",
    b"http://gateway/orders",
]


@pytest.mark.parametrize("target", SPELLINGS, ids=[spelling.decode() for spelling in SPELLINGS])
def test_gw_18_no_spelling_of_the_path_goes_around_the_check(stage: Stage, target: bytes) -> None:
    token = stage.token()

    # 400 and 404 are the gateway's own: it did not take that for a path, or for this route.
    refused(stage, raw_request(target=target), 400, 401, 404)
    refused(stage, raw_request(bearer("garbage"), target=target), 400, 401, 404)
    refused(stage, raw_request(bearer(token[:-8] + "AAAAAAAA"), target=target), 400, 401, 404)
    # With a good one it is exchanged, or there is no such route: never forwarded as it came.
    (status,) = raw_statuses(stage, raw_request(bearer(token), target=target))
    assert (status, stage.upstream.hits) in ((200, 1), (404, 0), (400, 0))
    assert stage.forwarded() != token


EXCUSES: dict[str, dict[str, str]] = {
    "GW-22-kube-probe": {"User-Agent": "kube-probe/1.30"},
    "GW-22-load-balancer": {"User-Agent": "ELB-HealthChecker/2.0"},
    "GW-22-forwarded-uri": {"X-Forwarded-Uri": "/healthz"},
    "GW-22-original-url": {"X-Original-URL": "/public", "X-Rewrite-URL": "/public"},
    "GW-22-local": {"X-Forwarded-For": "127.0.0.1", "X-Real-IP": "127.0.0.1"},
    "GW-22-method": {"X-HTTP-Method-Override": "OPTIONS"},
    "GW-22-authenticated": {"X-Authenticated-Userid": "admin", "X-Consumer-Username": "admin"},
    "GW-22-latch": {"X-Token-Exchange": "done"},
}


@pytest.mark.parametrize("headers", EXCUSES.values(), ids=EXCUSES.keys())
def test_nothing_is_skipped_for_a_name(stage: Stage, headers: dict[str, str]) -> None:

    answers = [
        stage.get("/orders/healthz", headers=headers),
        stage.get("/orders", token="garbage", headers=headers),
        stage.get("/orders", token=stage.token(life_s=-400), headers=headers),
    ]

    assert [401, 401, 401] == [answer.status_code for answer in answers]
    assert 0 == stage.upstream.hits


def test_gw_19_requests_of_one_connection_are_judged_each(stage: Stage) -> None:
    token = stage.token()
    good, without, bad = raw_request(bearer(token)), raw_request(), raw_request(bearer("garbage"))

    assert [200, 401, 200, 401] == raw_statuses(stage, good + without + good + bad, 4)
    assert 2 == stage.upstream.hits


def test_out_04_two_lengths_of_one_body_are_a_bad_request(stage: Stage) -> None:
    token = stage.token()
    inner = raw_request(target=b"/orders/smuggled")
    chunked = b"Transfer-Encoding: chunked"

    for lines in (
        (b"Content-Length: 5", chunked),
        (chunked, b"Content-Length: 5"),
        (b"Content-Length: 5", b"Content-Length: 6"),
        (b"Transfer-Encoding: chunked, identity",),
        (b"Transfer-Encoding: xchunked",),
    ):
        request = raw_request(bearer(token), *lines, method=b"POST", body=b"0\r\n\r\n" + inner)
        refused(stage, request, 400, 501)


def test_gw_15_exc_29_plugins_before_see_the_callers_token_and_those_after_the_exchanged_one(
    stage: Stage,
) -> None:
    if stage.gateway.http2_url is None:
        pytest.skip("the sandbox runs one plugin")
    token = stage.token()

    answer = stage.get("/ordered", token=token)

    headers = {name.lower(): value for name, value in answer.json()["headers"]}
    assert f"Bearer {token}" == headers["x-before"]
    assert f"Bearer {stage.forwarded()}" == headers["x-after"] != headers["x-before"]
    assert "exchange" == headers["x-facts"]


# --- what leaves ----------------------------------------------------------------------


def test_out_06_a_copy_elsewhere_is_left_as_it_is(stage: Stage) -> None:
    token = stage.token()

    answer = stage.get(token=token, headers={"X-Forwarded-Access-Token": token})

    headers = {name.lower(): value for name, value in answer.json()["headers"]}
    assert token == headers["x-forwarded-access-token"]
    assert f"Bearer {token}" != headers["authorization"]


@pytest.mark.parametrize("good", [False, True])
def test_out_08_an_upgrade_is_judged_like_any_request(stage: Stage, good: bool) -> None:
    token = stage.token()
    upgrade = (
        b"Connection: Upgrade",
        b"Upgrade: websocket",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    )

    if good:
        passed(stage, raw_request(bearer(token), *upgrade), token)
    else:
        refused(stage, raw_request(*upgrade), 401)
        refused(stage, raw_request(bearer("garbage"), *upgrade), 401)


def test_out_09_a_grpc_call_gets_the_status_of_its_refusal(stage: Stage) -> None:
    url = stage.gateway.http2_url
    if url is None:
        pytest.skip("the sandbox speaks no HTTP/2, which gRPC needs")
    grpc = [("content-type", "application/grpc"), ("te", "trailers")]
    malformed = [*grpc, ("authorization", "Bearer a.b.c d")]

    assert 401 == exchange_http2(url, header_block("/orders.Orders/Get", grpc, method="POST"))
    assert 400 == exchange_http2(url, header_block("/orders.Orders/Get", malformed, method="POST"))
    assert 0 == stage.upstream.hits


def test_out_11_the_decision_waits_for_no_body(stage: Stage) -> None:
    large = (b"Content-Length: 1000000", b"Expect: 100-continue")

    # Not a byte of the body is ever sent.
    refused(stage, raw_request(*large, method=b"POST"), 401)
    refused(stage, raw_request(bearer("garbage"), *large, method=b"POST"), 401)


def test_out_18_the_upstreams_own_401_passes_and_nothing_is_repeated(stage: Stage) -> None:
    token = stage.token()
    stage.upstream.set_fault("/", Fault(status=401))

    answers = [stage.get(token=token).status_code for _ in range(3)]

    assert ([401, 401, 401], 3) == (answers, stage.upstream.hits)
    assert 1 == stage.issuers.log.count(stage.issuers.token_path("internal"))


def test_out_19_an_answer_of_the_upstream_gets_no_header_of_ours(stage: Stage) -> None:
    without = set(stage.get("/bare", token=stage.token()).headers)
    token = stage.token()

    for answer in (stage.get(token=token), stage.get(token=token)):
        assert 200 == answer.status_code
        assert set(answer.headers) == without
        assert "keycloak" not in str(answer.headers)
