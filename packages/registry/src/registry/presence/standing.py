"""Whether this instance is registered, as far as is known: told to the log and to observers, and counted."""

import logging

from registry.presence.registration import Registration
from registry.telemetry import Event, Observer, Observers

__all__ = ["Standing"]

logger = logging.getLogger("registry")

_FAILED = "registration failed, so callers can't find this service; it serves on and tries again every 2 s: %s"
_LOST = "registration failed for now; callers go by what they know, it serves on and tries again every 2 s: %s"


class Standing:
    """What has come of one instance's registration."""

    def __init__(self, service: str, observer: Observer | None) -> None:
        self.service = service
        self._observers = Observers(observer)
        self.instance: str | None = None
        self.registered = False
        self.registrations: dict[str, int] = {}
        """How often it was registered, by the reason: ``started``, ``forgotten`` by the agent, ``moved`` to another
        address, ``interrupted`` by an error, ``rotated``: with another token."""
        self._reason = "started"
        self._interrupted = 0

    def written(self, registration: Registration) -> None:
        """It is in Consul."""
        self.instance, self.registered, self._interrupted = registration.id, True, 0
        self._count(self._reason)
        logger.info("registered %s", registration.id, extra={"instance": registration.id})
        self._observers.happened(Event("registered", self.service, registration.id, self._reason))

    def rewritten(self) -> None:
        """It was in Consul all the time, and is there with another token now."""
        self._count("rotated")
        logger.info(
            "registered %s with the new token: the old one may end", self.instance, extra={"instance": self.instance}
        )
        self._observers.happened(Event("registered", self.service, self.instance, "rotated"))

    def doubted(self, reason: str) -> None:
        """It may be there no more, and will be written again: ``forgotten`` or ``moved``."""
        logger.warning("registration in doubt: writing it again", extra={"instance": self.instance})
        self._doubt(reason, "")

    def interrupted(self, error: Exception) -> int:
        """It can't be written, or not be watched, and is tried again. Returns how often in a row."""
        self._interrupted += 1
        log = logger.warning if self._interrupted == 1 else logger.debug
        words = str(error) or repr(error)
        log(_LOST if self.instance else _FAILED, words, extra={"instance": self.instance})
        if self._interrupted == 1:
            self._doubt("interrupted" if self.instance else self._reason, words)
        return self._interrupted

    def unreachable(self, registration: Registration) -> None:
        """It is at a loopback address, and Consul's agent is not."""
        logger.warning(
            "registered with a loopback address, but Consul's agent is not on loopback: whoever calls from "
            "another host would ask itself; unset SERVICE_ADDRESS, or set it to an address that all can reach",
            extra={"instance": registration.id, "address": registration.instance.netloc},
        )

    def withdrawn(self, service_id: str) -> None:
        """It was removed."""
        self.registered = False
        logger.info("deregistered %s", service_id, extra={"instance": service_id})
        self._observers.happened(Event("withdrawn", self.service, service_id))

    def _count(self, reason: str) -> None:
        self.registrations[reason] = self.registrations.get(reason, 0) + 1

    def _doubt(self, reason: str, detail: str) -> None:
        self.registered, self._reason = False, reason
        self._observers.happened(Event("in_doubt", self.service, self.instance, reason, detail))
