import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kong_token_exchange.sandbox.gateway import SandboxGateway
from kong_token_exchange.sandbox.upstream import EchoUpstream
from tests.unit.sandbox.scripted import DESCRIPTION, Event, ScriptedPlugin, declarative, pass_on


class Bench:
    """A gateway between a scripted plugin and an echo upstream."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self.path, self._stack = path, stack
        self.upstream = stack.enter_context(EchoUpstream())
        self.plugin: ScriptedPlugin
        self.gateway: SandboxGateway

    def __call__(
        self,
        access: Callable[[Event], None] = pass_on,
        *,
        config: dict[str, Any] | None = None,
        start: Callable[..., None] | None = None,
        **members: Any,
    ) -> SandboxGateway:
        self.plugin = self._stack.enter_context(ScriptedPlugin(self.path, access, start))
        # The service's address is never used: the resolve map leads to the upstream.
        members.setdefault("resolve", {"127.0.0.1:1": self.upstream.address})
        self.gateway = SandboxGateway(
            config or declarative(),
            plugin_command=None,
            description=DESCRIPTION,
            socket_path=self.path,
            **members,
        )
        # Without waiting: to look whether the plugin listens would take the first connection.
        self._stack.callback(self.gateway.stop)
        self.gateway.start(wait=False)
        return self.gateway

    def received(self) -> list[tuple[str, str]]:
        """The headers the upstream got last."""
        request = self.upstream.log.last()
        assert request is not None
        return list(request.headers)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with contextlib.ExitStack() as stack:
        yield Bench(tmp_path / "plugin.socket", stack)
