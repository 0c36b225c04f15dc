"""
HTTP messages as values, so that building and judging them needs no network.

Bodies and headers stay out of `repr`: they hold tokens and secrets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequest:
    """An outgoing request; `url` is absolute, `body` is ready to send."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpResponse:
    """
    An answer as it came: nothing decoded, no redirect followed.

    Header names are lower case; `body` is within the sender's limit.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)

    def media_type(self) -> str:
        """Return the media type in lower case, without parameters; "" when there is none."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()
