"""Several datacenters: who is in the next one counts only while nobody passes in those before it."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeAlias
from weakref import WeakKeyDictionary

from registry.consul.watch import Watch
from registry.errors import NoHealthyInstanceError, RegistryError, ServiceNotFoundError
from registry.model import Key, LeftOut, Snapshot, View

__all__ = ["Asked", "Spares", "joint_view", "most_telling"]

Asked: TypeAlias = Sequence[tuple[str | None, Watch]]
"""The watches of one service, each with its datacenter, in the order in which they are asked."""


def most_telling(errors: Iterable[RegistryError]) -> RegistryError:
    """Of why there is nobody in each: that instances do not pass, or that Consul does not say, before "not found"."""
    return min(errors, key=_telling)


def _telling(error: RegistryError) -> int:
    return 0 if isinstance(error, NoHealthyInstanceError) else 2 if isinstance(error, ServiceNotFoundError) else 1


class Spares:
    """What is offered of a datacenter that is not the first.

    Callers derive from it who is lost in those before, too: it is a new object whenever that changes.
    """

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[Watch, tuple[tuple[object, ...], Snapshot]] = WeakKeyDictionary()

    def snapshot(self, watches: Sequence[Watch]) -> Snapshot:
        """Those who pass by the last of these watches, as nobody does by the others."""
        parts = (watches[-1].snapshot, *(watch.view().lost for watch in watches))
        made = self._made.get(watches[-1])
        if made is None or made[0] != parts:
            made = self._made[watches[-1]] = parts, tuple(iter(watches[-1].snapshot))
        return made[1]


def joint_view(watches: Asked) -> View | None:
    """How fresh the answer is, of the datacenter whose instances are offered; None: nobody asked yet."""
    serving = next((number for number, (_, watch) in enumerate(watches) if watch.snapshot), None)
    asked = watches if serving is None else watches[: serving + 1]
    views = [watch.view() for _, watch in asked]
    if not views:
        return None
    known = [view.lost for view in views if view.lost is not None]
    return replace(
        views[0] if serving is None else views[-1],
        error=next((view.error for view in views if view.error is not None), None),
        left_out=tuple(left_out for view in views for left_out in view.left_out) + _elsewhere(watches[len(asked) :]),
        lost=frozenset[Key]().union(*known) if known else None,
        errors=sum(view.errors for view in views),
        datacenter=None if serving is None else watches[serving][0],
    )


def _elsewhere(watches: Asked) -> tuple[LeftOut, ...]:
    """Those who pass where nobody is needed any more."""
    return tuple(
        LeftOut(instance.id, f"in datacenter {name}: asked while nobody passes in those before it", "elsewhere")
        for name, watch in watches
        for instance in watch.snapshot
    )
