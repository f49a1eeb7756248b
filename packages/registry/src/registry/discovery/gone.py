"""Who was listed before and was lost since: asked only when nobody else is left, and forgotten after a while."""

from collections.abc import Callable, Iterable, Mapping, Set
from itertools import islice
from typing import Any

from registry.discovery.balancing import Candidates
from registry.discovery.endpoint import Endpoint
from registry.discovery.options import EjectionPolicy
from registry.model import Instance, Key

__all__ = ["Gone"]


class Gone(dict[Key, tuple[Endpoint, float]]):
    """Key → the endpoint, and when it left; the first to leave first."""

    def __init__(self, policy: EjectionPolicy) -> None:
        super().__init__()
        self.lost: Set[Key] | None = None
        """Which of those that left did so on nobody's order; None: nobody can tell, so all of them."""
        self.candidates = Candidates()
        self._policy = policy
        self._outside: dict[Key, tuple[Instance, float]] = {}
        """Those that this caller did not know: they become endpoints when the others are not enough."""

    def follow(
        self,
        joined: Iterable[Key],
        left: Mapping[Key, Endpoint | Instance],
        lost: Set[Key] | None,
        now: float,
    ) -> list[Key]:
        """The list changed. Returns who is not remembered, or not any more."""
        known = {key: (one, now) for key, one in left.items() if isinstance(one, Endpoint)}
        outside = {key: (one, now) for key, one in left.items() if isinstance(one, Instance)}
        stores: tuple[dict[Key, Any], ...] = (self, self._outside, known, outside)
        forgotten = [key for key in joined if key in self or key in self._outside]
        forgotten += [key for store in stores[:2] for key in self._expired(store, now)]
        if lost is not None:
            forgotten += [key for store in stores for key in store.keys() - lost]
        self.lost = lost
        self |= known
        self._outside |= outside
        dropped = self._drop(forgotten)
        excess = [*islice(self, max(0, len(self) - self._policy.remember_at_most))]
        excess += [*islice(self._outside, max(0, len(self._outside) - self._policy.remember_at_most))]
        dropped += self._drop(excess)
        self.candidates.update([self[key][0] for key in known if key in self], dropped)
        return forgotten + excess

    def forget(self, endpoint: Endpoint) -> bool:
        """Nothing speaks for it any more; whether it was remembered."""
        key = endpoint.instance.key
        if key not in self or self[key][0] is not endpoint:
            return False
        self.candidates.update((), self._drop([key]))
        return True

    def reach(self, size: float, make: Callable[[Key, Instance], Endpoint]) -> None:
        """Makes endpoints of those that were not known, until there are so many."""
        added = []
        while self._outside and len(self) < size:
            key = next(iter(self._outside))
            instance, since = self._outside.pop(key)
            self[key] = make(key, instance), since
            added.append(self[key][0])
        self.candidates.update(added, ())

    def __bool__(self) -> bool:
        return bool(len(self) or self._outside)

    def _expired(self, store: Mapping[Key, tuple[Any, float]], now: float) -> list[Key]:
        found = []
        for key, (_, since) in store.items():
            if now - since < self._policy.remember:
                break
            found.append(key)
        return found

    def _drop(self, keys: Iterable[Key]) -> list[Endpoint]:
        """Returns which endpoints that were."""
        dropped = []
        for key in keys:
            self._outside.pop(key, None)
            if (entry := self.pop(key, None)) is not None:
                dropped.append(entry[0])
        return dropped
