"""One service that is called: who can take the next attempt, what retries may cost, and why."""

import asyncio
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from registry.discovery.endpoint import Endpoint
from registry.discovery.pool import Pool
from registry.discovery.resolver import Resolver
from registry.discovery.retry import RetryBudget, RetryPolicy
from registry.errors import RegistryError, RegistryUnavailableError
from registry.model import LeftOut, View

__all__ = ["EndpointState", "Explanation", "Upstream"]

_LONG = 1.0
"""Seconds of silence that are long where nothing is known of how long answers take."""
_TOO_SHORT_TO_TELL = 0.25
"""Seconds of silence that say nothing: the answer may be one that takes longer than most."""


@dataclass(frozen=True, slots=True)
class EndpointState:
    """One instance as this process sees it. Times in seconds from now."""

    id: str
    netloc: str
    weight: int
    in_flight: int
    latency: float
    picks: int
    """How often it was picked."""
    failures: int
    """Failures in a row."""
    ejected_for: float
    """How long it will not be picked; 0: it is not ejected."""
    listed: bool
    """False: lost by the registry, or its checks fail; asked only if nothing else is left."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why an instance would be chosen or not."""

    service: str
    endpoints: tuple[EndpointState, ...]
    failing_fast_for: float
    """How long calls are turned away because every instance fails; 0: they are not."""
    view: View
    """How fresh the list is, and what the registry said last."""

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Which instances the registry knows and does not offer, and why: ``view.left_out``."""
        return self.view.left_out


class Upstream:
    """Joins the resolver's view of one (service, tag) to the pool that picks from it."""

    def __init__(self, resolver: Resolver, pool: Pool, tag: str | None, retry: RetryPolicy | None = None) -> None:
        self.pool = pool
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
                pool.update(snapshot, self._view().lost)
        except RegistryError as error:
            absence = error
            self._nobody()
        endpoint = pool.pick(tried, safe=safe)
        if endpoint is None and not tried:
            # A caller that loops on "nobody there" must not starve the event loop that would bring better news.
            await asyncio.sleep(0)
            raise absence or pool.unavailable()
        return endpoint

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
        lost = self._view().lost
        if self.pool.snapshot or lost is not self.pool.lost:
            self.pool.update((), lost)

    def _view(self) -> View:
        return self._resolver.view(self.pool.service, self._tag)

    def explain(self) -> Explanation:
        """The state of every endpoint, listed first, then by id."""
        now, pool = time.monotonic(), self.pool
        try:
            snapshot = self._resolver.resolve(pool.service, self._tag)
            if snapshot is not None and snapshot is not pool.snapshot:
                pool.update(snapshot, self._view().lost)
        except RegistryError:
            self._nobody()
        endpoints = [(endpoint, True) for endpoint in pool.endpoints.values()]
        endpoints += [(endpoint, False) for endpoint, _ in pool.gone.values()]
        return Explanation(
            service=pool.service,
            endpoints=tuple(
                EndpointState(
                    id=endpoint.instance.id,
                    netloc=endpoint.instance.netloc,
                    weight=endpoint.instance.weight,
                    in_flight=endpoint.in_flight,
                    latency=endpoint.latency(now),
                    picks=endpoint.picks,
                    failures=endpoint.failures,
                    ejected_for=max(0.0, endpoint.ejected_until - now),
                    listed=listed,
                )
                for endpoint, listed in endpoints
            ),
            failing_fast_for=pool.failing_fast_for,
            view=self._view(),
        )
