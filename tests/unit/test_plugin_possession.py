"""The plugin where possession is proven: what it asks Kong for, what it hands on, how it challenges."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest

from kong_token_exchange.core.dpop import PROOF_ALGORITHMS
from kong_token_exchange.core.possession import NO_EVIDENCE
from kong_token_exchange.errors import IssuerUnavailableError, ProofError, SignatureError
from kong_token_exchange.ports import NotInMemoryError
from tests.unit.protocol.test_certificate import DIGEST, PEM
from tests.unit.test_plugin import exchanged, forwarded, read_calls, refused, start

FACTS = {
    "connection": "", "header": "DPoP a.b.c", "query": "", "cookie": "", "method": "GET",
    "dpop": "p.r.o", "path": "/orders?x=1", "scheme": "https", "host": "api.test", "port": 8443,
    "authority": "API.test", "addressed": "api.test",
}  # fmt: skip
ALGS = " ".join(PROOF_ALGORITHMS)


def warm(instance: Any, **facts: Any) -> Any:
    values = {**FACTS, **facts}
    return instance.warm([values[kind] for kind in instance._kinds])


def ending(outcome: Any) -> Any:
    return read_calls(outcome)[-1][1]


def test_nothing_more_is_asked_where_nothing_is_to_be_proven() -> None:
    instance, _ = start()

    assert ["kong.nginx.get_var", "kong.request.get_header"] == [fetch.method for fetch in instance.prefetch]


def test_the_facts_of_a_proof_are_asked_for_at_once() -> None:
    instance, _ = start(proof_of_possession_dpop="optional")

    assert [
        ("kong.nginx.get_var", "http_connection"),
        ("kong.request.get_header", "authorization"),
        ("kong.nginx.get_var", "http_dpop"),
        ("kong.request.get_method", ""),
        ("kong.request.get_path_with_query", ""),
        ("kong.request.get_forwarded_scheme", ""),
        ("kong.request.get_forwarded_host", ""),
        ("kong.request.get_forwarded_port", ""),
        ("kong.nginx.get_var", "http_host"),
        ("kong.request.get_host", ""),
    ] == [(fetch.method, fetch.argument) for fetch in instance.prefetch]


def possession(**members: Any) -> dict[str, Any]:
    issuer = {"issuer": "https://idp.test", "conditions": {"has_audience": ["api"]}}
    return {
        "proof_of_possession_dpop": "optional",
        "token_exchange": {"subject_token_issuers": [issuer], "proof_of_possession": members},
    }


def test_configured_origins_are_not_asked_for() -> None:
    instance, flow = start(**possession(origins=["https://API.example.com", "http://localhost:8000"]))

    warm(instance, authority="evil.test", host="evil.test")

    assert 5 == len(instance.prefetch)
    assert {"https://api.example.com:443", "http://localhost:8000"} == flow.evidence[0].origins


def test_the_flow_gets_what_the_request_brought() -> None:
    instance, flow = start(proof_of_possession_dpop="optional")

    warm(instance)

    (evidence,) = flow.evidence
    assert (["a.b.c"], "dpop", "p.r.o", "GET", "/orders?x=1", {"https://api.test:443"}) == (
        flow.tokens,
        evidence.scheme,
        evidence.proof,
        evidence.method,
        evidence.path,
        evidence.origins,
    )


def test_a_bearer_token_brings_no_evidence() -> None:
    instance, flow = start(proof_of_possession_dpop="optional")

    warm(instance, header="Bearer a.b.c")

    assert [NO_EVIDENCE] == flow.evidence


def test_a_pool_thread_sees_the_same_evidence() -> None:
    def answer(deadline: float | None) -> Any:
        if deadline is None:
            raise NotInMemoryError
        return exchanged(cache="miss")

    instance, flow = start(answer, proof_of_possession_dpop="optional")
    values = {fetch: FACTS[kind] for fetch, kind in instance._readers}

    assert warm(instance) is None
    kong = FactsKong({(fetch.method, fetch.argument): value for fetch, value in values.items()})
    instance.access(kong)

    assert flow.evidence[0] == flow.evidence[1]
    assert ("kong.service.request.clear_header", "dpop") in kong.calls


def test_requests_with_a_proof_do_not_wait_for_one_another() -> None:
    assert start()[0].coalesce([]) is not None
    assert start(proof_of_possession_dpop="optional")[0].coalesce([]) is None
    assert start(**FROM_HEADER)[0].coalesce([]) is None


def test_the_same_request_is_judged_each_time() -> None:
    instance, flow = start(proof_of_possession_dpop="optional")

    for _ in range(3):
        warm(instance)

    assert (None, 3) == (instance._leases, len(flow.tokens))


@pytest.mark.parametrize("result", [exchanged, forwarded])
@pytest.mark.parametrize("header", ["DPoP a.b.c", "Bearer a.b.c"])
def test_the_proof_does_not_go_upstream(result: Any, header: str) -> None:
    instance, _ = start(result, proof_of_possession_dpop="optional", hide_credentials=False)

    calls = read_calls(warm(instance, header=header))

    assert ("kong.service.request.clear_header", "dpop") in calls
    sent = dict(argument for name, argument in calls if name == "kong.service.request.set_header")
    assert sent["authorization"].startswith("Bearer ")


def test_a_preflight_carries_no_proof_either() -> None:
    instance, _ = start(proof_of_possession_dpop="optional", run_on_preflight=False)

    calls = read_calls(warm(instance, method="OPTIONS"))

    assert {"authorization", "dpop"} == {
        name for method, name in calls if method == "kong.service.request.clear_header"
    }


def test_options_is_no_preflight_unless_configured() -> None:
    instance, flow = start(proof_of_possession_dpop="optional")

    warm(instance, method="OPTIONS")

    assert ["OPTIONS"] == [evidence.method for evidence in flow.evidence]


def test_the_scheme_dpop_is_none_of_ours_unless_configured() -> None:
    instance, flow = start()

    answer = ending(warm(instance))

    assert (401, 'Bearer realm="kong"', []) == (
        answer.status,
        answer.headers["WWW-Authenticate"],
        flow.tokens,
    )


@pytest.mark.parametrize("header", ["dpop  a.b.c", "DPOP a.b.c"])
def test_the_scheme_is_read_without_case(header: str) -> None:
    instance, flow = start(proof_of_possession_dpop="strict")

    warm(instance, header=header)

    assert ["a.b.c"] == flow.tokens


@pytest.mark.parametrize("header", ["DPoP", "DPoP ", "DPoP a b", "DPoP \x01", "DPoP a,b"])
def test_a_malformed_credential_is_a_bad_request(header: str) -> None:
    instance, flow = start(proof_of_possession_dpop="optional")

    assert (400, []) == (ending(warm(instance, header=header)).status, flow.tokens)


DESCRIBED = 'error_description="the DPoP proof is not acceptable"'
INVALID = 'error="invalid_token", error_description="the token is not acceptable"'

CHALLENGES: list[tuple[str, str, Exception | None, str]] = [
    ("optional", "", None, f'Bearer realm="kong", DPoP realm="kong", algs="{ALGS}"'),
    ("strict", "", None, f'DPoP realm="kong", algs="{ALGS}"'),
    (
        "optional",
        "DPoP a.b.c",
        ProofError(reason="dpop_replayed"),
        f'DPoP realm="kong", error="invalid_dpop_proof", {DESCRIBED}, algs="{ALGS}", Bearer realm="kong"',
    ),
    (
        "strict",
        "DPoP a.b.c",
        ProofError(reason="dpop_replayed"),
        f'DPoP realm="kong", error="invalid_dpop_proof", {DESCRIBED}, algs="{ALGS}"',
    ),
    (
        "optional",
        "Bearer a.b.c",
        SignatureError(reason="jwt_signature"),
        f'Bearer realm="kong", {INVALID}, DPoP realm="kong", algs="{ALGS}"',
    ),
    (
        "strict",
        "Bearer a.b.c",
        SignatureError(reason="jwt_signature"),
        f'DPoP realm="kong", {INVALID}, algs="{ALGS}"',
    ),
]


@pytest.mark.parametrize(("mode", "header", "error", "challenge"), CHALLENGES)
def test_a_refusal_asks_for_what_is_accepted(mode: str, header: str, error: Any, challenge: str) -> None:
    instance, _ = start(refused(error) if error else exchanged, proof_of_possession_dpop=mode)

    answer = ending(warm(instance, header=header))

    assert (401, challenge) == (answer.status, answer.headers["WWW-Authenticate"])


def test_what_cannot_be_told_is_no_fault_of_the_caller() -> None:
    error = IssuerUnavailableError(reason="dpop_memory_full")
    instance, _ = start(refused(error), proof_of_possession_dpop="strict")

    answer = ending(warm(instance))

    assert (503, "1") == (answer.status, answer.headers["Retry-After"])
    assert "WWW-Authenticate" not in answer.headers


class FactsKong:
    """A PDK object that knows its facts and keeps what was set."""

    def __init__(
        self, facts: dict[tuple[str, str], Any], path: str = "kong", calls: list[Any] | None = None
    ) -> None:
        self._facts = facts
        self._path = path
        self.calls: list[Any] = [] if calls is None else calls

    def __getattr__(self, name: str) -> FactsKong:
        if name == "received_at":
            raise AttributeError(name)
        return FactsKong(self._facts, f"{self._path}.{name}", self.calls)

    def __call__(self, *arguments: Any) -> Any:
        key = (self._path, *(arguments or ("",))[:1])
        if key in self._facts:
            return self._facts[key]
        self.calls.append((self._path, *arguments))
        return None


# --- certificates ---------------------------------------------------------------------

FROM_HEADER = {
    "proof_of_possession_mtls": "optional",
    "proof_of_possession_mtls_from_header": {"certificate_header_name": "X-Client-Cert"},
    "token_exchange": {
        "subject_token_issuers": [{"issuer": "https://idp.test", "conditions": {"has_audience": ["api"]}}],
        "proof_of_possession": {"trusted_ips": ["10.0.0.0/8"]},
    },
}
ESCAPED = quote(PEM, safe="")


def test_the_certificate_of_the_connection_is_asked_of_nginx() -> None:
    instance, flow = start(proof_of_possession_mtls="optional")

    warm(instance, header="Bearer a.b.c", certificate=ESCAPED)
    warm(instance, header="Bearer a.b.c", certificate="")

    assert ("kong.nginx.get_var", "ssl_client_escaped_cert") in [
        (fetch.method, fetch.argument) for fetch in instance.prefetch
    ]
    assert [DIGEST, None] == [evidence.x5t_s256 for evidence in flow.evidence]


HEADERS: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "trusted": ({"x-client-cert": ESCAPED}, "10.1.1.1", DIGEST),
    "CLM-32-untrusted": ({"x-client-cert": ESCAPED}, "192.0.2.1", None),
    "CLM-32-no-address": ({"x-client-cert": ESCAPED}, "", None),
    "CLM-32-other-spelling": ({"x_client_cert": ESCAPED}, "10.1.1.1", None),
    "CLM-32-twice": ({"x-client-cert": [ESCAPED, ESCAPED]}, "10.1.1.1", None),
    "absent": ({}, "10.1.1.1", None),
    "malformed": ({"x-client-cert": "x"}, "10.1.1.1", None),
}


@pytest.mark.parametrize(("headers", "peer", "digest"), HEADERS.values(), ids=HEADERS)
def test_a_certificate_in_a_header_is_believed_of_trusted_addresses(
    headers: dict[str, Any], peer: str, digest: str | None
) -> None:
    instance, flow = start(**FROM_HEADER)

    calls = read_calls(warm(instance, header="Bearer a.b.c", headers=headers, peer=peer))

    assert [digest] == [evidence.x5t_s256 for evidence in flow.evidence]
    cleared = {name for method, name in calls if method == "kong.service.request.clear_header"}
    assert {"x-client-cert", "x_client_cert", "x-client_cert", "x_client-cert"} <= cleared
    assert instance._leases is None


def test_a_pool_thread_sees_the_same_certificate() -> None:
    def answer(deadline: float | None) -> Any:
        if deadline is None:
            raise NotInMemoryError
        return exchanged(cache="miss")

    instance, flow = start(answer, **FROM_HEADER)
    facts = {"header": "Bearer a.b.c", "headers": {"x-client-cert": ESCAPED}, "peer": "10.1.1.1"}

    assert warm(instance, **facts) is None
    instance.access(
        FactsKong(
            {
                ("kong.request.get_header", "authorization"): "Bearer a.b.c",
                ("kong.request.get_headers", 1000): {"x-client-cert": ESCAPED},
                ("kong.client.get_ip", ""): "10.1.1.1",
            }
        )
    )

    assert [DIGEST, DIGEST] == [evidence.x5t_s256 for evidence in flow.evidence]


def test_both_proofs_at_once() -> None:
    instance, flow = start(**FROM_HEADER, proof_of_possession_dpop="optional")

    calls = read_calls(warm(instance, headers={"x-client-cert": ESCAPED}, peer="10.1.1.1"))

    assert ("dpop", "p.r.o", DIGEST) == (
        flow.evidence[0].scheme,
        flow.evidence[0].proof,
        flow.evidence[0].x5t_s256,
    )
    assert ("kong.service.request.clear_header", "dpop") in calls
    challenge = ending(warm(instance, header="", headers={}, peer="")).headers["WWW-Authenticate"]
    assert challenge.startswith('Bearer realm="kong", DPoP')
