"""A live view of the instances of services: one blocking query per (service, tag), answers from memory."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from typing import Literal, TypeAlias

from registry.background import background_context
from registry.consul.catalog import Names, watch_names
from registry.consul.connection import AsyncConsul
from registry.consul.datacenters import Spares, joint_view, most_telling
from registry.consul.watch import Watch
from registry.errors import RegistryError, RegistryUnavailableError
from registry.model import Snapshot, View
from registry.settings import ConsulSettings
from registry.telemetry import Observer, Observers
from registry.validation import check_datacenter, check_known_service, check_tag

Mesh: TypeAlias = Literal["false", "client", "true"]
_Key: TypeAlias = tuple[str, str | None, str | None]
"""Service, tag and datacenter."""

__all__ = ["ConsulResolver"]


class ConsulResolver:
    """Watches each service that is asked for, and answers from memory. Belongs to one event loop at a time.

    The first question about a service waits for Consul, at most ``first_answer_timeout`` seconds; others never wait.
    Services in ``upstreams`` are watched from ``start`` until the end. Any other watch ends after ``idle_timeout``
    seconds without a question; when there are ``max_watches``, a new one replaces the least recently used.
    ``observer``: is told when a watch is lost, is back, or brings a change. ``mesh``: what ``CONSUL_CONNECT`` says;
    with ``"true"`` only those are instances of a service who speak Consul Connect for it, natively or as its sidecar
    proxy; otherwise those who don't are, too. ``datacenters``: where to look, by default where ``settings`` say: in the
    next one only while nobody passes in those before it.
    """

    def __init__(
        self,
        settings: ConsulSettings | None = None,
        *,
        upstreams: Sequence[str] = (),
        first_answer_timeout: float = 2.0,
        idle_timeout: float = 300.0,
        max_watches: int = 100,
        observer: Observer | None = None,
        mesh: Mesh = "false",
        datacenters: Sequence[str] | None = None,
    ) -> None:
        self.settings = settings or ConsulSettings()
        self._upstreams = frozenset(check_known_service(name).lower() for name in upstreams)
        self._first_answer_timeout = first_answer_timeout
        self._idle_timeout = idle_timeout
        self._max_watches = max_watches
        self._mesh = mesh == "true"
        named = self.settings.datacenters if datacenters is None else tuple(map(check_datacenter, datacenters))
        self._datacenters: tuple[str | None, ...] = tuple(dict.fromkeys(named)) or (None,)
        self._spares = Spares()
        self._consul: AsyncConsul | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = os.getpid()
        self._watches: dict[_Key, Watch] = {}
        self._observers = Observers(observer)

    def resolve(self, service: str, tag: str | None = None) -> Snapshot | None:
        if self._process != os.getpid():
            self._forget()
        service = service.lower()
        asked: list[Watch] = []
        errors: list[RegistryError] = []
        for datacenter in self._datacenters:
            watch = self._watches.get((service, tag, datacenter))
            if watch is None or watch.task.done():
                return None
            watch.asked_at = time.monotonic()
            asked.append(watch)
            try:
                passing = watch.passing()
            except RegistryError as error:
                errors.append(error)
            else:
                return self._spares.snapshot(asked) if passing and errors else passing
        raise most_telling(errors)

    def view(self, service: str, tag: str | None = None) -> View:
        """How fresh the answer is, and what Consul answered last."""
        known = [(each, self._watches.get((service.lower(), tag, each))) for each in self._datacenters]
        asked = [(datacenter, watch) for datacenter, watch in known if watch is not None]
        return joint_view(asked) or View(self.settings.url, None, None, None, None)

    async def ready(self, service: str, tag: str | None = None) -> None:
        try:
            async with asyncio.timeout(self._first_answer_timeout):
                for datacenter in self._datacenters:
                    watch = self._watch(service, tag, datacenter)
                    await watch.answered.wait()
                    if watch.snapshot:
                        return
        except TimeoutError:
            raise RegistryUnavailableError(
                f"Consul at {self.settings.url} did not say within {self._first_answer_timeout} s who runs '{service}'"
            ) from None

    def names(self) -> AsyncIterator[Names]:
        """The names of all registered services, at once and again whenever an instance came or went, until closed.

        Raises: RegistryUnavailableError, RegistryError. Ask anew after a pause.
        """
        return watch_names(self._connection())

    async def start(self) -> None:
        """Starts watching the upstreams, and waits until each has an answer or an error."""
        await asyncio.gather(*(self.ready(service) for service in self._upstreams), return_exceptions=True)

    async def aclose(self) -> None:
        if self._process != os.getpid():
            self._forget()
        tasks = [watch.task for watch in self._watches.values()]
        self._watches.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._consul is not None:
            await self._consul.http.close()
            self._consul = None

    def _watch(self, service: str, tag: str | None, datacenter: str | None) -> Watch:
        consul, loop = self._connection(), asyncio.get_running_loop()
        key = (service.lower(), tag, datacenter)
        if key not in self._watches or self._watches[key].task.done():
            check_known_service(service)
            if tag is not None:
                check_tag(tag)
            self._make_room()
            watch = self._watches[key] = Watch(
                consul, key[0], tag, observers=self._observers, mesh=self._mesh, datacenter=datacenter
            )
            # An empty context: the watch must not carry the first caller's trace or request for ever.
            watch.task = loop.create_task(
                self._run(key, watch), name=f"registry watch {key[0]}", context=background_context()
            )
        return self._watches[key]

    def _connection(self) -> AsyncConsul:
        loop = asyncio.get_running_loop()
        if self._consul is None or self._loop is not loop:
            # A connection and a task live and die with their loop.
            self._loop, self._consul, self._watches = loop, AsyncConsul(self.settings), {}
        return self._consul

    def _forget(self) -> None:
        """A fork copied the watches, and nothing that runs them: they would show for ever what was known then."""
        self._process, self._consul, self._watches = os.getpid(), None, {}

    def _stays(self, key: _Key) -> bool:
        """Whether its watch never ends: those of other datacenters do, when they are needed no more."""
        return key[0] in self._upstreams and key[2] == self._datacenters[0]

    async def _run(self, key: _Key, watch: Watch) -> None:
        while self._stays(key) or time.monotonic() - watch.asked_at < self._idle_timeout:
            await watch.step()
        del self._watches[key]

    def _make_room(self) -> None:
        removable = [key for key in self._watches if not self._stays(key)]
        if len(removable) < self._max_watches:
            return
        # A name that nobody runs goes before one that somebody runs.
        oldest = min(removable, key=lambda key: (bool(self._watches[key].snapshot), self._watches[key].asked_at))
        watch = self._watches.pop(oldest)
        watch.task.cancel()
        watch.answered.set()  # whoever waits for it must not wait until the time-out
