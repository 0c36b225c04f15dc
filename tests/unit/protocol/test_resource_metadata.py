"""The document of a protected resource, member by member (RFC 9728 section 2)."""

import json
from typing import Any

import pytest

from kong_token_exchange.core.policy import PossessionPolicy
from kong_token_exchange.protocol.resource_metadata import ResourceMetadata, build_metadata, metadata_paths

WELL_KNOWN = "/.well-known/oauth-protected-resource"


def build(**changes: Any) -> ResourceMetadata:
    members: dict[str, Any] = {
        "resource": "https://api.test/orders", "endpoint": None, "authorization_servers": ["https://idp.test"],
        "scopes": (), "bearer_methods": ["header"], "possession": PossessionPolicy(),
        "proof_algorithms": ("ES256",),
    }  # fmt: skip
    return build_metadata(**{**members, **changes})


def test_the_least_document() -> None:
    metadata = build()

    assert json.loads(metadata.document) == {
        "resource": "https://api.test/orders",
        "authorization_servers": ["https://idp.test"],
        "bearer_methods_supported": ["header"],
    }
    assert (f"https://api.test/orders{WELL_KNOWN}", "") == (metadata.url, metadata.scope)


def test_scopes_and_proofs_are_told() -> None:
    metadata = build(scopes=("a", "b"), possession=PossessionPolicy(dpop="optional", mtls="strict"))

    document = json.loads(metadata.document)
    assert ["a", "b"] == document["scopes_supported"]
    assert (True, False, ["ES256"]) == (
        document["tls_client_certificate_bound_access_tokens"],
        document["dpop_bound_access_tokens_required"],
        document["dpop_signing_alg_values_supported"],
    )
    assert "a b" == metadata.scope
    strict = build(possession=PossessionPolicy(dpop="strict"))
    assert json.loads(strict.document)["dpop_bound_access_tokens_required"] is True


@pytest.mark.parametrize(
    ("resource", "endpoint", "paths"),
    [
        ("https://api.test/orders", None, (f"/orders{WELL_KNOWN}", f"{WELL_KNOWN}/orders")),
        ("https://api.test/a/b/", None, (f"/a/b{WELL_KNOWN}", f"{WELL_KNOWN}/a/b")),
        ("https://api.test", None, (WELL_KNOWN, WELL_KNOWN)),
        ("https://api.test/", None, (WELL_KNOWN, WELL_KNOWN)),
        ("https://api.test:8443/orders", "/orders/about", ("/orders/about", f"{WELL_KNOWN}/orders")),
    ],
)
def test_a_document_has_kongs_place_and_the_standards(
    resource: str, endpoint: str | None, paths: tuple[str, str]
) -> None:
    assert paths == metadata_paths(resource, endpoint)
    metadata = build(resource=resource, endpoint=endpoint)
    assert set(paths) == metadata.paths
    assert metadata.url.startswith(resource.partition("/orders")[0].rstrip("/").removesuffix("/a/b"))
    assert metadata.url.endswith(paths[0])
