"""Consul's side of the page: every service and its instances, by blocking queries, while somebody looks."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from orchestrator.registry import ConsulResolver, ConsulSettings, Instance, LeftOut, RegistryError
from registry.telemetry import Event, Observer

__all__ = ["Catalog", "Listing", "Outlook"]

WAIT = 5.0
"""Seconds that Consul parks a query: an agent that falls silent must show within seconds."""
MAX_SERVICES = 300
FIRST_ANSWER = 2.0
PAUSE = 1.0
"""Seconds before the next try when Consul can't be asked."""
KEEP = 60.0
"""Seconds that a service is shown whose last instance left."""


@dataclass(frozen=True, slots=True)
class Listing:
    """One service, as Consul lists it."""

    service: str
    passing: tuple[Instance, ...]
    """Sorted by id, with addresses."""
    left_out: tuple[LeftOut, ...]
    """Registered and not offered, and those that left within the last minute."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is known of Consul at one moment."""

    source: str
    error: str | None
    """Why it can't be asked; None: it can."""
    age: float | None
    """Seconds since it last answered; None: it never did."""
    listings: tuple[Listing, ...]
    """Sorted by name."""
    untold: int
    """Services beyond those that are shown."""


class Catalog:
    """Watches all services within ``async with``; ``changed`` is called when something may have changed."""

    def __init__(self, settings: ConsulSettings, changed: Callable[[], None]) -> None:
        wait = min(WAIT, settings.wait)
        self._resolver = ConsulResolver(
            settings.model_copy(update={"wait": wait, "datacenters": ()}),
            max_watches=MAX_SERVICES,
            first_answer_timeout=FIRST_ANSWER,
            observer=_Bell(changed),
        )
        self._changed = changed
        self._names: tuple[str, ...] = ()
        self._seen: dict[str, float] = {}
        self._untold = 0
        self._error: str | None = None
        self._heard: float | None = None
        self._listed: dict[str, tuple[Instance, ...]] = {}
        self._task: asyncio.Task[None] | None = None
        self.answered = asyncio.Event()
        """Set once Consul has said who is there, or that it can't."""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._watch(), name="page: the names of services")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._resolver.aclose()

    def outlook(self) -> Outlook:
        """What is known now; reads memory only."""
        views = [self._resolver.view(name) for name in self._names]
        errors = [self._error, *(view.error for view in views)]
        heard = [age for age in (self._age(), *(view.age for view in views)) if age is not None]
        return Outlook(
            source=self._resolver.settings.url,
            error=next((error for error in errors if error is not None), None),
            age=max(heard, default=None),
            listings=tuple(
                Listing(name, self._passing(name), view.left_out) for name, view in zip(self._names, views, strict=True)
            ),
            untold=self._untold,
        )

    def _age(self) -> float | None:
        return None if self._heard is None else time.monotonic() - self._heard

    def _passing(self, name: str) -> tuple[Instance, ...]:
        """Those of a moment ago, if the watch has nothing to say for now."""
        try:
            snapshot = self._resolver.resolve(name)
        except RegistryError:
            snapshot = ()
        if snapshot is not None:
            self._listed[name] = snapshot
        return self._listed.get(name, ())

    async def _watch(self) -> None:
        while True:
            try:
                async for names in self._resolver.names():
                    self._error, self._heard = None, time.monotonic()
                    await self._follow(names)
            except RegistryError as error:
                self._error = str(error)
                self.answered.set()
                self._changed()
                await asyncio.sleep(PAUSE)

    async def _follow(self, names: Mapping[str, object]) -> None:
        now = time.monotonic()
        self._seen = {name: at for name, at in self._seen.items() if now - at < KEEP} | dict.fromkeys(names, now)
        shown = sorted(self._seen, key=lambda name: (name not in names, name))[:MAX_SERVICES]
        self._names, self._untold = tuple(sorted(shown)), len(self._seen) - len(shown)
        self._listed = {name: listed for name, listed in self._listed.items() if name in self._seen}
        await asyncio.gather(*(self._resolver.ready(name) for name in shown), return_exceptions=True)
        self.answered.set()
        self._changed()


class _Bell(Observer):
    """Rings when a watch brings news."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring

    def happened(self, event: Event) -> None:
        self._ring()
