"""
The document by which an API tells callers where its tokens come from.

Source: RFC 9728 sections 2 and 3; Kong openid-connect `protected_resource_metadata`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from kong_token_exchange.core.policy import PossessionPolicy

WELL_KNOWN = "/.well-known/oauth-protected-resource"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceMetadata:
    """
    What is published: *document* at each of *paths*, and *url* in every challenge.

    `scope` is what a challenge with 401 names, "" for nothing.
    """

    document: bytes = field(repr=False)
    paths: frozenset[str]
    url: str
    scope: str


def metadata_paths(resource: str, endpoint: str | None) -> tuple[str, str]:
    """
    Return where a resource's document is: as Kong has it, and as RFC 9728 has it.

    Kong puts the well-known part after the resource's path, where the route of the API matches it;
    section 3.1 puts it before. A configured *endpoint* takes the first place.
    """
    path = urlsplit(resource).path.rstrip("/")
    return endpoint or path + WELL_KNOWN, WELL_KNOWN + path


def build_metadata(
    *,
    resource: str,
    endpoint: str | None,
    authorization_servers: Sequence[str],
    scopes: Sequence[str],
    bearer_methods: Sequence[str],
    possession: PossessionPolicy,
    proof_algorithms: Sequence[str],
) -> ResourceMetadata:
    """
    Build what is published of a resource.

    Args:
        resource: Its URI, which the document repeats.
        endpoint: The path of the document, None for the usual one.
        authorization_servers: Issuer identifiers.
        scopes: Scopes that make sense there; none are left out of the document.
        bearer_methods: Where a token may be sent, in the words of section 2.
        possession: Which proofs are asked for.
        proof_algorithms: What a DPoP proof may be signed with.

    Source: RFC 9728 section 2.
    """
    document: dict[str, object] = {
        "resource": resource,
        "authorization_servers": list(authorization_servers),
        "bearer_methods_supported": list(bearer_methods),
    }
    if scopes:
        document["scopes_supported"] = list(scopes)
    if possession.mtls != "off":
        document["tls_client_certificate_bound_access_tokens"] = True
    if possession.dpop != "off":
        document["dpop_signing_alg_values_supported"] = list(proof_algorithms)
        document["dpop_bound_access_tokens_required"] = possession.dpop == "strict"
    published, standard = metadata_paths(resource, endpoint)
    parts = urlsplit(resource)
    return ResourceMetadata(
        document=json.dumps(document, separators=(",", ":")).encode("ascii"),
        paths=frozenset({published, standard}),
        url=f"{parts.scheme}://{parts.netloc}{published}",
        scope=" ".join(scopes),
    )
