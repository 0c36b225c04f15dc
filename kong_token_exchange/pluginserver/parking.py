"""
Events that wait for another one's `access`, so that they hold no thread.

Where one instance gets several events with the very same facts, one of them, the *owner*, goes
to the pool and the others are *parked*: kept in order, with nobody working on them. When the
owner is through, the parked ones *land*: each is asked through `warm` again, then gets the answer
that the owner offered, and where there is neither it becomes an owner itself or is parked with
the one that did so just before.

Facts are compared as Kong encoded them, byte by byte, and instances by their identity, so that
nothing here depends on what a plugin calls equal. No I/O, no time; used on the loop alone.

Source: docs/adr/0002-own-plugin-server.md.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from kong_token_exchange.pluginserver.contract import Facts, Outcome, Patience
from kong_token_exchange.pluginserver.instances import Instance
from kong_token_exchange.pluginserver.offload import Access

# A crowd of 1,000 on each of four tokens at the same time. A parked event is an open connection and
# some 3 KB of ours, since it shares its facts with the owner: 12 MB at the most.
MAX_PARKED = 4096


class Group:
    """
    Events of one instance with equal facts.

    `again` makes the answer of each that lands, `alone` says that each must run by itself: both
    are known when the owner is through.
    """

    __slots__ = ("again", "alone", "facts", "key", "owner", "parked", "patience")

    def __init__(self, owner: Access, facts: Facts, patience: Patience) -> None:
        self.key = _key(owner)
        self.owner = owner
        self.facts = facts
        self.patience = patience
        self.again: Callable[[], Outcome | None] | None = None
        self.alone = False
        # In the order of their arrival; any of them may leave.
        self.parked: OrderedDict[Access, None] = OrderedDict()


class Parking:
    """Who waits for whom."""

    def __init__(self, limit: int = MAX_PARKED) -> None:
        self._limit = limit
        # Of those that new events may join.
        self._open: dict[tuple[Instance, tuple[bytes, ...]], Group] = {}
        self._group_of: dict[Access, Group] = {}
        # In the order in which their owners were through; none of them is empty.
        self._landing: dict[Group, None] = {}
        self.parked = 0

    @property
    def is_landing(self) -> bool:
        """Tell whether `next` has something."""
        return bool(self._landing)

    def find(self, access: Access) -> Group | None:
        """Return the group that *access* may join."""
        return self._open.get(_key(access))

    def lead(self, access: Access, facts: Facts, patience: Patience) -> None:
        """Make *access*, which is in the pool, the owner of a group that has none."""
        group = Group(access, facts, patience)
        self._open[group.key] = self._group_of[access] = group

    def park(self, access: Access, group: Group) -> bool:
        """Let *access* wait for the group's owner, or return False when too many do."""
        if self.parked >= self._limit:
            return False
        self.parked += 1
        # Equal bytes: one copy is enough for all.
        access.prefetched = group.owner.prefetched
        group.parked[access] = None
        self._group_of[access] = group
        return True

    def group_of(self, access: Access) -> Group | None:
        """Return the group whose owner *access* is, or with which it is parked."""
        return self._group_of.get(access)

    def leave(self, access: Access) -> bool:
        """Let a parked event go; return whether it was one."""
        group = self._group_of.get(access)
        if group is None or access is group.owner:
            return False
        del group.parked[access]
        self._forget(group, access)
        return True

    def end(
        self, owner: Access, again: Callable[[], Outcome | None] | None = None, *, alone: bool = False
    ) -> None:
        """
        Let those land who wait for *owner*; whoever comes from now on finds another.

        Args:
            owner: The event that is through, or that they shall wait for no longer.
            again: Makes the answer of each; None where nothing is to be shared.
            alone: Whether each must run by itself.
        """
        group = self._group_of.get(owner)
        if group is None or owner is not group.owner:
            return
        del self._group_of[owner], self._open[group.key]
        if group.parked:
            group.again, group.alone = again, alone
            self._landing[group] = None

    def next(self) -> tuple[Group, Access] | None:
        """
        Take one that lands, or None when all have.

        Where there is something to share, the one that came first. Where there is not, the one that
        came last: when it has to do the work it has the most time left, and the others can wait for it.
        """
        if not self._landing:
            return None
        group = next(iter(self._landing))
        access, _ = group.parked.popitem(last=group.again is None)
        self._forget(group, access)
        return group, access

    def _forget(self, group: Group, access: Access) -> None:
        del self._group_of[access]
        self.parked -= 1
        if not group.parked:
            self._landing.pop(group, None)


def _key(access: Access) -> tuple[Instance, tuple[bytes, ...]]:
    return access.instance, access.prefetched
