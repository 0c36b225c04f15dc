"""The metadata of a protected resource through a gateway: the sandbox, and Kong where it is on the path."""

from __future__ import annotations

import pytest
import requests

from tests.support.stage import Stage, one_route

pytestmark = pytest.mark.integration


def test_a_caller_finds_out_where_tokens_come_from(stage: Stage) -> None:
    metadata = {
        "resource": "https://api.example.com/orders",
        "authorization_servers": ["https://idp.example.com"],
        "scopes_supported": ["orders"],
    }
    stage.start(one_route(protected_resource_metadata=metadata))
    path = "/orders/.well-known/oauth-protected-resource"

    refused = stage.get()
    document = stage.get(path)

    assert (401, 200) == (refused.status_code, document.status_code)
    url = f"https://api.example.com{path}"
    assert f'resource_metadata="{url}"' in refused.headers["WWW-Authenticate"]
    assert metadata == {name: document.json()[name] for name in metadata}
    assert "application/json" == document.headers["Content-Type"].partition(";")[0]
    head = requests.head(stage.gateway.url + path, timeout=30)
    assert (200, b"") == (head.status_code, head.content)
    assert 401 == stage.get(f"{path}/..").status_code
    assert 401 == stage.get(f"{path}x").status_code
    assert 0 == stage.upstream.hits
    assert 200 == stage.get(token=stage.token()).status_code
