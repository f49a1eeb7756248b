"""One instance as this process sees it: what is under way there, how it has answered, and whether it is left out.

Nothing here blocks, locks or sends.
"""

import math
from dataclasses import dataclass, field

from registry.discovery.group import Group
from registry.discovery.options import EjectionPolicy
from registry.model import Instance
from registry.telemetry import AttemptOutcome, PickReason

__all__ = ["Endpoint", "LastFailure"]

_FLOOR = 1e-4
"""Seconds below which latencies are noise, so that in-flight requests decide among fast instances."""
_AVOIDED = 0.2
"""Seconds that such a failure counts as."""
_DEFAULT = EjectionPolicy()


@dataclass(frozen=True, slots=True)
class LastFailure:
    """A failure that counted against an instance."""

    at: float
    """Unix time."""
    outcome: AttemptOutcome
    words: str


@dataclass(slots=True)
class Counts:
    """What has come of the attempts at one instance; plain integers that only grow."""

    picks: dict[PickReason, int] = field(default_factory=dict)
    outcomes: dict[AttemptOutcome, int] = field(default_factory=dict)
    ejections: dict[AttemptOutcome, int] = field(default_factory=dict)


class Endpoint:
    """One instance, its load and its story: answered, failed, refused, ejected."""

    __slots__ = (
        "_latency",
        "_peaks",
        "_policy",
        "_updated",
        "counts",
        "ejected_at",
        "ejected_because",
        "ejected_until",
        "ejections",
        "failed_at",
        "failures",
        "group",
        "instance",
        "last_failure",
        "reason",
        "refusals",
        "started",
        "turn",
    )

    def __init__(
        self, instance: Instance, latency: float = 0.0, now: float = 0.0, policy: EjectionPolicy = _DEFAULT
    ) -> None:
        self.instance = instance
        self.counts = Counts()
        self.started: dict[object, float] = {}
        """One entry per attempt under way, oldest first: its start."""
        self.reason: PickReason = "policy"
        """Why it was picked last."""
        self.group: Group | None = None
        """Those of its zone, where zones count: they hear how long it takes."""
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
        self.ejected_because: AttemptOutcome | None = None
        """What it was ejected for last."""
        self.last_failure: LastFailure | None = None
        self._policy = policy
        self._latency = latency
        self._updated = now
        self._peaks = 0

    # How it has answered.

    def answered(self, seconds: float, now: float) -> bool:
        """An answer came after so long: what it was ejected for is over, if it was asked after that.

        Returns whether it comes back.
        """
        self.observe(seconds, now)
        if self.ejected_until and self.is_older(seconds, now):
            return False
        back = bool(self.ejected_until)
        self.refusals, self.ejected_until, self.failures = 0, 0.0, 0
        return back

    def declined(self, seconds: float, now: float) -> bool:
        """It executes nothing for now, which it said after so long: less is asked of it for a moment, but it is there.

        Returns whether it comes back. What it failed at before is not forgotten: the next failure ejects it again.
        """
        self.avoid(seconds, now)
        if not self.ejected_until or self.is_older(seconds, now):
            return False
        self.refusals, self.ejected_until = 0, 0.0
        return True

    def refused(self, seconds: float, now: float) -> None:
        """No connection came about, which took so long: it is ejected at once, for a short, doubling time."""
        policy = self._policy
        first, most = policy.refused, policy.max_refused
        if seconds >= policy.slow_connect:
            first, most = seconds, policy.seconds
        self.ejected_at, self.ejected_until = now, now + min(first * 2 ** min(self.refusals, 10), most)
        self.refusals += 1
        # Whoever listens there next is another process.
        self.failures = self.ejections = 0

    def failed(self, now: float) -> bool:
        """A bad answer, or none in time: the fifth in a row ejects it, each time for longer.

        Returns whether it is ejected now, or is no longer for having refused.
        """
        policy, changed = self._policy, self.refusals > 0
        if changed:
            self.refusals, self.ejected_until = 0, 0.0
        self.failed_at = now
        self.failures += 1
        serving = self.ejected_until and now < self.ejected_at + self._ejection
        if self.failures < policy.failures or serving:
            return changed
        self.ejections = 1 if now - self.ejected_at > 2 * policy.max_seconds else self.ejections + 1
        self.ejected_at, self.ejected_until = now, now + self._ejection
        return True

    def is_older(self, seconds: float, now: float) -> bool:
        """Whether an attempt that took so long began before the ejection, and says nothing about the time since."""
        return now - seconds < self.ejected_at

    def is_due(self, now: float, *, safe: bool) -> bool:
        """Whether it is time to try it again. ``safe``: with a call that can be sent again.

        One that answers badly would fail a call that can't be: let a safe one find out.
        """
        if not 0 < self.ejected_until <= now:
            return False
        return safe or self.refusals > 0 or now > self.ejected_until + self._policy.seconds

    def probe(self, now: float) -> None:
        """It is being tried: ejected on until that has an answer, or for as long again if it never gets one."""
        self.ejected_until = now + (self._policy.max_refused if self.refusals else self._policy.seconds)

    def is_suspect(self, now: float) -> bool:
        """Whether calls that can't be sent again should go elsewhere: it has failed last, and not long ago."""
        return self.failures > 0 and now < self.failed_at + self._policy.doubt

    @property
    def doubtful(self) -> bool:
        """Whether it failed last, or is ejected: what it answers next is not to be relied on."""
        return self.failures > 0 or self.ejected_until > 0.0

    @property
    def _ejection(self) -> float:
        return min(self._policy.seconds * self.ejections, self._policy.max_seconds)

    # What one more attempt would wait for.

    @property
    def in_flight(self) -> int:
        """Attempts under way."""
        return len(self.started)

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

    def silence(self, now: float) -> float:
        """Seconds for which it has answered nothing, though asked; 0: it is not asked."""
        return now - max(self._updated, next(iter(self.started.values()))) if self.started else 0.0

    def observe(self, seconds: float, now: float) -> None:
        """An answer took so long."""
        weight = self._weight(now)
        decayed = self._latency * weight
        if seconds > 2 * decayed:
            self._peaks = min(self._peaks + 1, self._policy.latency_peaks)
        elif 2 * seconds < decayed:
            self._peaks = max(self._peaks - 1, 0)
        self._latency = max(seconds, decayed + seconds * (1 - weight))
        self._updated = now
        if self.group is not None:
            self.group.observe(seconds, now)

    def avoid(self, seconds: float, now: float) -> None:
        """It failed after so long, for no reason that speaks against it: to fail quickly must not attract calls."""
        self.observe(max(seconds, _AVOIDED), now)

    def _weight(self, now: float) -> float:
        return math.exp((self._updated - now) / (self._policy.latency_decay * 2**self._peaks))

    def cost(self, now: float) -> float:
        """What one more attempt here would wait for. Weights count among the busy: the idle ones cost the same."""
        return (1 + len(self.started) / self.instance.weight) * (self.latency(now) + _FLOOR)
