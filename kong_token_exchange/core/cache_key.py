"""
Cache keys: a digest over length-prefixed fields, so that no two inputs run together.

Source: docs/threats.md CACHE-01 to CACHE-10; ADR 0005.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def digest_fields(fields: Iterable[str | Iterable[str] | None]) -> bytes:
    """
    Return the SHA-256 over *fields*, each with its kind and length in front.

    Args:
        fields: Text, None, or a sequence of text; all three kinds are told apart, and an empty
            sequence differs from an absent field and from an empty text.

    Returns:
        32 bytes.
    """
    material = hashlib.sha256()
    for field in fields:
        if field is None:
            material.update(b"n")
        elif isinstance(field, str):
            _add_text(material, field)
        else:
            items = tuple(field)
            material.update(b"l" + len(items).to_bytes(8, "big"))
            for item in items:
                _add_text(material, item)
    return material.digest()


def _add_text(material: hashlib._Hash, text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    material.update(b"t" + len(data).to_bytes(8, "big") + data)
