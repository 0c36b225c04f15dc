"""A string that prints redacted."""

from __future__ import annotations

import hashlib
from typing import NoReturn


class Secret:
    """
    Hold a token or a client secret so that it cannot be printed by accident.

    `repr`, `str` and formatting show a constant; `reveal()` is written on the line
    that sends the value and is easy to search for. Equality compares values, so
    that frozen configurations can be compared; it is not constant-time and is
    never used to authenticate anybody.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the value itself."""
        return self._value

    def digest(self) -> bytes:
        """Return the SHA-256 of the value, 32 bytes; fit for keys, never for logs in full."""
        return hashlib.sha256(self._value.encode("utf-8", "surrogatepass")).digest()

    def __repr__(self) -> str:
        return "Secret(***)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self.digest())

    def __bool__(self) -> bool:
        return bool(self._value)

    def __reduce__(self) -> NoReturn:
        """Refuse pickling: a pickled secret is a secret on disk."""
        raise TypeError("a Secret is not serialised")
