"""Which instance takes the next attempt: policies over endpoints, an endpoint being an instance and its load.

Nothing here blocks, locks or sends; a clock reading is the only input besides what was reported.
"""

import math
import random
from bisect import bisect
from collections.abc import Callable, Sequence
from itertools import accumulate

from registry.errors import InvalidInputError
from registry.model import Instance

__all__ = ["Candidates", "Endpoint", "Pick", "named_pick", "power_of_two_choices", "random_choice", "round_robin"]

DECAY = 0.2
"""Seconds after which an old latency counts for 1/e; doubled by every peak in a row.

One slow answer, a first connection say, is forgotten after about two seconds; an instance that is slow each time that
it is tried again is tried ever more rarely.
"""
MAX_PEAKS = 4
_FLOOR = 1e-4
"""Seconds below which latencies are noise, so that in-flight requests decide among fast instances."""


class Endpoint:
    """One instance as this process sees it: what is under way there and how it has answered."""

    __slots__ = (
        "_latency",
        "_peaks",
        "_updated",
        "ejected_at",
        "ejected_until",
        "ejections",
        "failed_at",
        "failures",
        "instance",
        "picks",
        "refusals",
        "started",
        "turn",
    )

    def __init__(self, instance: Instance, latency: float = 0.0, now: float = 0.0) -> None:
        self.instance = instance
        self.started: dict[object, float] = {}
        """One entry per attempt under way, oldest first: its start."""
        self.picks = 0
        """How often it was picked."""
        self.turn = 0.0
        """How far it is with its share of the picks: each one moves it on by 1 / weight."""
        self.failures = 0
        """Failures in a row."""
        self.failed_at = -math.inf
        """When it failed last, other than by refusing."""
        self.refusals = 0
        """Refused connections in a row."""
        self.ejections = 0
        """How often it was ejected for failures, lately."""
        self.ejected_at = -math.inf
        """When it was ejected last, for whatever reason."""
        self.ejected_until = 0.0
        """0: not ejected."""
        self._latency = latency
        self._updated = now
        self._peaks = 0

    @property
    def in_flight(self) -> int:
        """Attempts under way."""
        return len(self.started)

    @property
    def doubtful(self) -> bool:
        """Whether it failed last, or is ejected: what it answers next is not to be relied on."""
        return self.failures > 0 or self.ejected_until > 0.0

    def latency(self, now: float) -> float:
        """Seconds that an answer takes: a decaying average that jumps to every peak, or the age of the oldest attempt.

        Source: "peak EWMA",
        https://github.com/twitter/finagle/blob/develop/finagle-core/src/main/scala/com/twitter/finagle/loadbalancer/PeakEwma.scala
        """
        decayed = self._latency * self._weight(now)
        if self.started:
            # An instance that hangs has nothing to report: its silence is the sample.
            return max(decayed, now - next(iter(self.started.values())))
        return decayed

    def observe(self, seconds: float, now: float) -> None:
        """An answer took so long."""
        weight = self._weight(now)
        decayed = self._latency * weight
        if seconds > 2 * decayed:
            self._peaks = min(self._peaks + 1, MAX_PEAKS)
        elif 2 * seconds < decayed:
            self._peaks = max(self._peaks - 1, 0)
        self._latency = max(seconds, decayed + seconds * (1 - weight))
        self._updated = now

    def _weight(self, now: float) -> float:
        return math.exp((self._updated - now) / (DECAY * 2**self._peaks))

    def cost(self, now: float) -> float:
        """What one more attempt here would wait for. Weights count among the busy: the idle ones cost the same."""
        return (1 + len(self.started) / self.instance.weight) * (self.latency(now) + _FLOOR)


class Candidates(list[Endpoint]):
    """The endpoints that may be picked, never empty when a policy sees them; built once per change, not per call."""

    def __init__(self, endpoints: Sequence[Endpoint] = ()) -> None:
        super().__init__(endpoints)
        weights = [endpoint.instance.weight for endpoint in endpoints]
        self.weight = sum(weights)
        """All weights together."""
        self._cumulative = list(accumulate(weights)) if len(set(weights)) > 1 else None

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
            return bisect(self._cumulative, random.random() * self._cumulative[-1])
        return int(random.random() * len(self))


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
    if cost_one >= 2 * cost_two:
        return two
    if cost_two >= 2 * cost_one:
        return one
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


def named_pick(policy: str | Pick) -> Pick:
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
