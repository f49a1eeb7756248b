"""The endpoints of one upstream: who may be picked, who is ejected, and what is left when Consul knows nobody.

Ejection carries the circuit breaker too: when every endpoint is ejected and fails still, calls fail fast for a short,
doubling time, and one probe decides.
"""

import math
import time
from collections.abc import Callable, Collection

from registry.balancing import Candidates, Endpoint, Pick, power_of_two_choices
from registry.errors import NoHealthyInstanceError
from registry.model import Snapshot
from registry.retry import Failure

__all__ = ["Pool"]

Key = tuple[str, str, int]

FAILURES_TO_EJECT = 5
EJECTION = 30.0
MAX_EJECTION = 300.0
REFUSED = 0.1
"""Seconds of the first ejection after a refused connection; doubling."""
MAX_REFUSED = 0.8
"""A returning instance must be found within a second."""
KEEP_GONE = 60.0
"""Seconds that an endpoint which Consul no longer lists is remembered while others serve."""


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
        """What it listed before, and when each left: asked only when nothing else is left."""
        self._pick = pick
        self._clock = clock
        self._candidates = Candidates()
        self._last_resort = Candidates()
        self._live = 0
        self._next_probe = math.inf
        self._open_until = 0.0
        self._open_for = 0.0

    def update(self, snapshot: Snapshot) -> None:
        """Consul's view changed. What is known of endpoints that stay is kept; one that returns starts anew."""
        now = self._clock()
        before, self.endpoints, self.snapshot = self.endpoints, {}, snapshot
        latency = picks = 0.0
        for endpoint in before.values():
            latency += endpoint.latency(now) / len(before)
            picks += endpoint.picks / endpoint.instance.weight / len(before)
        for instance in snapshot:
            key = (instance.id, instance.address, instance.port)
            endpoint = before.pop(key) if key in before else Endpoint(instance, latency, picks * instance.weight, now)
            endpoint.instance = instance
            self.endpoints[key] = endpoint
        left = {key: (endpoint, now) for key, endpoint in before.items()}
        self.gone = {
            key: (endpoint, since)
            for key, (endpoint, since) in (self.gone | left).items()
            if key not in self.endpoints and (not snapshot or now - since < KEEP_GONE)
        }
        self._rebuild()

    def pick(self, tried: Collection[Endpoint], *, safe: bool) -> Endpoint | None:
        """An endpoint not yet tried; None when there is none, or when every one fails and it is not yet time to try.

        ``safe``: the call can be sent again, so that it may be the probe of an endpoint that answered badly.
        """
        now = self._clock()
        endpoint = self._probe(tried, now, safe) if now >= self._next_probe else None
        if endpoint is None:
            endpoint = self._half_open(tried, now) if self._open_until else self._choose(self._candidates, tried, now)
        if endpoint is None:
            return self._choose(self._last_resort, tried, now)
        endpoint.picks += 1
        return endpoint

    def succeeded(self, endpoint: Endpoint, seconds: float) -> None:
        """The endpoint answered: what it was ejected for is over, unless the attempt began before."""
        now = self._clock()
        endpoint.observe(seconds, now)
        endpoint.failures = 0
        if endpoint.ejected_until and now - seconds >= endpoint.since:
            self._reinstate(endpoint)

    def failed(self, endpoint: Endpoint, failure: Failure, seconds: float) -> None:
        """The attempt failed: not sent ejects at once, the fifth other failure in a row ejects for longer."""
        now = self._clock()
        key = _key(endpoint)
        if key in self.gone:
            endpoint.failures += 1
            # Gone from Consul, and no answer either: nothing speaks for it any more. A bad answer is one all the same.
            if failure is Failure.NOT_SENT or endpoint.failures >= FAILURES_TO_EJECT:
                del self.gone[key]
                self._rebuild()
            return
        if self._live == 0:
            self._open_for = min(2 * self._open_for or REFUSED, MAX_REFUSED)
            self._open_until = now + self._open_for
        if failure is Failure.NOT_SENT:
            if endpoint.refusals and now - seconds < endpoint.since:
                return  # one of several that were under way when it was ejected: no new refusal
            # A time-out is dear to find out again, a refusal costs next to nothing.
            first, most = (REFUSED, MAX_REFUSED) if seconds < REFUSED else (seconds, EJECTION)
            endpoint.ejected_until = now + min(first * 2**endpoint.refusals, most)
            endpoint.refusals += 1
            endpoint.since = now
        else:
            endpoint.observe(seconds, now)
            if endpoint.refusals and now - seconds >= endpoint.since:
                self._reinstate(endpoint)
            endpoint.failures += 1
            if endpoint.failures < FAILURES_TO_EJECT or now < endpoint.ejected_at + _ejection(endpoint.ejections):
                return
            endpoint.ejections = 1 if now - endpoint.ejected_at > 2 * MAX_EJECTION else endpoint.ejections + 1
            endpoint.ejected_at = endpoint.since = now
            endpoint.ejected_until = now + _ejection(endpoint.ejections)
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

    def _rebuild(self) -> None:
        live = [endpoint for endpoint in self.endpoints.values() if not endpoint.ejected_until]
        ejected = [endpoint for endpoint in self.endpoints.values() if endpoint.ejected_until]
        self._live = len(live)
        self._next_probe = min((endpoint.ejected_until for endpoint in ejected), default=math.inf)
        if live:
            self._open_until = self._open_for = 0.0
        if 2 * len(live) < len(self.endpoints):
            # Too few to carry the load: those that answered badly may still answer well enough.
            live += [endpoint for endpoint in ejected if not endpoint.refusals or not self._live]
        self._candidates = Candidates(live)
        self._last_resort = Candidates([endpoint for endpoint, _ in self.gone.values()])

    def _choose(self, candidates: Candidates, tried: Collection[Endpoint], now: float) -> Endpoint | None:
        if not candidates:
            return None
        endpoint = self._pick(candidates, now)
        if endpoint not in tried:
            return endpoint
        untried = Candidates([endpoint for endpoint in candidates if endpoint not in tried])
        return self._pick(untried, now) if untried else None

    def _probe(self, tried: Collection[Endpoint], now: float, safe: bool) -> Endpoint | None:
        for endpoint in self.endpoints.values():
            if not 0 < endpoint.ejected_until <= now or endpoint in tried:
                continue
            # An endpoint that answers badly would fail a call that can't be repeated: let a safe one find out.
            if safe or endpoint.refusals or now > endpoint.ejected_until + EJECTION:
                # Ejected on until the probe has an answer, or for as long again if it never gets one.
                endpoint.ejected_until = now + (MAX_REFUSED if endpoint.refusals else EJECTION)
                self._rebuild()
                return endpoint
        self._next_probe = now + REFUSED  # nobody was fit for it: don't look again at every call
        return None

    def _half_open(self, tried: Collection[Endpoint], now: float) -> Endpoint | None:
        untried = [endpoint for endpoint in self.endpoints.values() if endpoint not in tried]
        if now < self._open_until or not untried:
            return None
        self._open_until = now + self._open_for
        return min(untried, key=lambda endpoint: endpoint.ejected_until)


def _ejection(times: int) -> float:
    return min(EJECTION * times, MAX_EJECTION)


def _key(endpoint: Endpoint) -> Key:
    return endpoint.instance.id, endpoint.instance.address, endpoint.instance.port
