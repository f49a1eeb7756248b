"""The watch: a blocking query that Consul answers when something changed, and what it has told so far.

Source: https://developer.hashicorp.com/consul/api-docs/features/blocking
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from urllib.parse import quote

from consul.callback import CB

from registry.backoff import Backoff
from registry.consul.connection import AsyncConsul, UnprovenEmptyError, consul_errors
from registry.consul.departures import Departures
from registry.consul.entries import Known
from registry.consul.health import Listing, health_path, right_path, tell_left_out
from registry.consul.reading import Reader
from registry.errors import (
    NoHealthyInstanceError,
    RegistryError,
    RegistryUnavailableError,
    ServiceNotFoundError,
)
from registry.model import LeftOut, Snapshot, View
from registry.telemetry import Event, Observers

__all__ = ["WAIT", "TokenBucket", "Watch", "next_index"]

logger = logging.getLogger("registry")

WAIT = 30
"""Seconds that Consul parks a query; also how long a vanished agent goes unnoticed, and then the old view serves on."""
SETTLE = 0.4
"""Seconds until Consul is asked once more whether really nobody is left: a new registration may follow at once.

It does so when an instance takes over an id, in two requests; each is a write to disk, slow on a busy machine.
"""
MAX_NODES = 20
"""So many nodes are looked up when the last instances left; any others are taken for gone, too."""


def next_index(asked: int, answered: int) -> int:
    """What to ask with after that answer; 0: anew.

    "Reset the index if it goes backwards" and "sanity check index is greater than zero": the same source.
    """
    return 0 if answered < asked else max(answered, 1)


class Watch:
    """What Consul says of one service, kept by calling ``step`` for ever."""

    def __init__(
        self,
        consul: AsyncConsul,
        service: str,
        tag: str | None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        observers: Observers | None = None,
        *,
        mesh: bool = False,
        datacenter: str | None = None,
    ) -> None:
        """``mesh``: only of those who speak Consul Connect for it. ``datacenter``: None: the agent's own."""
        self._consul = consul
        self._mesh = mesh
        self._where = [] if datacenter is None else [("dc", datacenter)]
        self._service = service
        self._tag = tag
        self._sleep = sleep
        self._observers = observers or Observers()
        self._index = 0
        self._last_index = 0
        self._known: dict[bytes, Known] = {}
        self._departures = Departures(tag)
        self._told: frozenset[LeftOut] = frozenset()
        self._failures = 0
        self._backoff = Backoff(base=0.1, cap=2.0)
        self._rate = TokenBucket(per_second=5, burst=20)
        self.answered = asyncio.Event()
        """Set once Consul said anything, be it an error."""
        self.snapshot: Snapshot = ()
        """The passing instances."""
        self.registered = 0
        """How many instances are registered, passing or not."""
        self.maintained = 0
        """How many of them are in maintenance."""
        self.error: RegistryError | None = None
        """Why the last query failed; None: it did not."""
        self.errors = 0
        """How many queries failed."""
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
                raise NoHealthyInstanceError(self._service, self.registered, self.maintained)
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
            left_out=self._departures.left_out,
            lost=self._departures.lost,
            errors=self.errors,
        )

    async def step(self) -> None:
        """One query: parks until something changed, an error came or ``WAIT`` is over. Raises only CancelledError."""
        await self._sleep(self._rate.delay())
        try:
            await self._query()
        except Exception as error:
            # "Whatever happens, the view serves on": a watch dies only by cancellation.
            await self._failed(error)

    async def _ask(self) -> tuple[int, Listing]:
        """Consul's answer and its index; with an index known, it comes when something changed."""
        params = [*self._where]
        if self._index:
            params += [("index", str(self._index)), ("wait", f"{WAIT}s")]
        elif self._consul.settings.consistency == "default":
            # A restarted server answers with half a catalog while it replays its log; not so to consistent reads.
            params.append(("consistent", "1"))
        if self._tag is not None:
            params.append(("tag", self._tag))
        http = self._consul.http
        with consul_errors(self._consul.settings):
            try:
                raw_index, reader = await http.get_in_pieces(
                    lambda: Reader(self._known, mesh=self._mesh), health_path(self._service, mesh=self._mesh), params
                )
            except UnprovenEmptyError as unproven:
                await http.get(CB.json(), right_path(self._service))
                if not await http.get(CB.json(), "/v1/catalog/nodes", self._where):
                    raise
                return int(unproven.index), Listing.of(())
        index, listing = int(raw_index), reader.listing()
        self._known = reader.known
        await asyncio.sleep(0)  # that took milliseconds if instances are many, and so does what follows
        return index, listing

    async def _query(self) -> None:
        index, listing = await self._ask()
        lost, lost_nodes = self._departures.lost, set[str]()
        # A restart shows as an error, or as an index that went back.
        continuous = self.error is None and index >= self._last_index
        if self._departures.last_left(listing):
            if self._index:
                # To a parked question a token that lost its rights is told the same as if all had left; not to a new
                # one. And an instance that registers anew is deregistered for a moment.
                self._index = 0
                await self._sleep(SETTLE)
                return
            if continuous:
                lost_nodes = await self._lost_nodes(listing)
        self._departures.update(listing, continuous=continuous, lost_nodes=lost_nodes)
        self._told = tell_left_out(listing, self._service, self._told)
        self._index = next_index(self._index, index)
        self._last_index = index
        self.heard_at = time.monotonic()
        if self.error is not None:
            logger.info("Consul answers again about %s", self._service, extra={"service": self._service})
            self._observers.happened(Event("watch_back", self._service))
        self.error, self._failures = None, 0
        self.registered, self.maintained = listing.registered, listing.maintained
        # A return is not a change: keep the same tuple, on which others hang what they derive from it.
        if listing.passing != self.snapshot:
            self.snapshot, self.changed_at = listing.passing, self.heard_at
            count = f"{len(listing.passing)} of {listing.registered} can be called"
            self._observers.happened(Event("watch_changed", self._service, detail=count))
        elif self._departures.lost is not lost:
            self.snapshot = listing.passing  # a new object, as who is lost is derived from it too
        self.answered.set()

    async def _lost_nodes(self, listing: Listing) -> set[str]:
        """Which nodes of the instances that left are gone too: an agent that leaves takes all registrations along."""
        nodes = sorted(self._departures.nodes_left(listing))
        lost = set(nodes[MAX_NODES:])
        for node in nodes[:MAX_NODES]:
            with consul_errors(self._consul.settings):
                path = f"/v1/catalog/node/{quote(node, safe='')}"
                known = await self._consul.http.get(CB.json(), path, self._where)
            if known is None:
                lost.add(node)
        return lost

    async def _failed(self, error: Exception) -> None:
        if not isinstance(error, RegistryError):
            error = RegistryUnavailableError(f"Consul at {self._consul.settings.url} sent a broken answer: {error!r}")
        if self.error is None:
            known = len(self.snapshot)
            logger.warning(
                "Consul does not say who serves %s; %s until it does, and it is asked again every 2 s: %s",
                self._service,
                f"calls go to those known before ({known})" if known else "calls to it fail",
                error,
                extra={"service": self._service, "instances": known},
            )
            self._observers.happened(Event("watch_lost", self._service, detail=str(error)))
        self.error = error
        self.errors += 1
        self._index = 0  # an old index against a restarted agent is blind until the wait ends
        self._failures += 1
        self.answered.set()
        await self._sleep(self._backoff.delay(self._failures))


class TokenBucket:
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

    async def pause(self) -> None:
        """Waits for so long."""
        await asyncio.sleep(self.delay())
