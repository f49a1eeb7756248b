"""Who is listed of one upstream, and which of them this caller knows: kept up to date by what changes.

A caller needs few instances of many: those that it *knows* it sends to, and keeps connections to; the others stay
*outside* until they are needed. Each caller ranks all of them by chance, and knows the first. Who joins or leaves
changes no other's rank, so of all connections to N instances one that leaves moves the Nth part, the least that can be.
"""

import random
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import NamedTuple

from registry.model import Instance, Key, Snapshot

__all__ = ["Change", "Ranking"]


class Change(NamedTuple):
    """What one list has that the one before had not, by key."""

    joined: dict[Key, Instance]
    left: dict[Key, Instance]
    altered: dict[Key, Instance]
    """The same instances, with other tags, metadata or weight: as they are now."""


class Ranking:
    """All that are listed, in the order in which this caller prefers them, and how many of them it knows."""

    def __init__(self, chance: random.Random | None = None) -> None:
        self.snapshot: Snapshot = ()
        self.listed: dict[Key, Instance] = {}
        self._chance = chance or random.Random()
        self._objects: dict[int, Instance] = {}
        """The snapshot by identity."""
        self._ranks: dict[Key, float] = {}
        self._keys: dict[float, Key] = {}
        self._known: list[float] = []
        """The ranks of those, the most preferred last."""
        self._outside: list[float] = []

    def update(self, snapshot: Snapshot) -> Change:
        """The list changed. Who joined is outside at first."""
        change = self._compare(snapshot)
        self.snapshot = snapshot
        for key in change.left:
            rank = self._ranks.pop(key)
            ranks = self._known if self._is_in(self._known, rank) else self._outside
            del self.listed[key], self._keys[rank], ranks[bisect_left(ranks, rank)]
        self.listed |= change.joined
        self.listed |= change.altered
        for key in change.joined:
            rank = self._chance.random()
            while rank in self._keys:
                rank = self._chance.random()
            self._ranks[key], self._keys[rank] = rank, key
            self._outside.append(rank)
        if change.joined:
            self._outside.sort()
        return change

    def _compare(self, after: Snapshot) -> Change:
        """An instance that is the same object as before costs next to nothing."""
        before, self._objects = self._objects, dict(zip(map(id, after), after, strict=True))
        old = {instance.key: instance for instance in map(before.get, before.keys() - self._objects.keys()) if instance}
        new = {
            instance.key: instance
            for instance in map(self._objects.get, self._objects.keys() - before.keys())
            if instance
        }
        # Consul may list a key twice, on two nodes.
        twice = old and len(self.listed) < len(before)
        still = {instance.key: instance for instance in after if instance.key in old} | new if twice else new
        altered = {key: new[key] for key in new.keys() & self.listed.keys()}
        altered |= {key: still[key] for key in old.keys() & still.keys()}
        return Change(
            {key: instance for key, instance in new.items() if key not in self.listed},
            {key: instance for key, instance in old.items() if key not in still},
            {key: instance for key, instance in altered.items() if instance != self.listed[key]},
        )

    def lacks(self, live: int, size: float) -> bool:
        """Whether one more should be known: too few of ``size`` are live, or it is preferred to one that is known."""
        return bool(self._outside) and (live < size or self._outside[-1] > self._known[0])

    def admit(self) -> tuple[Key, Instance]:
        """The most preferred of those outside, which is known from now on."""
        rank = self._outside.pop()
        insort(self._known, rank)
        return self._keys[rank], self.listed[self._keys[rank]]

    @property
    def last(self) -> Key | None:
        """Who is preferred least of those that are known; None: nobody is known."""
        return self._keys[self._known[0]] if self._known else None

    def dismiss(self) -> None:
        """The last of them is outside from now on."""
        insort(self._outside, self._known.pop(0))

    def outside(self) -> Iterator[Instance]:
        """Those that are listed and not known, the most preferred first."""
        return (self.listed[self._keys[rank]] for rank in reversed(self._outside))

    @staticmethod
    def _is_in(ranks: list[float], rank: float) -> bool:
        place = bisect_left(ranks, rank)
        return place < len(ranks) and ranks[place] == rank
