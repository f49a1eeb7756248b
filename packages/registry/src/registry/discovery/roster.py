"""The endpoints of one upstream: of all that are listed those that this caller knows, and who was lost."""

import math
import random
from collections.abc import Iterable, Set
from itertools import islice

from registry.discovery.endpoint import Endpoint
from registry.discovery.gone import Gone
from registry.discovery.ledger import Ledger
from registry.discovery.options import EjectionPolicy
from registry.discovery.ranking import Change, Ranking
from registry.model import Instance, Key, Snapshot

__all__ = ["Roster"]

SLICE = 500
"""So many endpoints are made at once; more wait for the next pick, for each takes some microseconds."""
COMPARED = 100
"""So many tell how soon the best of them answers."""


class Roster:
    """Makes endpoints of instances, and forgets them. Each change costs what changed, whatever else is listed."""

    def __init__(
        self, policy: EjectionPolicy | None = None, size: float = math.inf, chance: random.Random | None = None
    ) -> None:
        self.size = size
        """How many are known while all of them work; one more for each that is ejected."""
        self.ranking = Ranking(chance)
        self.endpoints: dict[Key, Endpoint] = {}
        """Those that are listed and known."""
        self.policy = policy or EjectionPolicy()
        self.gone = Gone(self.policy)
        self.ledger = Ledger()

    def update(
        self, snapshot: Snapshot, lost: Set[Key] | None, now: float
    ) -> tuple[Change, list[Endpoint], dict[Endpoint, Instance]]:
        """The list changed: how, which endpoints left, what others are from now on. ``fill`` has to follow."""
        change = self.ranking.update(snapshot)
        left = {key: self.endpoints.pop(key, instance) for key, instance in change.left.items()}
        self.ledger.leave(self.gone.follow(change.joined, left, lost, now), now)
        altered = {self.endpoints[key]: instance for key, instance in change.altered.items() if key in self.endpoints}
        return change, [endpoint for endpoint in left.values() if isinstance(endpoint, Endpoint)], altered

    def fill(self, live: int, working: Iterable[Endpoint], now: float) -> tuple[set[Endpoint], bool]:
        """Knows as many as are to be known, when so many are not ejected; ``working``: such as may be picked.

        Returns who is new or not known any more, and whether that has to go on with the next pick.
        """
        ranking, changed = self.ranking, set[Endpoint]()
        if ranking.lacks(live, self.size):
            # A newcomer is as good as the best until it shows, or it would be flooded, or starved by a slow one's
            # average.
            compared = [each.latency(now) for each in islice(working, COMPARED) if not each.ejected_until]
            best = min(compared, default=0.0)
            while ranking.lacks(live, self.size) and len(changed) < SLICE:
                key, instance = ranking.admit()
                endpoint = self.endpoints[key] = self._new(key, instance, now, best)
                changed.add(endpoint)
                live += 1
        while (last := ranking.last) is not None:
            endpoint = self.endpoints[last]
            live -= not endpoint.ejected_until
            if live < self.size:
                break
            ranking.dismiss()
            changed ^= {self.endpoints.pop(last)}
            self.ledger.leave([last], now)
        return changed, len(changed) >= SLICE

    def beyond(self, tried: Iterable[Endpoint], now: float) -> Endpoint | None:
        """One that is listed and not known, for a call that has tried those that are; None: there is none."""
        keys = {endpoint.instance.key for endpoint in tried}
        for instance in self.ranking.outside():
            if instance.key not in keys:
                endpoint = self._new(instance.key, instance, now)
                self.ledger.leave([instance.key], now)
                return endpoint
        return None

    def reach(self, now: float) -> None:
        """Of those that are gone, as many as are to be known may be asked."""
        self.gone.reach(min(self.size, SLICE), lambda key, instance: self._new(key, instance, now))

    def forget(self, endpoint: Endpoint, now: float) -> bool:
        """Nothing speaks for one that is gone, any more; whether it was remembered."""
        remembered = self.gone.forget(endpoint)
        if remembered:
            self.ledger.leave([endpoint.instance.key], now)
        return remembered

    def lists(self, endpoint: Endpoint) -> bool:
        """Whether it is one of those that are listed and known."""
        return self.endpoints.get(endpoint.instance.key) is endpoint

    def _new(self, key: Key, instance: Instance, now: float, latency: float = 0.0) -> Endpoint:
        endpoint = Endpoint(instance, latency, now, self.policy)
        endpoint.counts = self.ledger.of(key)
        return endpoint
