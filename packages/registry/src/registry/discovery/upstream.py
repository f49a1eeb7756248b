"""One service that is called: who can take the next attempt, what retries may cost, and why."""

import asyncio
import time
from collections import deque
from collections.abc import Collection
from typing import Literal

from registry.discovery.endpoint import Endpoint
from registry.discovery.explanation import EndpointState, Explanation
from registry.discovery.pool import Pool
from registry.discovery.resolver import Resolver
from registry.discovery.retry import RetryBudget, RetryPolicy
from registry.errors import RegistryError, RegistryUnavailableError
from registry.model import Snapshot, View
from registry.telemetry import AttemptOutcome, CallOutcome, Event, Observers

__all__ = ["Upstream"]

_LONG = 1.0
"""Seconds of silence that are long where nothing is known of how long answers take."""
_TOO_SHORT_TO_TELL = 0.25
"""Seconds of silence that say nothing: the answer may be one that takes longer than most."""


class Upstream:
    """Joins the resolver's view of one (service, tag) to the pool that picks from it."""

    def __init__(
        self,
        resolver: Resolver,
        pool: Pool,
        tag: str | None,
        retry: RetryPolicy | None = None,
        observers: Observers | None = None,
    ) -> None:
        self.pool = pool
        self.observers = observers or Observers()
        self.calls: dict[CallOutcome, int] = {}
        self.retries: dict[AttemptOutcome, int] = {}
        self.hedges: dict[Literal["won", "lost"], int] = {}
        self.retry = retry or RetryPolicy()
        self.budget = RetryBudget(self.retry.budget_ratio, self.retry.budget_per_second)
        self.latencies: deque[float] = deque(maxlen=256)
        self._resolver = resolver
        self._tag = tag

    async def pick(self, tried: Collection[Endpoint], *, safe: bool) -> Endpoint | None:
        """An untried endpoint; None when all were tried. Waits only for the first answer about a service.

        Raises: RegistryError, when nothing was tried and there is nobody to try.
        """
        pool, absence = self.pool, None
        try:
            snapshot = self._resolver.resolve(pool.service, self._tag)
            if snapshot is None:
                await self._resolver.ready(pool.service, self._tag)
                snapshot = self._resolver.resolve(pool.service, self._tag)
                if snapshot is None:
                    raise RegistryUnavailableError(f"nothing is known about '{pool.service}' yet")
            if snapshot is not pool.snapshot:
                self._update(snapshot)
        except RegistryError as error:
            absence = error
            self._nobody()
        endpoint = pool.pick(tried, safe=safe)
        if endpoint is None and not tried:
            # A caller that loops on "nobody there" must not starve the event loop that would bring better news.
            await asyncio.sleep(0)
            raise absence or pool.unavailable()
        return endpoint

    def may_retry(self, failed: AttemptOutcome) -> bool:
        """Whether another attempt may follow one that ended so; if so, it is counted, and paid for."""
        paid = self.budget.withdraw()
        if paid:
            self.retries[failed] = self.retries.get(failed, 0) + 1
        return paid

    def hedged(self, *, won: bool) -> None:
        """A second attempt was sent because the first took long."""
        which: Literal["won", "lost"] = "won" if won else "lost"
        self.hedges[which] = self.hedges.get(which, 0) + 1

    def is_long(self, seconds: float) -> bool:
        """Whether an answer that has not come after so long is late: answers to others usually come sooner."""
        if not self.latencies:
            return seconds >= _LONG
        usual = sorted(self.latencies)[len(self.latencies) * 99 // 100]
        return seconds >= max(2 * usual, _TOO_SHORT_TO_TELL)

    def p95(self) -> float | None:
        """Seconds within which 95 % of the last answers came; None when too few have come to say."""
        size = len(self.latencies)
        return sorted(self.latencies)[size * 95 // 100] if size >= 20 else None

    def _nobody(self) -> None:
        """Nobody is listed, but those who are lost may still answer."""
        if self.pool.snapshot or self._view().lost != self.pool.gone.lost:
            self._update(())

    def _update(self, snapshot: Snapshot) -> None:
        view, service = self._view(), self.pool.service
        change = self.pool.update(snapshot, view.lost)
        if not self.observers.of_events:
            return
        for instance in change.joined.values():
            self.observers.happened(Event("joined", service, instance.id))
        why = {left.id: left for left in view.left_out} if change.left else {}
        for instance in change.left.values():
            left = why.get(instance.id)
            self.observers.happened(
                Event("left", service, instance.id, left.kind if left else "vanished", left.reason if left else "")
            )

    def _view(self) -> View:
        return self._resolver.view(self.pool.service, self._tag)

    def explain(self) -> Explanation:
        """The state of every endpoint, listed first, then by id."""
        now, pool = time.monotonic(), self.pool
        try:
            snapshot = self._resolver.resolve(pool.service, self._tag)
            if snapshot is not None and snapshot is not pool.snapshot:
                self._update(snapshot)
        except RegistryError:
            self._nobody()
        pool.ledger.expire(now)
        listed = [EndpointState.of(endpoint, now, listed=True) for _, endpoint in sorted(pool.endpoints.items())]
        gone = [EndpointState.of(endpoint, now, listed=False) for endpoint, _ in pool.gone.values()]
        return Explanation(
            service=pool.service,
            tag=self._tag,
            endpoints=(*listed, *gone),
            failing_fast_for=pool.failing_fast_for,
            view=self._view(),
            calls=dict(self.calls),
            retries=dict(self.retries),
            hedges=dict(self.hedges),
            budget_left=self.budget.left(),
            budget_exhausted=self.budget.exhausted,
            zones=pool.zones.state(now) if pool.zones else None,
            departed=pool.ledger.departed,
            outside=tuple(sorted([instance.id for instance in pool.roster.ranking.outside()])),
        )
