"""The counts of every instance, kept a minute longer than the instance itself, for whoever reads them now and then.

Otherwise what came of the last attempts would never be read, each time that an instance leaves.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from registry.discovery.endpoint import Counts
from registry.model import Key
from registry.telemetry import AttemptOutcome

__all__ = ["Ledger"]

KEEP = 60.0
"""Seconds that the counts of one who has left are kept."""
MOST = 1_000
"""So many who have left are remembered, the last ones."""


class Ledger:
    """Key → counts. One who returns in time goes on with its own."""

    def __init__(self) -> None:
        self._counts: dict[Key, Counts] = {}
        self._left: dict[Key, float] = {}
        """Since when nobody calls them, the first to leave first."""

    def of(self, key: Key) -> Counts:
        """Those of one who is called."""
        self._left.pop(key, None)
        return self._counts.setdefault(key, Counts())

    def leave(self, keys: Iterable[Key], now: float) -> None:
        """These are not called any more; they are forgotten in a while."""
        for key in keys:
            if key in self._counts:
                self._left.setdefault(key, now)
        self.expire(now)

    def expire(self, now: float) -> None:
        """Forgets whose time is over."""
        while self._left and (len(self._left) > MOST or now - next(iter(self._left.values())) > KEEP):
            self._forget(next(iter(self._left)))

    @property
    def departed(self) -> dict[str, Mapping[AttemptOutcome, int]]:
        """How attempts ended at those who have left lately, by their ids."""
        found: dict[str, Counter[AttemptOutcome]] = {}
        for key in self._left:
            if outcomes := self._counts[key].outcomes:
                found.setdefault(key[0], Counter()).update(outcomes)
        return dict(found)

    def _forget(self, key: Key) -> None:
        del self._left[key], self._counts[key]
