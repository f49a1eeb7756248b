"""Presence: this instance is registered in Consul exactly as long as it can answer."""

import asyncio
import logging
import random
from collections.abc import Mapping

from registry.background import background_context
from registry.backoff import Backoff
from registry.consul.connection import AsyncConsul
from registry.presence.addresses import address_towards, is_ours, leads_astray
from registry.presence.entry import Entry
from registry.presence.probe import Mesh, Probe
from registry.presence.registration import Registration
from registry.presence.siblings import PAUSE, Siblings
from registry.presence.standing import Standing
from registry.settings import ConsulSettings, ServiceSettings
from registry.telemetry import Observer
from registry.validation import check_meta

__all__ = ["Registrar"]

logger = logging.getLogger("registry")

WITHDRAW_TIMEOUT = 2.0
"""Seconds that a dead Consul may delay an exit."""
PROBE_TIMEOUT = 1.0
REJOIN_DELAY = 0.3, 0.5
"""Seconds, from and to. Siblings that are being stopped together must not bring each other back. (After a restart of
the agent, where all its services come at once, the back-off spreads them.)"""
SILENCE_BEFORE_WARNING = 5.0
LOOK = 1.0
"""Seconds between two looks at whether this host still has the address, and Consul the token, that was registered."""


class Registrar:
    """Keeps one instance registered from ``start`` to ``withdraw``. Belongs to one event loop.

    It registers, as passing, once the advertised address answers ``/health?instance=<id>`` with 200, so that callers
    find it at once. It registers again when the agent has lost the instance or this host's address has changed; when
    its token was replaced, it writes the new one, and callers notice nothing. It keeps trying while Consul is away.
    Several processes may do so for one instance, such as uvicorn's workers.

    ``about``: default metadata, such as ``version``; the settings take precedence. ``observer``: is told when it is
    registered, withdrawn or in doubt. ``mesh``: says whether it speaks Consul Connect. Raises: InvalidInputError.
    """

    def __init__(
        self,
        service: ServiceSettings,
        consul: ConsulSettings | None = None,
        *,
        about: Mapping[str, str] | None = None,
        observer: Observer | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        self._service = service
        self._about = check_meta(dict(about or {}))
        self._settings = consul or ConsulSettings()
        self._consul = AsyncConsul(self._settings)
        self._entry = Entry(self._consul)
        self._probe = Probe(mesh)
        self._complaint: str | None = None
        """What was wrong at the last probe."""
        self._task: asyncio.Task[None] | None = None
        self._withdrawal: asyncio.Task[None] | None = None
        self._siblings = Siblings()
        self._settled = asyncio.Event()
        self.withdrawn = False
        """Whether this instance has left Consul, and only serves calls that still arrive."""
        # Held while the registration is written: a withdrawal must not be overtaken by it.
        self._writing = asyncio.Lock()
        self._backoff = Backoff(base=0.2, cap=2.0)
        self._closing = False
        self._former: set[str] = set()
        """Ids under which it was registered at addresses that this host no longer has."""
        self.registration: Registration | None = None
        """What is written to Consul; None until this host's address is known."""
        self.standing = Standing(service.name, observer)
        """Whether it is written, and how often it was."""

    @property
    def instance_id(self) -> str | None:
        """The id of this instance; None until this host's address is known."""
        return self.registration.id if self.registration else None

    @property
    def leaving(self) -> bool:
        """Whether this process is stopping. If sibling processes keep serving, the instance stays registered."""
        return self._withdrawal is not None

    def serves(self, instance_id: str) -> bool:
        """Whether this process is that instance. False once the instance is withdrawn or the process is closing.

        After that only sibling processes ask; one that is not yet stopping must not register the instance again.
        """
        return instance_id == self.instance_id and not self.withdrawn and not self._closing

    def start(self) -> None:
        """Starts in the background; never blocks and never fails."""
        self._task = asyncio.get_running_loop().create_task(
            self._run(), name=f"registrar {self._service.name}", context=background_context()
        )

    async def withdraw(self) -> None:
        """Removes this instance from Consul, so that callers no longer find it. Takes at most 2 s, never raises.

        If other processes still serve the instance, the last of them removes it. An instance in maintenance, which no
        caller finds anyway, stays in Consul, so that a restart does not end the maintenance; if no restart follows,
        Consul removes it because of its check. Once begun, a withdrawal is completed: cancelling this method only ends
        the waiting, and further calls wait for the same withdrawal.
        """
        if self._withdrawal is None:
            self._withdrawal = asyncio.get_running_loop().create_task(
                self._withdraw(), name=f"withdraw {self._service.name}", context=background_context()
            )
        await self._settled.wait()

    async def answers(self) -> bool:
        """Whether the advertised address answers as this instance right now. Takes at most 1 s."""
        if self.registration is None:
            return False
        self._complaint = await self._probe.complaint(self.registration, PROBE_TIMEOUT)
        return self._complaint is None

    async def aclose(self) -> None:
        """Withdraws, unless another process still serves this instance, and closes connections. Takes at most 3 s.

        Call it when this process no longer listens. The other process may be another worker of the server, or, if this
        process exits because its port is taken, the one that uses the port.
        """
        self._closing = True
        try:
            await self.withdraw()
        finally:
            if self._withdrawal is not None:
                await asyncio.wait({self._withdrawal})
            await self._probe.aclose()
            await self._consul.http.close()

    async def _withdraw(self) -> None:
        try:
            async with asyncio.timeout(WITHDRAW_TIMEOUT) as limit, self._writing:
                await self._stop()
                while not self._siblings.leave():
                    self._settled.set()
                    if self._closing:
                        return
                    await asyncio.sleep(PAUSE)
                    limit.reschedule(asyncio.get_running_loop().time() + WITHDRAW_TIMEOUT)
                self.withdrawn = True
                if self.registration is not None and not self._siblings.taken_out:
                    await self._remove(self.registration.id)
        except Exception as error:
            self.withdrawn = True
            logger.warning(
                "could not deregister; callers find this instance until Consul's checks of it fail: %s",
                str(error) or type(error).__name__,
                extra={"instance": self.instance_id},
            )
        finally:
            await self._stop()
            self._siblings.close()
            self._settled.set()

    async def _remove(self, service_id: str) -> None:
        if await self._entry.is_in_maintenance(service_id):
            logger.info("not deregistered: %s is in maintenance", service_id, extra={"instance": service_id})
        else:
            await self._entry.remove(service_id)
            self.standing.withdrawn(service_id)

    async def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        while True:
            try:
                registration = await self._locate()
                await self._siblings.join(registration.id)
                await self._until_answering(registration)
                async with self._writing:
                    await self._register(registration)
                if await leads_astray(registration.address, self._settings.host, self._settings.port):
                    self.standing.unreachable(registration)
                await self._until_outdated(registration)
                self.standing.doubted("moved" if self._has_moved(registration) else "forgotten")
                await asyncio.sleep(random.uniform(*REJOIN_DELAY))
            except Exception as error:
                # Consul may be away for hours: the service runs on, and this task dies only by cancellation.
                await asyncio.sleep(self._backoff.delay(self.standing.interrupted(error)))

    async def _locate(self) -> Registration:
        """What to write: the same as before, as long as this host has that address. Raises: OSError."""
        known = self.registration
        if known is None or self._has_moved(known):
            self.registration = await self._describe()
            self._former |= {known.id} if known else set()
            self._former.discard(self.registration.id)
            return self.registration
        return known

    def _has_moved(self, registration: Registration) -> bool:
        return self._service.address is None and not is_ours(registration.address)

    async def _describe(self) -> Registration:
        address = self._service.address or await address_towards(self._settings.host, self._settings.port)
        return Registration.of(self._service, address, self._about, connect=self._probe.is_native)

    async def _until_answering(self, registration: Registration) -> None:
        loop = asyncio.get_running_loop()
        begun, warned, pause = loop.time(), False, 0.02
        while not await self.answers():
            if loop.time() - begun > SILENCE_BEFORE_WARNING and not warned:
                warned = True
                logger.warning(
                    "the advertised address does not answer 200 as this instance (%s): is every component healthy, "
                    "uvicorn's --port SERVICE_PORT, its --host reachable, the health router included, at "
                    "SERVICE_HEALTH_CHECK_PATH? SERVICE_SCHEME and SERVICE_HEALTH_CHECK_HEADERS say how to ask it",
                    self._complaint,
                    extra={"instance": registration.id, "address": registration.instance.netloc},
                )
            await asyncio.sleep(pause)
            pause = min(pause * 1.2, 0.5)

    async def _register(self, registration: Registration) -> None:
        await self._entry.write(registration)
        for former in tuple(self._former):
            await self._entry.remove(former)
            self._former.discard(former)
        self.standing.written(registration)

    async def _until_outdated(self, registration: Registration) -> None:
        """Returns when the agent has lost it, or its address is gone. Raises if Consul rejects the query."""
        forgotten = asyncio.get_running_loop().create_task(self._entry.until_forgotten(registration))
        try:
            while not forgotten.done() and not self._has_moved(registration):
                if await self._entry.is_outdated():
                    async with self._writing:
                        if await self._entry.rewrite(registration):
                            self.standing.rewritten()
                await asyncio.wait({forgotten}, timeout=LOOK)
            if forgotten.done():
                forgotten.result()
        finally:
            forgotten.cancel()
