"""The endpoints of one upstream: who may be picked, who is ejected, and what is left when Consul knows nobody.

Ejection carries the circuit breaker too: when every endpoint is ejected and fails still, calls fail fast for a short,
doubling time, and one probe decides.
"""

import math
import random
import time
from collections.abc import Callable, Collection, Set

from registry.discovery.balancing import Candidates, Endpoint, Pick, power_of_two_choices
from registry.discovery.blame import Failure
from registry.errors import NoHealthyInstanceError
from registry.model import Key, Snapshot

__all__ = ["Pool"]

FAILURES_TO_EJECT = 5
EJECTION = 30.0
MAX_EJECTION = 300.0
REFUSED = 0.1
"""Seconds of the first ejection after a refused connection, and of the first failing fast; both double."""
MAX_REFUSED = 0.8
"""A returning instance must be found within a second."""
DEAR = 0.5
"""Seconds from which an attempt to connect was no refusal but a time-out, which is dear to find out again."""
DOUBT = 10.0
"""Seconds after a bad answer that calls which can't be sent again go elsewhere, to leave the finding out to others."""
PROBE_EVERY = 0.1
"""Seconds between probes, of whichever endpoint: the retry budget pays for failed ones, and gives 10 a second."""
KEEP_GONE = 60.0
"""Seconds that an endpoint which Consul no longer lists is remembered while others serve."""
MAX_GONE = 10_000
"""So many of them are remembered, the last that left."""
LEAD = 4.0
"""Turns that an endpoint may be ahead or behind: one that was avoided must not make up for all it missed."""


class Pool:
    """Tracks the endpoints of one (service, tag). One event loop, no lock, no I/O."""

    def __init__(
        self, service: str, pick: Pick = power_of_two_choices, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.service = service
        self.snapshot: Snapshot = ()
        self.endpoints: dict[Key, Endpoint] = {}
        """What Consul lists as passing."""
        self.gone: dict[Key, tuple[Endpoint, float]] = {}
        """What it listed before and has lost since, and when each left: asked only when nothing else is left."""
        self.lost: Set[Key] | None = None
        """Which of those that left did so on nobody's order; None: nobody can tell, so all of them."""
        self._pick = pick
        self._clock = clock
        self._candidates = Candidates()
        self._last_resort = Candidates()
        self._live = 0
        self._turn, self._step = 0.0, 1.0
        self._probed = self._next_probe = -math.inf
        self._open_until = 0.0
        self._open_for = 0.0

    def update(self, snapshot: Snapshot, lost: Set[Key] | None = None) -> None:
        """Consul's view changed. What is known of endpoints that stay is kept; one that returns starts anew.

        Of those that are listed no more only the ``lost`` are remembered: an operator's order is no loss.
        """
        now = self._clock()
        before, self.endpoints, self.snapshot, self.lost = self.endpoints, {}, snapshot, lost
        # A newcomer is as good as the best until it shows, or it would be flooded, or starved by a slow one's average.
        best = min((endpoint.latency(now) for endpoint in before.values() if not endpoint.ejected_until), default=0.0)
        for instance in snapshot:
            key = instance.key
            endpoint = before.pop(key, None) or Endpoint(instance, best, now)
            endpoint.instance = instance
            self.endpoints[key] = endpoint
        gone = self.gone | {key: (endpoint, now) for key, endpoint in before.items()}
        kept = [
            (key, (endpoint, since))
            for key, (endpoint, since) in gone.items()
            if key not in self.endpoints and now - since < KEEP_GONE and (lost is None or key in lost)
        ]
        self.gone = dict(kept[-MAX_GONE:])
        self._rebuild()

    def pick(self, tried: Collection[Endpoint], *, safe: bool) -> Endpoint | None:
        """An endpoint not yet tried; None when there is none, or when every one fails and it is not yet time to try.

        ``safe``: the call can be sent again, so that it may be the probe of an endpoint that answered badly.
        """
        now = self._clock()
        # At most one probe in a call: it must have attempts left for those that are known to work.
        endpoint = self._probe(now, safe) if now >= self._next_probe and not tried else None
        if endpoint is None:
            endpoint = self._half_open(tried, now) if self._open_until else self._choose(self._candidates, tried, now)
        if endpoint is None and not self._live:
            endpoint = self._choose(self._last_resort, tried, now)
        if endpoint is not None and endpoint.failures and not safe and now < endpoint.failed_at + DOUBT:
            endpoint = self._trusted(tried, now) or endpoint
        if endpoint is not None:
            self._turn += self._step
            endpoint.turn = min(max(endpoint.turn, self._turn - LEAD), self._turn + LEAD) + 1 / endpoint.instance.weight
            endpoint.picks += 1
        return endpoint

    def succeeded(self, endpoint: Endpoint, seconds: float) -> None:
        """The endpoint answered: whatever it was ejected for is over, if it was asked after that."""
        now = self._clock()
        endpoint.observe(seconds, now)
        if endpoint.ejected_until:
            if now - seconds < endpoint.ejected_at:
                return
            self._reinstate(endpoint)
        endpoint.failures = 0

    def failed(self, endpoint: Endpoint, failure: Failure, seconds: float) -> None:
        """The attempt failed: not sent ejects at once, the fifth other failure in a row ejects for longer."""
        now = self._clock()
        if failure is not Failure.NOT_SENT:
            endpoint.observe(seconds, now)
        if self.endpoints.get(endpoint.instance.key) is not endpoint:
            self._failed_unlisted(endpoint, failure)
            return
        if endpoint.ejected_until and now - seconds < endpoint.ejected_at:
            return  # It began before the ejection, and says nothing about the time since.
        if not self._live and not self._open_until:
            self._open_for = REFUSED
            self._open_until = now + REFUSED
        if failure is Failure.NOT_SENT:
            first, most = (REFUSED, MAX_REFUSED) if seconds < DEAR else (seconds, EJECTION)
            endpoint.ejected_until = now + min(first * 2 ** min(endpoint.refusals, 10), most)
            endpoint.refusals += 1
            # Whoever listens there next is another process.
            endpoint.failures = endpoint.ejections = 0
        else:
            if endpoint.refusals:
                self._reinstate(endpoint)
            endpoint.failed_at = now
            endpoint.failures += 1
            serving = endpoint.ejected_until and now < endpoint.ejected_at + _ejection(endpoint.ejections)
            if endpoint.failures < FAILURES_TO_EJECT or serving:
                return
            endpoint.ejections = 1 if now - endpoint.ejected_at > 2 * MAX_EJECTION else endpoint.ejections + 1
            endpoint.ejected_until = now + _ejection(endpoint.ejections)
        endpoint.ejected_at = now
        self._rebuild()

    def unavailable(self) -> NoHealthyInstanceError:
        """Why ``pick`` found nothing on a first attempt."""
        error = NoHealthyInstanceError(self.service, len(self.endpoints))
        if self._open_until:
            error.args = (
                f"Service '{self.service}': every one of its {len(self.endpoints)} instances fails; "
                f"next try in {self.failing_fast_for:.1f} s",
            )
        return error

    @property
    def knows_any(self) -> bool:
        """Whether there is any endpoint, listed or gone."""
        return bool(self.endpoints or self.gone)

    @property
    def failing_fast_for(self) -> float:
        """Seconds that calls are turned away because every endpoint fails; 0: they are not."""
        return max(0.0, min(self._open_until, self._next_probe) - self._clock())

    def _reinstate(self, endpoint: Endpoint) -> None:
        endpoint.refusals, endpoint.ejected_until = 0, 0.0
        self._rebuild()

    def _failed_unlisted(self, endpoint: Endpoint, failure: Failure) -> None:
        endpoint.failures += 1
        if failure is Failure.NOT_SENT or endpoint.failures >= FAILURES_TO_EJECT:
            # Gone from Consul, and no good answer either: nothing speaks for it any more.
            self.gone.pop(endpoint.instance.key, None)
            self._rebuild()

    def _rebuild(self) -> None:
        live = [endpoint for endpoint in self.endpoints.values() if not endpoint.ejected_until]
        ejected = [endpoint for endpoint in self.endpoints.values() if endpoint.ejected_until]
        self._live = len(live)
        due = min((endpoint.ejected_until for endpoint in ejected), default=math.inf)
        self._next_probe = max(due, self._probed + PROBE_EVERY)
        if live or not ejected:
            self._open_until = self._open_for = 0.0
        if 2 * len(live) < len(self.endpoints):
            # Too few to carry the load: those that answered badly may still answer well enough.
            live += [endpoint for endpoint in ejected if not endpoint.refusals or not self._live]
        self._candidates = Candidates(live)
        self._last_resort = Candidates([endpoint for endpoint, _ in self.gone.values()])
        self._step = 1 / (self._candidates.weight or self._last_resort.weight or 1)

    def _choose(self, candidates: Candidates, tried: Collection[Endpoint], now: float) -> Endpoint | None:
        if not candidates:
            return None
        endpoint = self._pick(candidates, now)
        if endpoint not in tried:
            return endpoint
        untried = Candidates([endpoint for endpoint in candidates if endpoint not in tried])
        return self._pick(untried, now) if untried else None

    def _trusted(self, tried: Collection[Endpoint], now: float) -> Endpoint | None:
        """One that has not failed last; None when these are too few to carry the load of the others, too."""
        trusted = [endpoint for endpoint in self._candidates if not endpoint.failures and endpoint not in tried]
        enough = trusted and 2 * len(trusted) >= len(self._candidates)
        return self._pick(Candidates(trusted), now) if enough else None

    def _probe(self, now: float, safe: bool) -> Endpoint | None:
        self._probed = now
        due = [
            endpoint
            for endpoint in self.endpoints.values()
            if 0 < endpoint.ejected_until <= now
            # One that answers badly would fail a call that can't be repeated: let a safe one find out.
            and (safe or endpoint.refusals or now > endpoint.ejected_until + EJECTION)
        ]
        if not due:
            self._next_probe = now + PROBE_EVERY
            return None
        endpoint = min(due, key=lambda endpoint: endpoint.ejected_until)
        # Ejected on until the probe has an answer, or for as long again if it never gets one.
        endpoint.ejected_until = now + (MAX_REFUSED if endpoint.refusals else EJECTION)
        self._rebuild()
        if self._open_until:
            self._stay_open(now)
        return endpoint

    def _half_open(self, tried: Collection[Endpoint], now: float) -> Endpoint | None:
        if not tried:
            if now < self._open_until:
                return None
            self._stay_open(now)
        # A call that is under way goes on to the others, so that one probe finds the one that is back.
        untried = [endpoint for endpoint in self.endpoints.values() if endpoint not in tried]
        return random.choice(untried) if untried else None

    def _stay_open(self, now: float) -> None:
        self._open_for = min(2 * self._open_for, MAX_REFUSED)
        self._open_until = now + self._open_for


def _ejection(times: int) -> float:
    return min(EJECTION * times, MAX_EJECTION)
