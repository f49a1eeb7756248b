"""The watch: a blocking query that Consul answers when something changed, and what it has told so far.

Source: https://developer.hashicorp.com/consul/api-docs/features/blocking
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from consul.callback import CB

from registry.consul.connection import AsyncConsul, consul_errors
from registry.consul.health import parse_passing
from registry.errors import (
    NoHealthyInstanceError,
    RegistryError,
    RegistryUnavailableError,
    ServiceNotFoundError,
)
from registry.model import Snapshot, View
from registry.retry import Backoff

__all__ = ["Watch"]

logger = logging.getLogger("registry")

WAIT = 30
"""Seconds that Consul parks a query; also how long a vanished agent goes unnoticed, and then the old view serves on."""


class Watch:
    """What Consul says of one service, kept by calling ``step`` for ever."""

    def __init__(
        self,
        consul: AsyncConsul,
        service: str,
        tag: str | None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._consul = consul
        self._service = service
        self._tag = tag
        self._sleep = sleep
        self._index = 0
        self._failures = 0
        self._backoff = Backoff(base=0.1, cap=2.0)
        self._rate = _TokenBucket(per_second=5, burst=20)
        self.answered = asyncio.Event()
        """Set once Consul said anything, be it an error."""
        self.snapshot: Snapshot = ()
        """The passing instances."""
        self.registered = 0
        """How many instances are registered, passing or not."""
        self.error: RegistryError | None = None
        """Why the last query failed; None: it did not."""
        self.heard_at: float | None = None
        """``time.monotonic()`` of the last answer that was not an error."""
        self.changed_at: float | None = None
        self.asked_at = time.monotonic()
        self.task: asyncio.Task[None]

    def passing(self) -> Snapshot | None:
        """The passing instances; None: nothing is known yet. Raises: why there are none."""
        if self.snapshot:
            return self.snapshot
        if self.heard_at is not None:
            if self.registered:
                raise NoHealthyInstanceError(self._service, self.registered)
            raise ServiceNotFoundError(self._service)
        if self.error is not None:
            raise type(self.error)(*self.error.args) from self.error
        return None

    def view(self) -> View:
        """How fresh all this is."""
        now, heard, changed = time.monotonic(), self.heard_at, self.changed_at
        return View(
            source=self._consul.settings.url,
            age=None if heard is None else now - heard,
            changed=None if changed is None else now - changed,
            registered=None if heard is None else self.registered,
            error=None if self.error is None else str(self.error),
        )

    async def step(self) -> None:
        """One query: parks until something changed, an error came or ``WAIT`` is over. Raises only CancelledError."""
        await self._sleep(self._rate.delay())
        try:
            await self._query()
        except Exception as error:
            # "Whatever happens, the view serves on": a watch dies only by cancellation.
            await self._failed(error)

    async def _query(self) -> None:
        params: list[tuple[str, str]] = []
        if self._index:
            params += [("index", str(self._index)), ("wait", f"{WAIT}s")]
        elif self._consul.settings.consistency == "default":
            # A restarted server answers with half a catalog while it replays its log; not so to consistent reads.
            params.append(("consistent", "1"))
        if self._tag is not None:
            params.append(("tag", self._tag))
        with consul_errors(self._consul.settings):
            path = f"/v1/health/service/{self._service}"
            raw_index, entries = await self._consul.http.get(CB.json(index=True), path, params)
        index, snapshot, registered = int(raw_index), parse_passing(_listed(entries)), len(entries)
        if self._index and self.registered and not entries:
            # To a parked question a token that lost its rights is told the same as if all had left; not to a new one.
            self._index = 0
            return
        # "Reset the index if it goes backwards" and "sanity check index is greater than zero": the same source.
        self._index = 0 if index < self._index else max(index, 1)
        self.heard_at = time.monotonic()
        if self.error is not None:
            logger.info("consul answers again", extra={"service": self._service})
        self.error, self._failures, self.registered = None, 0, registered
        # A return is not a change: keep the same tuple, on which others hang what they derive from it.
        if snapshot != self.snapshot:
            self.snapshot, self.changed_at = snapshot, self.heard_at
        self.answered.set()

    async def _failed(self, error: Exception) -> None:
        if not isinstance(error, RegistryError):
            error = RegistryUnavailableError(f"Consul at {self._consul.settings.url} sent a broken answer: {error!r}")
        if self.error is None:
            logger.warning(
                "consul does not answer: serving what was known before",
                extra={"service": self._service, "error": str(error), "instances": len(self.snapshot)},
            )
        self.error = error
        self._index = 0  # an old index against a restarted agent is blind until the wait ends
        self._failures += 1
        self.answered.set()
        await self._sleep(self._backoff.delay(self._failures))


def _listed(entries: Any) -> list[dict[str, Any]]:
    if not isinstance(entries, list):
        raise TypeError(f"not a list: {str(entries)[:100]}")
    return entries


class _TokenBucket:
    """Lets a burst through at once, and holds a stream to a rate."""

    def __init__(self, per_second: float, burst: int) -> None:
        self._per_second = per_second
        self._burst = burst
        self._tokens = float(burst)
        self._updated = time.monotonic()

    def delay(self) -> float:
        """Seconds to wait before the next step, which is taken from the bucket."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._updated) * self._per_second) - 1
        self._updated = now
        return max(0.0, -self._tokens / self._per_second)
