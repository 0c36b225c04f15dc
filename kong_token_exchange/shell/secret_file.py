"""
A client secret in a file, read again when the file changes.

Whoever rotates the secret cannot change file and issuer in one instant. So the secret from before
is kept for a while, and after a refusal the other one is offered: the file may be ahead of the
issuer, or the issuer ahead of the file. A file that cannot be read leaves the last good secret in
use, because that is what a rotation looks like half way.

Looked at when an exchange is made, in a thread that may wait; never for what is cached.

Source: docs/configuration.md; RES-19, FAULT-96.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import threading

from kong_token_exchange.errors import GatewayError
from kong_token_exchange.ports import Clock
from kong_token_exchange.secret import Secret

# How often the file is looked at, whatever the number of exchanges.
LOOK_EVERY_S = 1.0

# How long the secret from before may still be offered: an operator or a script changes both within.
OVERLAP_S = 300.0

# A client secret in a Basic header of 8 KB, nginx's default, cannot be longer.
MAX_BYTES = 4096

_LOG_INTERVAL_S = 60.0
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

logger = logging.getLogger("kong_token_exchange.secret_file")

# Inode and times tell a replaced file from a rewritten one; Kubernetes swaps a symbolic link.
_Signature = tuple[int, int, int, int, int]


class SecretFile:
    """
    The secret in one file; safe to use from any thread.

    Args:
        path: The file, or a symbolic link to it. One line break at its end is not part of the secret.
        clock: The monotonic clock counts.
    """

    def __init__(self, path: str, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._secret: Secret | None = None
        self._before: Secret | None = None
        self._replaced_at = 0.0
        self._signature: _Signature | None = None
        self._looked_at: float | None = None
        self._trouble: str | None = None
        self._logged_at: float | None = None

    def current(self) -> Secret:
        """
        Return the secret; the file is looked at once a second at most, and read when it has changed.

        Raises:
            GatewayError: there has been no good secret since the start; the fact `cause` says why.
        """
        with self._lock:
            now = self._clock.monotonic()
            if self._looked_at is None or now - self._looked_at >= LOOK_EVERY_S:
                self._look(now, always_read=False)
            if self._secret is None:
                raise GatewayError(reason="client_secret_unreadable", facts={"cause": self._trouble})
            return self._secret

    def other_than(self, refused: Secret) -> Secret | None:
        """Return what else may be the secret, now that the issuer has refused *refused*; None is nothing."""
        with self._lock:
            now = self._clock.monotonic()
            self._look(now, always_read=True)
            if self._secret is not None and self._secret != refused:
                return self._secret
            if self._before is None or self._before == refused or now - self._replaced_at >= OVERLAP_S:
                return None
            self._warn(now, "the secret is refused; the one before it is tried")
            return self._before

    def _look(self, now: float, *, always_read: bool) -> None:
        self._looked_at = now
        try:
            secret = self._read(always=always_read)
        except (OSError, ValueError) as error:
            # Never the text of a ValueError: it could quote the content.
            self._trouble = error.args[0] if isinstance(error, _UnusableError) else type(error).__name__
            self._warn(now, f"cannot be read ({self._trouble}); what was read before stays in use")
            return
        if secret is not None and secret != self._secret:
            self._before, self._secret, self._replaced_at = self._secret, secret, now

    def _read(self, *, always: bool) -> Secret | None:
        """Return what the file holds; None where it has not changed."""
        # Not blocking: a named pipe in the file's place must not hold a thread.
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            told = os.fstat(descriptor)
            signature = (told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns, told.st_ctime_ns)
            if signature == self._signature and not always:
                return None
            if not stat.S_ISREG(told.st_mode):
                raise _UnusableError("not_a_file")
            content = file.read(MAX_BYTES + 1)
        secret = _parse(content)
        self._signature = signature
        return secret

    def _warn(self, now: float, text: str) -> None:
        if self._logged_at is None or now - self._logged_at >= _LOG_INTERVAL_S:
            self._logged_at = now
            logger.warning("client_secret_file %s: %s", self._path, text)


class _UnusableError(ValueError):
    """The content is no secret; the only argument is a constant."""


def _parse(content: bytes) -> Secret:
    if len(content) > MAX_BYTES:
        raise _UnusableError("too_long")
    text = content.decode("utf-8").removesuffix("\n").removesuffix("\r")
    if not text:
        raise _UnusableError("empty")
    if _CONTROL.search(text):
        raise _UnusableError("control_character")
    return Secret(text)
