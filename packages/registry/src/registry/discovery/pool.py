"""The endpoints of one upstream: who may be picked, who is ejected, and what is left when Consul knows nobody.

Ejection carries the circuit breaker too: when every endpoint is ejected and fails still, calls fail fast for a short,
doubling time, and one probe decides.
"""

import math
import random
import time
from collections.abc import Callable, Collection, Iterable, Set

from registry.discovery.balancing import Candidates, Pick, power_of_two_choices
from registry.discovery.blame import Failure
from registry.discovery.breaker import Breaker
from registry.discovery.endpoint import Endpoint, LastFailure
from registry.discovery.group import Group
from registry.discovery.ranking import Change
from registry.discovery.roster import Roster
from registry.discovery.zones import ZoneFirst
from registry.errors import NoHealthyInstanceError
from registry.model import Key, Snapshot
from registry.telemetry import AttemptOutcome, Event, EventKind, Observers, PickReason

__all__ = ["Pool"]


class Pool:
    """Tracks the endpoints of one (service, tag). One event loop, no lock, no I/O."""

    def __init__(
        self,
        service: str,
        pick: Pick = power_of_two_choices,
        clock: Callable[[], float] = time.monotonic,
        observers: Observers | None = None,
        zone: str | None = None,
        roster: Roster | None = None,
    ) -> None:
        self.service = service
        self.roster = roster or Roster()
        self._policy = self.roster.policy
        self._observers = observers or Observers()
        self.endpoints, self.gone, self.ledger = self.roster.endpoints, self.roster.gone, self.roster.ledger
        self.zones = None if zone is None else ZoneFirst(pick, zone)
        self._pick, self._all = self.zones or pick, Group()
        self._clock = clock
        self._candidates, self._last_resort = Candidates(), self.gone.candidates
        self._ejected: set[Endpoint] = set()
        self._scarcity = (False, False)
        """Whether too few are not ejected, and whether none is."""
        self._live, self._unfilled = 0, False
        self._probed = self._next_probe = -math.inf
        self._breaker = Breaker(self._policy)

    def update(self, snapshot: Snapshot, lost: Set[Key] | None = None) -> Change:
        """Consul's view changed: returns how. What is known of endpoints that stay is kept; one that returns is new.

        Of those that are listed no more only the ``lost`` are remembered: an operator's order is no loss.
        """
        now = self._clock()
        change, left, altered = self.roster.update(snapshot, lost, now)
        self._candidates.update((), altered)
        for endpoint, instance in altered.items():
            endpoint.instance = instance
        self._settle([*left, *altered], now)
        return change

    @property
    def snapshot(self) -> Snapshot:
        """What Consul lists as passing."""
        return self.roster.ranking.snapshot

    def pick(self, tried: Collection[Endpoint], *, safe: bool) -> Endpoint | None:
        """An endpoint not yet tried; None when there is none, or when every one fails and it is not yet time to try.

        ``safe``: the call can be sent again, so that it may be the probe of an endpoint that answered badly.
        """
        now = self._clock()
        if self._unfilled:
            self._settle((), now)
        # At most one probe in a call: it must have attempts left for those that are known to work.
        endpoint = self._probe(now, safe) if now >= self._next_probe and not tried else None
        reason: PickReason = "probe"
        if endpoint is None and self._breaker.until:
            endpoint, reason = self._half_open(tried, now), "half_open"
        elif endpoint is None:
            endpoint, reason = self._choose(self._candidates, tried, now)
            if endpoint is None and tried:
                endpoint = self.roster.beyond(tried, now)
        if endpoint is None and not self._live:
            endpoint, reason = self._choose(self._last_resort, tried, now)[0], "last_resort"
        if endpoint is not None and not safe and endpoint.is_suspect(now):
            trusted = self._trusted(tried, now)
            if trusted is not None:
                endpoint, reason = trusted, "trusted"
        if endpoint is not None:
            endpoint.turn = (endpoint.group or self._all).take_turn(endpoint.turn, endpoint.instance.weight)
            endpoint.reason = reason
            picks = endpoint.counts.picks
            picks[reason] = picks.get(reason, 0) + 1
        return endpoint

    def succeeded(self, endpoint: Endpoint, seconds: float, *, executed: bool = True) -> None:
        """The endpoint answered after so long; not ``executed``: that it does nothing for now."""
        told = endpoint.answered if executed else endpoint.declined
        now = self._clock()
        if told(seconds, now):
            self._tell("reinstated", endpoint, reason=endpoint.ejected_because)
            self._settle([endpoint], now)

    def failed(
        self, endpoint: Endpoint, failure: Failure, seconds: float, outcome: AttemptOutcome = "error", words: str = ""
    ) -> None:
        """The attempt failed, for which the endpoint is to blame; ``outcome`` and ``words`` are for those who watch."""
        now = self._clock()
        endpoint.last_failure = LastFailure(time.time(), outcome, words)
        if failure is not Failure.NOT_SENT:
            endpoint.observe(seconds, now)
        if not self.roster.lists(endpoint):
            self._failed_unlisted(endpoint, failure, now)
            return
        if endpoint.ejected_until and endpoint.is_older(seconds, now):
            return
        if not self._live and not self._breaker.until:
            self._tell("failing_fast", endpoint, reason=outcome, seconds=self._breaker.open(now))
        changed, before = True, endpoint.ejected_until
        if failure is Failure.NOT_SENT:
            endpoint.refused(seconds, now)
        else:
            changed = endpoint.failed(now)
        if endpoint.ejected_until:
            self._tell_ejected(endpoint, outcome, now, anew=not before)
        elif before:
            self._tell("reinstated", endpoint, reason=endpoint.ejected_because)
        if changed:
            self._settle([endpoint], now)

    def unavailable(self) -> NoHealthyInstanceError:
        """Why ``pick`` found nothing on a first attempt."""
        error = NoHealthyInstanceError(self.service, len(self.snapshot))
        if self._breaker.until:
            error.args = (
                f"Service '{self.service}': every one of its {len(self.snapshot)} instances fails; "
                f"next try in {self.failing_fast_for:.1f} s",
            )
        return error

    @property
    def knows_any(self) -> bool:
        """Whether there is any endpoint, listed or gone."""
        return bool(self.snapshot or self.gone)

    @property
    def failing_fast_for(self) -> float:
        """Seconds that calls are turned away because every endpoint fails; 0: they are not."""
        return max(0.0, min(self._breaker.until, self._next_probe) - self._clock())

    def _tell_ejected(self, endpoint: Endpoint, outcome: AttemptOutcome, now: float, *, anew: bool) -> None:
        endpoint.ejected_because = outcome
        if anew:
            ejections = endpoint.counts.ejections
            ejections[outcome] = ejections.get(outcome, 0) + 1
            self._tell("ejected", endpoint, reason=outcome, seconds=endpoint.ejected_until - now)

    def _tell(
        self, kind: EventKind, endpoint: Endpoint | None = None, reason: str | None = None, seconds: float | None = None
    ) -> None:
        if self._observers.of_events:
            instance = endpoint.instance.id if endpoint else None
            words = endpoint.last_failure.words if endpoint and endpoint.last_failure else ""
            self._observers.happened(Event(kind, self.service, instance, reason or "", words, seconds))

    def _failed_unlisted(self, endpoint: Endpoint, failure: Failure, now: float) -> None:
        endpoint.failures += 1
        # Gone from Consul, and no good answer either: nothing speaks for it any more.
        hopeless = failure is Failure.NOT_SENT or endpoint.failures >= self._policy.failures
        if hopeless and self.roster.forget(endpoint, now):
            self._settle((), now)

    def _settle(self, touched: Iterable[Endpoint], now: float) -> None:
        """Draws the conclusions from a change of these: who is known, who may be picked, when the next probe is due."""
        lists, ejected, touched = self.roster.lists, self._ejected, set(touched)
        for endpoint in touched:
            (ejected.add if endpoint.ejected_until and lists(endpoint) else ejected.discard)(endpoint)
        changed, self._unfilled = self.roster.fill(len(self.endpoints) - len(ejected), self._candidates, now)
        touched |= changed
        ejected -= {endpoint for endpoint in changed if not lists(endpoint)}
        self._live = live = len(self.endpoints) - len(ejected)
        due = min((endpoint.ejected_until for endpoint in ejected), default=math.inf)
        self._next_probe = max(due, self._probed + self._policy.probe_interval)
        if (live or not ejected) and self._breaker.close():
            self._tell("recovered")
        # Too few to carry the load: those that answered badly may still answer well enough.
        few = 2 * live < min(len(self.endpoints), self.roster.size)
        if self._scarcity != (few, not live):
            self._scarcity = few, not live
            touched |= ejected
        usable = {
            endpoint
            for endpoint in touched
            if lists(endpoint) and (not endpoint.ejected_until or (few and (not endpoint.refusals or not live)))
        }
        self._candidates.update(usable, touched - usable)
        if not live:
            self.roster.reach(now)
        self._all.step = 1 / (self._candidates.weight or self._last_resort.weight or 1)
        if self.zones:
            self.zones.rebuilt(self._candidates or self._last_resort)

    def _choose(
        self, candidates: Candidates, tried: Collection[Endpoint], now: float
    ) -> tuple[Endpoint | None, PickReason]:
        if not candidates:
            return None, candidates.reason
        endpoint = self._pick(candidates, now)
        if endpoint not in tried:
            return endpoint, candidates.reason
        untried = Candidates([endpoint for endpoint in candidates if endpoint not in tried])
        return (self._pick(untried, now) if untried else None), untried.reason

    def _trusted(self, tried: Collection[Endpoint], now: float) -> Endpoint | None:
        """One that has not failed last; None when these are too few to carry the load of the others, too."""
        trusted = [endpoint for endpoint in self._candidates if not endpoint.failures and endpoint not in tried]
        enough = trusted and 2 * len(trusted) >= len(self._candidates)
        return self._pick(Candidates(trusted), now) if enough else None

    def _probe(self, now: float, safe: bool) -> Endpoint | None:
        self._probed = now
        due = [endpoint for endpoint in self._ejected if endpoint.is_due(now, safe=safe)]
        if not due:
            self._next_probe = now + self._policy.probe_interval
            return None
        endpoint = min(due, key=lambda endpoint: (endpoint.ejected_until, endpoint.instance.key))
        endpoint.probe(now)
        self._tell("probed", endpoint, reason=endpoint.ejected_because)
        self._settle((), now)
        if self._breaker.until:
            self._breaker.stay_open(now)
        return endpoint

    def _half_open(self, tried: Collection[Endpoint], now: float) -> Endpoint | None:
        if not tried:
            if now < self._breaker.until:
                return None
            self._breaker.stay_open(now)
        # A call that is under way goes on to the others, so that one probe finds the one that is back.
        untried = [endpoint for endpoint in self.endpoints.values() if endpoint not in tried]
        return random.choice(untried) if untried else None
