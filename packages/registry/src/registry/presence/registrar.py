"""Presence: this instance is in Consul exactly as long as it can answer."""

import asyncio
import contextvars
import logging
import random
from collections.abc import Mapping
from contextlib import suppress

from registry.backoff import Backoff
from registry.consul.connection import AsyncConsul
from registry.presence.addresses import address_towards, is_loopback, is_ours
from registry.presence.entry import Entry
from registry.presence.probe import Probe
from registry.presence.registration import Registration
from registry.presence.siblings import PAUSE, Siblings
from registry.settings import ConsulSettings, ServiceSettings
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
"""Seconds between two looks at whether this host still has the address that was registered."""


class Registrar:
    """Keeps one instance registered from ``start`` to ``withdraw``. Belongs to one event loop.

    It registers once the advertised address answers ``/health?instance=<id>`` with 200, as passing, so that callers
    find it at once; registers again when the agent forgot it, and anew when this host got another address; and tries
    for ever while Consul is away. Several processes may do so for the same instance (uvicorn's workers).

    ``about``: metadata that the settings don't say otherwise, such as ``version``. Raises: InvalidInputError.
    """

    def __init__(
        self,
        service: ServiceSettings,
        consul: ConsulSettings | None = None,
        *,
        about: Mapping[str, str] | None = None,
    ) -> None:
        self._service = service
        self._about = check_meta(dict(about or {}))
        self._settings = consul or ConsulSettings()
        self._consul = AsyncConsul(self._settings)
        self._entry = Entry(self._consul)
        self._probe = Probe()
        self._complaint: str | None = None
        """What the last probe found wrong."""
        self._task: asyncio.Task[None] | None = None
        self._withdrawal: asyncio.Task[None] | None = None
        self._siblings = Siblings()
        self._settled = asyncio.Event()
        self.withdrawn = False
        """Whether this instance was taken out of Consul, and only serves what still comes."""
        # Held while the registration is written: a withdrawal must not be overtaken by it.
        self._writing = asyncio.Lock()
        self._backoff = Backoff(base=0.2, cap=2.0)
        self._closing = False
        self._former: set[str] = set()
        """The ids under which it was registered at addresses that this host no longer has."""
        self.registration: Registration | None = None
        """What is written to Consul; None until the own address is known."""

    @property
    def instance_id(self) -> str | None:
        """The own id; None until the own address is known."""
        return self.registration.id if self.registration else None

    @property
    def leaving(self) -> bool:
        """Whether this process was told to stop; its siblings may serve on, and then the instance stays."""
        return self._withdrawal is not None

    def serves(self, instance_id: str) -> bool:
        """Whether this process is that instance; not any more once that is withdrawn, or the process closes.

        Only siblings ask then: one that has not heard yet that all are stopped must not register it again.
        """
        return instance_id == self.instance_id and not self.withdrawn and not self._closing

    def start(self) -> None:
        """Begins in the background; never blocks and never fails."""
        self._task = asyncio.get_running_loop().create_task(
            self._run(), name=f"registrar {self._service.name}", context=contextvars.Context()
        )

    async def withdraw(self) -> None:
        """Takes this instance out of Consul: no caller finds it from now on. At most 2 s, raises nothing.

        Unless another process serves it on: then it goes with the last one, be it this one. In maintenance, when no
        caller finds it anyway, it stays in Consul, so that a restart does not end that; if none comes, Consul removes
        it by its check. Once begun it is carried through: cancelling a caller only ends his waiting, and later callers
        join in.
        """
        if self._withdrawal is None:
            self._withdrawal = asyncio.get_running_loop().create_task(
                self._withdraw(), name=f"withdraw {self._service.name}", context=contextvars.Context()
            )
        await self._settled.wait()

    async def answers(self) -> bool:
        """Whether the advertised address answers as this instance right now. At most 1 s."""
        if self.registration is None:
            return False
        self._complaint = await self._probe.complaint(self.registration, PROBE_TIMEOUT)
        return self._complaint is None

    async def aclose(self) -> None:
        """Withdraws, unless another process still serves this instance, and closes the connections. At most 3 s.

        Call it when this process no longer listens. Another process: a server's other workers, or the one that was
        here first, when ours ends because its port is taken.
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
                "could not deregister, Consul will notice by its checks: %s",
                str(error) or type(error).__name__,
                extra={"instance": self.instance_id},
            )
        finally:
            await self._stop()
            self._siblings.close()
            self._settled.set()

    async def _remove(self, service_id: str) -> None:
        if await self._entry.is_in_maintenance(service_id):
            logger.info("in maintenance: left in Consul for a restart", extra={"instance": service_id})
        else:
            await self._entry.remove(service_id)
            logger.info("deregistered", extra={"instance": service_id})

    async def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                registration = await self._locate()
                await self._siblings.join(registration.id)
                await self._until_answering(registration)
                async with self._writing:
                    await self._register(registration)
                failures = 0
                await self._warn_of_loopback(registration)
                await self._until_outdated(registration)
                logger.warning("registration in doubt: writing it again", extra={"instance": self.instance_id})
                await asyncio.sleep(random.uniform(*REJOIN_DELAY))
            except Exception as error:
                # Consul may be away for hours: the service runs on, and this task dies only by cancellation.
                failures += 1
                log = logger.warning if failures == 1 else logger.debug
                log("registration interrupted, trying on: %s", error, extra={"instance": self.instance_id})
                await asyncio.sleep(self._backoff.delay(failures))

    async def _locate(self) -> Registration:
        """What to write: what was written before, as long as this host has its address. Raises: OSError."""
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
        return Registration.of(self._service, address, self._about)

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
        logger.info("registered", extra={"instance": registration.id, "address": registration.instance.netloc})

    async def _warn_of_loopback(self, registration: Registration) -> None:
        if not is_loopback(registration.address):
            return
        with suppress(OSError):
            if not is_loopback(await address_towards(self._settings.host, self._settings.port)):
                logger.warning(
                    "registered with a loopback address, but Consul's agent is not on loopback: whoever calls from "
                    "another host would ask itself; unset SERVICE_ADDRESS, or set it to an address that all can reach",
                    extra={"instance": registration.id, "address": registration.instance.netloc},
                )

    async def _until_outdated(self, registration: Registration) -> None:
        """Returns when the agent forgot it, or its address is gone. Raises when Consul refuses to say."""
        forgotten = asyncio.get_running_loop().create_task(self._entry.until_forgotten(registration))
        try:
            while not forgotten.done() and not self._has_moved(registration):
                await asyncio.wait({forgotten}, timeout=LOOK)
            if forgotten.done():
                forgotten.result()
        finally:
            forgotten.cancel()
