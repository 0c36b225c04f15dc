"""Every story of the demo, over every gateway and identity provider that is present."""

from __future__ import annotations

from typing import Any

import pytest

from kong_token_exchange.sandbox.stories import STORIES, StoryTeller, Wallet
from kong_token_exchange.sandbox.upstream import EchoUpstream
from tests.support.gateways import Gateway

pytestmark = pytest.mark.integration


def test_stories(gateway: Gateway, identity_provider: Any, upstreams: dict[str, EchoUpstream]) -> None:
    teller = StoryTeller(gateway_url=gateway.url, wallet=Wallet(identity_provider), upstreams=upstreams)

    complaints = {story.name: teller.tell(story).complaints for story in STORIES}

    assert {name: [] for name in complaints} == complaints
