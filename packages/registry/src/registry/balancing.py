"""Which instance takes the next attempt."""

import random
from collections.abc import Callable, Collection

from registry.model import Instance, Snapshot

__all__ = ["Pick", "random_pick"]

Pick = Callable[[Snapshot, Collection[Instance]], Instance | None]
"""``pick(snapshot, tried)``: an instance that is not among the tried ones, None when all are. Never blocks."""


def random_pick(snapshot: Snapshot, tried: Collection[Instance]) -> Instance | None:
    """Any untried instance, each with the same chance."""
    untried = [instance for instance in snapshot if instance not in tried] if tried else snapshot
    return random.choice(untried) if untried else None
