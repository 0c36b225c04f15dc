"""
Which DPoP proofs were used: one table in memory that all worker processes of a server share.

The table is a memory file made before the workers are forked. Slots hold a digest and until when
it counts; a digest may stand in any of the WINDOW slots from the one that it names. Nothing is
ever deleted: a slot whose time is over is free.

Whatever keeps it from saying "never seen" makes it refuse (503): a window that is full, another
process that does not let go of the lock, a proof from before there was this memory.

Source: RFC 9449 section 11.1; docs/adr/0012-possession.md.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
import time
import weakref

from kong_token_exchange.core.dpop import PROOF_SKEW_S
from kong_token_exchange.errors import IssuerUnavailableError, ProofError

# The longest `dpop_proof_lifetime`; a proof is remembered for as long, whatever was configured.
MAX_LIFETIME_S = 300

# 20 MB of addresses; the system gives memory for the pages that are touched. At 300 s it holds some
# 2,000 proofs a second.
SLOTS = 2**20
WINDOW = 64

_SLOT = struct.Struct("<16sI")

# The lock is held for some 20 us; one that is held for longer belongs to a process that was stopped.
_LOCK_ATTEMPTS = 50
_LOCK_PAUSE_S = 0.0002


class SharedProofMemory:
    """
    Implements `ports.ProofMemory` for a process and those forked from it later.

    Args:
        now: NumericDate. A proof that is older could have been used at a server before this one; one
            that a fast clock made, for PROOF_SKEW_S longer.
        slots: How many proofs fit.
    """

    def __init__(self, *, now: float, slots: int = SLOTS) -> None:
        self._born = now
        self._slots = slots
        self._file = os.memfd_create("kong-token-exchange-proofs", os.MFD_CLOEXEC)
        # The last window runs over the end.
        os.ftruncate(self._file, (slots + WINDOW) * _SLOT.size)
        self._table = mmap.mmap(self._file, 0)
        weakref.finalize(self, os.close, self._file)
        # The file's lock is the process's, this one is a thread's.
        self._lock = threading.Lock()

    def use(self, key: bytes, *, iat: float, now: float) -> None:
        """
        Take note of a proof, or refuse it.

        Args:
            key: 16 bytes that tell the proof from every other one.
            iat: NumericDate of the proof, within its window.
            now: NumericDate.

        Raises:
            ProofError: it was used before.
            IssuerUnavailableError: that cannot be told.
        """
        # A client's clock may have been ahead when the proof was taken.
        if iat <= self._born + PROOF_SKEW_S:
            raise IssuerUnavailableError(reason="dpop_memory_too_young")
        with self._lock:
            self._lock_file()
            try:
                self._use(key, until=int(iat + MAX_LIFETIME_S + PROOF_SKEW_S) + 1, now=now)
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _use(self, key: bytes, *, until: int, now: float) -> None:
        start = int.from_bytes(key[:8], "little") % self._slots * _SLOT.size
        free = None
        window = self._table[start : start + WINDOW * _SLOT.size]
        for index, (digest, end) in enumerate(_SLOT.iter_unpack(window)):
            if end <= now:
                free = index if free is None else free
            elif digest == key:
                raise ProofError(reason="dpop_replayed")
        if free is None:
            raise IssuerUnavailableError(reason="dpop_memory_full")
        place = start + free * _SLOT.size
        self._table[place : place + _SLOT.size] = _SLOT.pack(key, until)

    def _lock_file(self) -> None:
        for _ in range(_LOCK_ATTEMPTS):
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                time.sleep(_LOCK_PAUSE_S)
            else:
                return
        raise IssuerUnavailableError(reason="dpop_memory_busy")
