"""
The journal that lets every worker process resolve every instance id.

A gateway worker starts an instance over one connection, hence in one worker of
ours, and then uses its id on any. The journal is memory (memfds made before the
fork): it leaves no file, outlives every worker, and needs no process to manage it.

    START  id, digest, name, configuration    a new instance
    AGAIN  id                                 one more start of it
    CLOSE  id, time                           one start less; at none its grace begins

Each worker replays the records it has not seen, so all of them hold the same table.
Starts and closes are therefore counted over all workers together, as in a single
process: a close that one worker takes never ends what another start still holds, and
a worker that dies takes no count with it. Ids are given out under the lock, from the
table, so a collision is probed to the same number everywhere.

A record counts from when the header says so, and a header field is written in one
piece: a worker killed while writing leaves nothing half done. When half of the
journal is history, or it holds too much, it is written anew into the other of two
files, without the ids whose grace is over or that have to make room.

Source: docs/plugin-server.md; docs/plugin-socket.md, section Instances.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from kong_token_exchange.pluginserver.contract import Outcome, PluginType
from kong_token_exchange.pluginserver.faults import FaultLog
from kong_token_exchange.pluginserver.instances import (
    GRACE_S,
    MAX_INSTANCES,
    Instance,
    candidate_ids,
    fingerprint,
    make_instance,
)

# Configurations are a few KB; 4,096 of them are some 10 MB. Beyond this the instance
# started longest ago is let go. More than the largest single command, 4 MiB.
MAX_JOURNAL_BYTES = 64 * 1024 * 1024

# History shorter than this is not worth writing anew.
MIN_REWRITE_BYTES = 1024 * 1024

# The lock is held for microseconds, or for a slice of time on a machine short of them; a
# holder that was stopped must not stop the others for ever. Whoever waited in vain raises,
# and its event ends with the constant 500.
LOCK_TIMEOUT_S = 2.0
_LOCK_PAUSE_S = 0.0005

_HEADER = struct.Struct("<QQQ")  # epoch, committed bytes of file 0 and of file 1
_FIELD = struct.Struct("<Q")
# kind, id, starts, retired_at (-1: not), started_at, digest, bytes of name and configuration
_RECORD = struct.Struct("<BIIdq32sII")

_NOT_RETIRED = -1.0


class JournalLockError(OSError):
    """The journal's lock was not to be had in time."""


class _Kind(IntEnum):
    START = 1
    AGAIN = 2
    CLOSE = 3


@dataclass(slots=True, kw_only=True)
class Entry:
    """What the journal says of one instance id."""

    instance_id: int
    digest: bytes
    name: str
    starts: int
    retired_at: float
    started_at: int
    config_offset: int
    config_bytes: int

    @property
    def size(self) -> int:
        """Return the bytes it takes in a journal without history."""
        return _RECORD.size + len(self.name.encode(errors="surrogateescape")) + self.config_bytes

    def is_over(self, now: float, grace_s: float) -> bool:
        """Tell whether nobody holds it and its grace has passed; *now* is of `time.monotonic`."""
        return self.starts == 0 and self.retired_at <= now - grace_s


class Journal:
    """
    Bytes shared by processes that forked from the one that made it.

    Two files take turns; the header says which one counts and how much of it.
    All but `head` is for the holder of the lock.
    """

    def __init__(self) -> None:
        self._header = os.memfd_create("instances")
        self._files = (os.memfd_create("instances-0"), os.memfd_create("instances-1"))
        os.pwrite(self._header, _HEADER.pack(0, 0, 0), 0)

    @contextlib.contextmanager
    def locked(self, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
        """
        Hold the lock against all other processes, not against threads of this one.

        Raises:
            JournalLockError: another process held it all the time.
        """
        # A record lock belongs to a process. One of `flock` belongs to the open file, which
        # processes share after a fork: it would let them all in.
        end = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.lockf(self._header, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() >= end:
                    raise JournalLockError("the journal of instances is locked") from None
                time.sleep(_LOCK_PAUSE_S)
        try:
            yield
        finally:
            fcntl.lockf(self._header, fcntl.LOCK_UN)

    def head(self) -> tuple[int, int]:
        """Return epoch and committed bytes; they change whenever a record is added."""
        epoch, *lengths = _HEADER.unpack(os.pread(self._header, _HEADER.size, 0))
        return epoch, lengths[epoch & 1]

    def read(self, offset: int, size: int) -> bytes:
        """
        Read committed bytes.

        Raises:
            OSError: there are fewer.
        """
        epoch, _ = self.head()
        data = b""
        while len(data) < size:
            part = os.pread(self._files[epoch & 1], size - len(data), offset + len(data))
            if not part:
                raise OSError("the journal of instances is shorter than its header says")
            data += part
        return data

    def append(self, data: bytes) -> None:
        """Add *data*, whole or not at all."""
        epoch, length = self.head()
        self._write(epoch & 1, length, data)

    def rewrite(self, data: bytes) -> None:
        """Replace all by *data*, whole or not at all; begins a new epoch."""
        epoch, _ = self.head()
        old, new = epoch & 1, epoch + 1 & 1
        os.ftruncate(self._files[new], 0)
        self._write(new, 0, data)
        os.pwrite(self._header, _FIELD.pack(epoch + 1), 0)
        os.ftruncate(self._files[old], 0)

    def close(self) -> None:
        """Let go of it in this process."""
        for fd in (self._header, *self._files):
            os.close(fd)

    def _write(self, number: int, offset: int, data: bytes) -> None:
        end = offset + len(data)
        left = memoryview(data)
        while left:
            left = left[os.pwrite(self._files[number], left, end - len(left)) :]
        os.pwrite(self._header, _FIELD.pack(end), _FIELD.size * (1 + number))


class JournalInstances:
    """
    The registry of one worker process among several; see `InstanceRegistry`.

    Args:
        plugin: Started here for every id this worker is asked about.
        journal: Made before the fork.
        failure: The answer of an instance that did not start.
        log: Where faults are noted.
        grace_s: How long an id lives on after its last close.
        max_instances: Beyond this many the one started longest ago goes.
        max_bytes: The same for their configurations, in bytes.
        clock: Monotonic seconds, the same clock in all processes.
        wall_clock: Seconds since the epoch.
    """

    def __init__(
        self,
        plugin: PluginType,
        journal: Journal,
        *,
        failure: Outcome,
        log: FaultLog,
        grace_s: float = GRACE_S,
        max_instances: int = MAX_INSTANCES,
        max_bytes: int = MAX_JOURNAL_BYTES,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._plugin = plugin
        self._journal = journal
        self._failure = failure
        self._log = log
        self._grace_s = grace_s
        self._max_instances = max_instances
        self._max_bytes = max_bytes
        self._clock = clock
        self._wall_clock = wall_clock
        self._epoch = 0
        self._position = 0
        # In the order of the last start, so that the first is the one to let go.
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self._by_digest: dict[bytes, Entry] = {}
        self._live_bytes = 0
        # Ids with no start left, in the order of their last close.
        self._retired: OrderedDict[int, None] = OrderedDict()
        # Started in this process.
        self._instances: dict[int, Instance] = {}
        # Let go, but an event may still be on them: (when to close, instance).
        self._leaving: deque[tuple[float, Instance]] = deque()
        self._generation = 0

    # --- InstanceRegistry -------------------------------------------------------------

    def start(self, name: str, config: bytes) -> Instance:
        """
        Start an instance, or count one more start of a living one.

        Raises:
            OSError: the journal is locked for too long, or out of memory.
        """
        digest = fingerprint(name, config)
        self._catch_up_locked()
        entry = self._by_digest.get(digest)
        instance = self._instances.get(entry.instance_id) if entry is not None else None
        if instance is None or instance.failed:
            # Before it is written down: a configuration that kills its process is not passed on.
            # One that failed is tried again, since what was missing may be there by now.
            instance = make_instance(self._plugin, name, config, failure=self._failure, log=self._log)
        with self._journal.locked():
            self._catch_up()
            entry = self._by_digest.get(digest)
            if entry is None:
                self._write_start(digest, name, config)
            else:
                self._journal.append(_encode(_Kind.AGAIN, entry.instance_id))
            self._catch_up(own=True)
            entry = self._by_digest[digest]
            self._install(entry, instance)
            self._make_room()
        return instance

    def find(self, instance_id: int) -> Instance | None:
        """
        Return the instance of that id, starting it here if another worker did before.

        Raises:
            OSError: the journal is locked for too long.
        """
        instance = self._instances.get(instance_id)
        if instance is not None:
            return instance
        if instance_id not in self._entries and self._is_caught_up():
            return None
        with self._journal.locked():
            self._catch_up()
            entry = self._entries.get(instance_id)
            if entry is None or entry.is_over(self._clock(), self._grace_s):
                return None
            config = self._journal.read(entry.config_offset, entry.config_bytes)
        instance = make_instance(self._plugin, entry.name, config, failure=self._failure, log=self._log)
        self._install(entry, instance)
        return instance

    def close(self, instance_id: int) -> None:
        """
        Take one start off, whichever worker counted it; the last one begins the grace period.

        Raises:
            OSError: the journal is locked for too long, or out of memory.
        """
        with self._journal.locked():
            self._catch_up()
            entry = self._entries.get(instance_id)
            if entry is not None and entry.starts > 0:
                self._journal.append(_encode(_Kind.CLOSE, instance_id, at=self._clock()))
                self._catch_up()

    def expire(self) -> list[Instance]:
        """Forget the instances whose grace period is over and return them."""
        with contextlib.suppress(JournalLockError):
            # Locked: the next round looks again.
            self._catch_up_locked()
        now = self._clock()
        over: list[Instance] = []
        while self._retired:
            instance_id = next(iter(self._retired))
            if not self._entries[instance_id].is_over(now, self._grace_s):
                break
            # The entry stays until the journal is written anew: it keeps the number taken.
            del self._retired[instance_id]
            instance = self._instances.pop(instance_id, None)
            if instance is not None:
                self._generation += 1
                over.append(instance)
        while self._leaving and self._leaving[0][0] <= now:
            over.append(self._leaving.popleft()[1])
        return over

    def generation(self) -> int:
        """Return a number that changes when an id found before may be gone."""
        return self._generation

    def __len__(self) -> int:
        return len(self._entries)

    # --- this process -----------------------------------------------------------------

    def _install(self, entry: Entry, instance: Instance) -> None:
        before = self._instances.get(entry.instance_id)
        if before is instance:
            return
        if before is not None:
            self._let_go(entry.instance_id)
        instance.instance_id = entry.instance_id
        instance.digest = entry.digest
        instance.started_at = entry.started_at
        self._instances[entry.instance_id] = instance

    def _let_go(self, instance_id: int) -> None:
        instance = self._instances.pop(instance_id)
        self._generation += 1
        self._leaving.append((self._clock() + self._grace_s, instance))

    # --- replay -----------------------------------------------------------------------

    def _is_caught_up(self) -> bool:
        return self._journal.head() == (self._epoch, self._position)

    def _catch_up_locked(self) -> None:
        if not self._is_caught_up():
            with self._journal.locked():
                self._catch_up()

    def _catch_up(self, *, own: bool = False) -> None:
        epoch, length = self._journal.head()
        rewritten = epoch != self._epoch
        if rewritten:
            self._forget_entries()
            self._epoch, self._position = epoch, 0
        start = self._position
        data = self._journal.read(start, length - start)
        position = 0
        while position < len(data):
            position = self._replay(data, position, start, own=own)
        self._position = length
        if rewritten:
            # It lists them by their last start; grace ends by their last close.
            by_close = sorted(self._retired, key=lambda number: self._entries[number].retired_at)
            self._retired = OrderedDict.fromkeys(by_close)
            self._drop_unlisted()

    def _replay(self, data: bytes, position: int, start: int, *, own: bool) -> int:
        fields = _RECORD.unpack_from(data, position)
        kind, instance_id, starts, at, started_at, digest, name_bytes, config_bytes = fields
        name_at = position + _RECORD.size
        config_at = name_at + name_bytes
        entry = self._entries.get(instance_id)
        if kind == _Kind.START:
            self._add(
                Entry(
                    instance_id=instance_id,
                    digest=digest,
                    name=data[name_at:config_at].decode(errors="surrogateescape"),
                    starts=starts,
                    retired_at=at,
                    started_at=started_at,
                    config_offset=start + config_at,
                    config_bytes=config_bytes,
                )
            )
        elif entry is None:
            raise OSError("the journal of instances speaks of an id it did not start")
        elif kind == _Kind.AGAIN:
            self._again(entry, own=own)
        else:
            entry.starts -= 1
            if entry.starts == 0:
                entry.retired_at = at
                self._retired[instance_id] = None
        end: int = config_at + config_bytes
        return end

    def _add(self, entry: Entry) -> None:
        self._entries[entry.instance_id] = entry
        self._by_digest[entry.digest] = entry
        self._live_bytes += entry.size
        if entry.starts == 0:
            self._retired[entry.instance_id] = None

    def _again(self, entry: Entry, *, own: bool) -> None:
        entry.starts += 1
        entry.retired_at = _NOT_RETIRED
        self._retired.pop(entry.instance_id, None)
        self._entries.move_to_end(entry.instance_id)
        instance = self._instances.get(entry.instance_id)
        if instance is not None and instance.failed and not own:
            # Another worker tried again, and so does this one when it is next asked.
            self._let_go(entry.instance_id)

    def _forget_entries(self) -> None:
        self._entries.clear()
        self._by_digest.clear()
        self._retired.clear()
        self._live_bytes = 0

    def _drop_unlisted(self) -> None:
        for instance_id, instance in list(self._instances.items()):
            entry = self._entries.get(instance_id)
            if entry is None or entry.digest != instance.digest or instance.failed:
                self._let_go(instance_id)

    # --- writing, under the lock ------------------------------------------------------

    def _write_start(self, digest: bytes, name: str, config: bytes) -> None:
        instance_id = next(number for number in candidate_ids(digest) if number not in self._entries)
        encoded_name = name.encode(errors="surrogateescape")
        started_at = int(self._wall_clock())
        head = _RECORD.pack(
            _Kind.START, instance_id, 1, _NOT_RETIRED, started_at, digest, len(encoded_name), len(config)
        )
        self._journal.append(head + encoded_name + config)

    def _make_room(self) -> None:
        _, length = self._journal.head()
        over = len(self._entries) > self._max_instances or self._live_bytes > self._max_bytes
        if over or length > max(MIN_REWRITE_BYTES, 2 * self._live_bytes):
            self._rewrite(make_room=over)

    def _rewrite(self, *, make_room: bool) -> None:
        now = self._clock()
        kept = [entry for entry in self._entries.values() if not entry.is_over(now, self._grace_s)]
        first = self._first_to_keep(kept) if make_room else 0
        self._journal.rewrite(b"".join(self._encode_entry(entry) for entry in kept[first:]))
        self._catch_up()

    def _first_to_keep(self, kept: Sequence[Entry]) -> int:
        # An eighth below the limits, so that the next start does not write it all anew again.
        count = self._max_instances - self._max_instances // 8
        size = self._max_bytes - self._max_bytes // 8
        first, left = 0, sum(entry.size for entry in kept)
        # The last one was started just now and stays whatever its size.
        while first < len(kept) - 1 and (len(kept) - first > count or left > size):
            left -= kept[first].size
            first += 1
        return first

    def _encode_entry(self, entry: Entry) -> bytes:
        name = entry.name.encode(errors="surrogateescape")
        config = self._journal.read(entry.config_offset, entry.config_bytes)
        head = _RECORD.pack(
            _Kind.START,
            entry.instance_id,
            entry.starts,
            entry.retired_at,
            entry.started_at,
            entry.digest,
            len(name),
            len(config),
        )
        return head + name + config


def _encode(kind: _Kind, instance_id: int, *, at: float = _NOT_RETIRED) -> bytes:
    return _RECORD.pack(kind, instance_id, 0, at, 0, b"", 0, 0)
