"""Which endpoint takes the next attempt: policies over those that may be picked.

Nothing here blocks, locks or sends; a clock reading is the only input besides what was reported.
"""

import random
from bisect import bisect, bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias

from registry.discovery.endpoint import Endpoint
from registry.errors import InvalidInputError
from registry.model import Key
from registry.telemetry import PickReason

__all__ = ["Candidates", "Pick", "Policy", "named_pick", "power_of_two_choices", "random_choice", "round_robin"]


_FEW = 64
"""Changes up to which each is made in its place; more are sorted in together."""


class Candidates(list[Endpoint]):
    """The endpoints that may be picked, never empty when a policy sees them; changed in place, not built per call.

    In the order in which they were given, or by key once they are updated.
    """

    def __init__(self, endpoints: Sequence[Endpoint] = ()) -> None:
        super().__init__(endpoints)
        self._members = set(endpoints)
        self._weights = Counter(endpoint.instance.weight for endpoint in endpoints)
        self._cumulative = self._accumulated()
        self.weight = sum(endpoint.instance.weight for endpoint in endpoints)
        """All weights together."""
        self.reason: PickReason = "only" if len(self) == 1 else "policy"
        """Why the last pick fell on whom it did; a policy may say."""
        self.halves: Halves | None = None
        """By zones, where that has been asked for."""

    def update(self, added: Iterable[Endpoint], removed: Iterable[Endpoint]) -> bool:
        """Takes these in and those out, unless that is so already; they must all be by key. Whether anything changed.

        A weight must not change while its endpoint is in here.
        """
        joined, left = set(added) - self._members, self._members.intersection(removed)
        if not joined and not left:
            return False
        if len(joined) + len(left) > _FEW:
            self[:] = sorted([endpoint for endpoint in self if endpoint not in left] + [*joined], key=_by_key)
        else:
            for endpoint in left:
                del self[bisect_left(self, endpoint.instance.key, key=_by_key)]
            for endpoint in joined:
                insort(self, endpoint, key=_by_key)
        self._members -= left
        self._members |= joined
        for weight in [endpoint.instance.weight for endpoint in left]:
            self._weights[weight] -= 1
            if not self._weights[weight]:
                del self._weights[weight]
        self._weights.update(endpoint.instance.weight for endpoint in joined)
        self.weight = sum(weight * count for weight, count in self._weights.items())
        self._cumulative, self.halves = self._accumulated(), None
        self.reason = "only" if len(self) == 1 else "policy"
        return True

    def sample(self) -> Endpoint:
        """Any of them, each with a chance in proportion to its weight."""
        return self[self._index()]

    def sample_two(self) -> tuple[Endpoint, Endpoint]:
        """Two different ones; there must be two."""
        one, size = self._index(), len(self)
        if self._cumulative is None:
            two = int(random.random() * (size - 1))
            return self[one], self[two + (two >= one)]
        two = self._index()
        return self[one], self[two if two != one else (one + 1 + int(random.random() * (size - 1))) % size]

    def _index(self) -> int:
        if self._cumulative is not None:
            return bisect(self._cumulative, random.random() * self.weight)
        return int(random.random() * len(self))

    def _accumulated(self) -> list[int] | None:
        """None: the weights are equal."""
        return list(accumulate(endpoint.instance.weight for endpoint in self)) if len(self._weights) > 1 else None


def _by_key(endpoint: Endpoint) -> Key:
    return endpoint.instance.key


@dataclass(frozen=True, slots=True)
class Halves:
    """Those of the caller's own zone, and all others."""

    near: Candidates
    far: Candidates
    share: float
    """The part of the calls that the own zone has instances for."""


Pick = Callable[[Candidates, float], Endpoint]
"""``pick(candidates, now)``: one of them. Called once per attempt; must not block. ``now``: ``time.monotonic()``."""


def power_of_two_choices(candidates: Candidates, now: float) -> Endpoint:
    """The cheaper of two random ones; the one further behind its share when they cost about the same.

    Source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001.
    """
    if len(candidates) == 1:
        return candidates[0]
    one, two = candidates.sample_two()
    cost_one, cost_two = one.cost(now), two.cost(now)
    # Less than twofold is noise; to follow it would give the fastest instance of a fast fleet most of the traffic.
    candidates.reason = "p2c_cost"
    if cost_one >= 2 * cost_two:
        return two
    if cost_two >= 2 * cost_one:
        return one
    candidates.reason = "p2c_turn"
    return one if one.turn <= two.turn else two


def random_choice(candidates: Candidates, now: float) -> Endpoint:
    """Any, in proportion to the weights."""
    return candidates.sample()


def round_robin() -> Pick:
    """A policy that takes one after the other from a random start, whatever their weights. One per upstream."""
    turn = random.randrange(1 << 30)

    def pick(candidates: Candidates, now: float) -> Endpoint:
        nonlocal turn
        turn += 1
        return candidates[turn % len(candidates)]

    return pick


Policy: TypeAlias = Literal["p2c", "random", "round_robin"] | Pick
"""Power of two choices, any by weight, one after the other; or a function."""


def named_pick(policy: Policy) -> Pick:
    """A policy for one upstream: ``"p2c"``, ``"random"``, ``"round_robin"`` or your own. Raises: InvalidInputError."""
    if callable(policy):
        return policy
    if policy == "p2c":
        return power_of_two_choices
    if policy == "random":
        return random_choice
    if policy == "round_robin":
        return round_robin()
    raise InvalidInputError(f"{policy!r} is no balancing policy: pass 'p2c', 'random', 'round_robin' or a function")
