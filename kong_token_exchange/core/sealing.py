"""
Sealing what leaves the process: authenticated encryption, bound to the entry it is for.

A sealed value is `version (1) | key id (4) | nonce (12) | ciphertext and tag`, AES-256-GCM. Each
entry has a key of its own, made by HKDF from the configured secret and the entry's key, so random
nonces need to differ within one entry only; version, key id and entry are authenticated, too.
The name that an entry is kept under is an HMAC, so that nobody without the secret can tell which
token it belongs to, or test one that he guesses.

Source: NIST SP 800-38D; RFC 5869; docs/adr/0010-second-level-cache.md; docs/security.md CACHE-19.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from kong_token_exchange.secret import Secret

VERSION = 1
NONCE_BYTES = 12  # NIST SP 800-38D section 5.2.1.1 recommends 96 bits.

_ID_BYTES = 4
_KEY_BYTES = 32
_TAG_BYTES = 16
_OVERHEAD = 1 + _ID_BYTES + NONCE_BYTES + _TAG_BYTES

# A token response is at most 64 KB; a longer value was never written by us.
MAX_SEALED_BYTES = 64 * 1024 + _OVERHEAD

SealFlaw = Literal["too_large", "malformed", "version", "unknown_key", "forged"]


class SealError(ValueError):
    """The bytes are no sealed value of this entry; *flaw* is one of a fixed set of words."""

    def __init__(self, flaw: SealFlaw) -> None:
        super().__init__(flaw)
        self.flaw = flaw


@dataclass(frozen=True, slots=True, kw_only=True)
class SealKey:
    """What is derived from one configured secret; `id` is written in clear and tells nothing of it."""

    id: bytes
    sealing: bytes = field(repr=False)
    naming: bytes = field(repr=False)


def derive_seal_key(secret: Secret) -> SealKey:
    """Derive the keys of one configured secret (RFC 5869, extract and expand)."""
    kdf = HKDF(
        algorithm=SHA256(), length=2 * _KEY_BYTES + _ID_BYTES, salt=None, info=b"token-exchange second level"
    )
    material = kdf.derive(secret.reveal().encode("utf-8", "surrogatepass"))
    return SealKey(
        sealing=material[:_KEY_BYTES],
        naming=material[_KEY_BYTES : 2 * _KEY_BYTES],
        id=material[2 * _KEY_BYTES :],
    )


def entry_name(entry: bytes, *, key: SealKey) -> str:
    """Return the name that an entry is kept under: 64 hex digits that only a holder of *key* can make."""
    return hmac.new(key.naming, entry, hashlib.sha256).hexdigest()


def seal(plain: bytes, *, entry: bytes, key: SealKey, nonce: bytes) -> bytes:
    """
    Seal *plain* for one entry.

    Args:
        plain: What is to be kept.
        entry: The entry's key, which says everything that shaped the result.
        key: The first configured one.
        nonce: 12 random bytes, never used twice for an entry.

    Raises:
        SealError: *plain* is longer than what can be read again.
    """
    if len(plain) + _OVERHEAD > MAX_SEALED_BYTES:
        raise SealError("too_large")
    head = bytes([VERSION]) + key.id
    return head + nonce + _cipher(key, entry).encrypt(nonce, plain, head + entry)


def open_sealed(data: bytes, *, entry: bytes, keys: Sequence[SealKey]) -> bytes:
    """
    Return what was sealed for *entry* with any of *keys*.

    Raises:
        SealError: anything else, with its flaw; nothing was believed by then.
    """
    if len(data) > MAX_SEALED_BYTES:
        raise SealError("too_large")
    if len(data) < _OVERHEAD:
        raise SealError("malformed")
    if data[0] != VERSION:
        raise SealError("version")
    key_id, nonce = data[1 : 1 + _ID_BYTES], data[1 + _ID_BYTES : 1 + _ID_BYTES + NONCE_BYTES]
    key = next((key for key in keys if key.id == key_id), None)
    if key is None:
        raise SealError("unknown_key")
    head, body = data[: 1 + _ID_BYTES], data[1 + _ID_BYTES + NONCE_BYTES :]
    try:
        return _cipher(key, entry).decrypt(nonce, body, head + entry)
    except InvalidTag:
        raise SealError("forged") from None


def _cipher(key: SealKey, entry: bytes) -> AESGCM:
    expand = HKDFExpand(algorithm=SHA256(), length=_KEY_BYTES, info=b"entry" + entry)
    return AESGCM(expand.derive(key.sealing))
