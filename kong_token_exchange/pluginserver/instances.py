"""
Instances: which configuration an instance id of Kong's stands for.

An id is 31 bits of a SHA-256 over the plugin's name and its configuration. A
gateway worker goes on sending ids it was given before this process started; with
ids that count upwards such a stale id would name another route's configuration,
with derived ones it is right or unknown, and Kong answers an unknown one by
starting the instance again.

Kong starts every instance anew after any configuration change, also of another
plugin, and then closes the old id, which is the same number when nothing changed
for this one. So starts are counted, a close takes one off, and an id with none
left lives on for a grace period, since requests may still be using it.

Source: docs/plugin-socket.md; docs/adr/0002-own-plugin-server.md.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from kong_token_exchange.errors import RemoteProtocolError
from kong_token_exchange.pluginserver import wire
from kong_token_exchange.pluginserver.contract import (
    Facts,
    Fetch,
    Outcome,
    Patience,
    PluginInstance,
    PluginType,
)
from kong_token_exchange.pluginserver.faults import FaultLog
from kong_token_exchange.pluginserver.pdk import Kong

# `__seq__` is a counter that Kong increments whenever it builds its plugin list:
# it differs between two starts of the same thing. `__plugin_id`, `__key__`, `__ws_id`,
# `route_id` and `service_id` stay in the hash: they say whose configuration it is, so two
# plugin entities with equal settings never share an id.
PER_BUILD_MEMBERS = frozenset({"__seq__"})

_ID_BITS = 0x7FFF_FFFF

# Longer than any event may run (the deadline is 10 s), so no event is on an instance when it closes.
GRACE_S = 60.0

# Kong closes an id only when the same plugin entity changes, never when it is deleted or
# a gateway worker dies, so ids pile up. Beyond this many the one started longest ago goes;
# should it be in use still, Kong starts it again.
MAX_INSTANCES = 4096


def fingerprint(name: str, config: bytes) -> bytes:
    """
    Return the identity of a configuration: 32 bytes, equal whatever the order of its members.

    Args:
        name: The plugin's name.
        config: Kong's JSON; what is not a JSON object is taken byte for byte.
    """
    try:
        members = wire.decode_config(config)
        kept = {key: value for key, value in members.items() if key not in PER_BUILD_MEMBERS}
        canonical = json.dumps(kept, sort_keys=True, separators=(",", ":")).encode("ascii")
    except (RemoteProtocolError, RecursionError):
        canonical = b"not json\0" + config
    encoded_name = wire.encode_text(name)
    return hashlib.sha256(len(encoded_name).to_bytes(4, "big") + encoded_name + canonical).digest()


class Instance:
    """A started instance with what the hot path needs laid ready."""

    __slots__ = (
        "access",
        "close",
        "coalesce",
        "decoders",
        "digest",
        "failed",
        "fetches",
        "instance_id",
        "name",
        "prefetch_frames",
        "retired_at",
        "started_at",
        "starts",
        "wanted",
        "warm",
    )

    def __init__(self, name: str, plugin: PluginInstance, *, failed: bool = False) -> None:
        """
        Lay *plugin* ready.

        Raises:
            ValueError: it wants a fact that cannot be prefetched.
        """
        resolved = [fetch.resolve() for fetch in plugin.prefetch]
        self.name = name
        self.failed = failed
        self.warm: Callable[[Facts], Outcome | None] = plugin.warm
        self.access: Callable[[Kong], None] = plugin.access
        self.close: Callable[[], None] = plugin.close
        self.coalesce: Callable[[Facts], Patience | None] | None = getattr(plugin, "coalesce", None)
        self.prefetch_frames = b"".join(method.call(argument) for method, argument in resolved)
        self.decoders = tuple(method.result.decode for method, _ in resolved)
        self.fetches = tuple((method.name, argument) for method, argument in resolved)
        self.wanted = len(resolved)
        self.instance_id = 0
        self.digest = b""
        self.starts = 0
        self.started_at = 0
        self.retired_at: float | None = None


class FailedPlugin:
    """Stands in for a plugin that did not start: the constant 500, and the reason in the log."""

    prefetch: Sequence[Fetch] = ()

    def __init__(self, reason: str, outcome: Outcome, log: FaultLog) -> None:
        self._reason = reason
        self._outcome = outcome
        self._log = log

    def warm(self, facts: Facts) -> Outcome | None:  # noqa: ARG002 - the contract hands facts over
        """Refuse the event; the log takes the reason at most once a minute."""
        self._log.note(self._reason)
        return self._outcome

    def access(self, kong: Kong) -> None:  # noqa: ARG002 - the contract hands kong over
        """Never runs: `warm` always answers."""
        raise AssertionError("a failed plugin answers on the loop")

    def close(self) -> None:
        """Nothing was opened."""


def candidate_ids(digest: bytes) -> Iterator[int]:
    """Yield the numbers an instance may have, the one derived from *digest* first, without end."""
    instance_id = int.from_bytes(digest[:4], "big") & _ID_BITS
    while True:
        # 0 is what protobuf reads from an absent field: not an id.
        if instance_id != 0:
            yield instance_id
        instance_id = (instance_id + 1) & _ID_BITS


def make_instance(
    plugin: PluginType, name: str, config: bytes, *, failure: Outcome, log: FaultLog
) -> Instance:
    """
    Start *plugin* with Kong's JSON; one that raises becomes an instance that answers *failure*.

    The id and the digest are left to the caller.
    """
    try:
        started = plugin.start(wire.decode_config(config))
        return Instance(name, started, failed=getattr(started, "start_again", False))
    except BaseException as error:  # noqa: BLE001 - SystemExit of a plugin must not end the server
        log.raised(f"plugin {name} did not start", error)
        reason = f"plugin {name} did not start ({type(error).__qualname__}): it answers 500"
        return Instance(name, FailedPlugin(reason, failure, log), failed=True)


class InstanceRegistry(Protocol):
    """Finds instances by id; several processes may share what stands behind it."""

    def start(self, name: str, config: bytes) -> Instance:
        """Start an instance, or count one more start of a living one. Never raises."""

    def find(self, instance_id: int) -> Instance | None:
        """Return the instance of that id, in its grace period too; None when it is unknown."""

    def close(self, instance_id: int) -> None:
        """Take one start off; an unknown id is no mistake."""

    def expire(self) -> list[Instance]:
        """Forget the instances whose grace period is over and return them, to be closed."""

    def generation(self) -> int:
        """Return a number that changes when an id found before may be gone."""


class LocalInstances:
    """The registry of a single process."""

    def __init__(
        self,
        plugin: PluginType,
        *,
        failure: Outcome,
        log: FaultLog,
        grace_s: float = GRACE_S,
        max_instances: int = MAX_INSTANCES,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._plugin = plugin
        self._failure = failure
        self._log = log
        self._grace_s = grace_s
        self._max_instances = max_instances
        self._clock = clock
        self._wall_clock = wall_clock
        # In the order of the last start, so that the first is the one to let go.
        self._by_id: OrderedDict[int, Instance] = OrderedDict()
        # In the order of retirement; all wait equally long.
        self._retired: OrderedDict[int, Instance] = OrderedDict()
        # Evicted, but an event may still be on them: (when to close, instance).
        self._evicted: deque[tuple[float, Instance]] = deque()
        self._generation = 0

    def start(self, name: str, config: bytes) -> Instance:
        """Start an instance, or count one more start of a living one."""
        digest = fingerprint(name, config)
        instance_id = self._free_or_own_id(digest)
        instance = self._by_id.get(instance_id)
        if instance is None:
            instance = self._make(name, config)
            self._adopt(instance, instance_id, digest)
        elif instance.failed:
            # What was missing may be there by now: a file, a name that resolves.
            replacement = self._make(name, config)
            replacement.starts = instance.starts
            self._adopt(replacement, instance_id, digest)
            self._generation += 1
            instance = replacement
        instance.starts += 1
        instance.retired_at = None
        self._retired.pop(instance_id, None)
        self._by_id.move_to_end(instance_id)
        self._make_room()
        return instance

    def find(self, instance_id: int) -> Instance | None:
        """Return the instance of that id, in its grace period too."""
        return self._by_id.get(instance_id)

    def close(self, instance_id: int) -> None:
        """Take one start off; the last one begins the grace period."""
        instance = self._by_id.get(instance_id)
        if instance is None or instance.starts == 0:
            return
        instance.starts -= 1
        if instance.starts == 0:
            instance.retired_at = self._clock()
            self._retired[instance_id] = instance

    def expire(self) -> list[Instance]:
        """Forget the instances whose grace period is over and return them."""
        now = self._clock()
        over: list[Instance] = []
        while self._retired:
            instance = next(iter(self._retired.values()))
            if instance.retired_at is not None and instance.retired_at > now - self._grace_s:
                break
            self._remove(instance)
            over.append(instance)
        while self._evicted and self._evicted[0][0] <= now:
            over.append(self._evicted.popleft()[1])
        return over

    def generation(self) -> int:
        """Return a number that changes when an id found before may be gone."""
        return self._generation

    def __len__(self) -> int:
        return len(self._by_id)

    def _free_or_own_id(self, digest: bytes) -> int:
        # Two configurations on one number need about 50,000 of them for an even chance.
        # Probing then makes the number depend on which came first; that is the one case
        # where an id from before a restart could name the other of the two.
        for instance_id in candidate_ids(digest):
            holder = self._by_id.get(instance_id)
            if holder is None or holder.digest == digest:
                return instance_id
        raise AssertionError("candidates do not end")  # pragma: no cover - as it says

    def _make(self, name: str, config: bytes) -> Instance:
        return make_instance(self._plugin, name, config, failure=self._failure, log=self._log)

    def _adopt(self, instance: Instance, instance_id: int, digest: bytes) -> None:
        instance.instance_id = instance_id
        instance.digest = digest
        instance.started_at = int(self._wall_clock())
        self._by_id[instance_id] = instance

    def _make_room(self) -> None:
        while len(self._by_id) > self._max_instances:
            oldest = next(iter(self._by_id.values()))
            self._remove(oldest)
            self._evicted.append((self._clock() + self._grace_s, oldest))

    def _remove(self, instance: Instance) -> None:
        del self._by_id[instance.instance_id]
        self._retired.pop(instance.instance_id, None)
        self._generation += 1
