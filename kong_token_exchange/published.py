"""
The metadata of a protected resource, answered before anything is asked of the caller.

A shell around an instance: a configuration without the metadata has none around it, and pays
nothing. The document is a constant of the configuration, and only GET and HEAD of its paths get it.

Source: RFC 9728 section 3; docs/configuration.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from kong_token_exchange.pluginserver.contract import (
    Coalescing,
    Facts,
    Fetch,
    Outcome,
    Patience,
    PluginInstance,
    exit_with,
)
from kong_token_exchange.protocol.resource_metadata import ResourceMetadata

HEADERS = {"Content-Type": "application/json", "Cache-Control": "max-age=300"}

# The last facts, in this order.
_READERS = (Fetch("kong.request.get_method"), Fetch("kong.request.get_path"))


class Inner(PluginInstance, Coalescing, Protocol):
    """What is wrapped: an instance whose events may wait for one another."""


class PublishedInstance:
    """Implements `pluginserver.contract.PluginInstance` around another instance."""

    def __init__(self, inner: Inner, metadata: ResourceMetadata) -> None:
        self._inner = inner
        self._metadata = metadata
        self._outcome = exit_with(200, metadata.document, HEADERS)

    @property
    def prefetch(self) -> Sequence[Fetch]:
        """The facts of the other instance, then method and path."""
        return (*self._inner.prefetch, *_READERS)

    def warm(self, facts: Facts) -> Outcome | None:
        """Give the document, or what the other instance gives."""
        *others, method, path = facts
        if self._is_asked_for(method, path):
            return self._outcome
        return self._inner.warm(others)

    def access(self, kong: Any) -> None:
        """Do the same in a pool thread, or under kong-pdk, where nothing is warm."""
        method, path = (_text(value) for value in (kong.request.get_method(), kong.request.get_path()))
        if self._is_asked_for(method, path):
            kong.response.exit(200, self._metadata.document.decode("ascii"), dict(HEADERS))
            return
        self._inner.access(kong)

    def coalesce(self, facts: Facts) -> Patience | None:
        """Let events wait as the other instance says."""
        patience = self._inner.coalesce(facts[: -len(_READERS)])
        if patience is None:
            return None
        overdue = patience.overdue
        return Patience(patience.within_s, lambda given: overdue(given[: -len(_READERS)]))

    def close(self) -> None:
        """Let the other instance close."""
        self._inner.close()

    def _is_asked_for(self, method: str, path: str) -> bool:
        return path in self._metadata.paths and method in ("GET", "HEAD")


def _text(value: Any) -> str:
    """Read a getter's answer; kong-pdk answers (data, err)."""
    return str(value[0] if isinstance(value, tuple) else value)
