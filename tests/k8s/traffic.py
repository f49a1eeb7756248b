"""Load by name from a pod while a scene plays, and what each call came to: told by the caller and by the database."""

from collections.abc import Iterator
from contextlib import contextmanager

from tests.e2e.system import wait_until
from tests.e2e.traffic import Caller
from tests.k8s.system import System
from tests.support.load import Outcome, Report

RATE = 10.0
"""GETs, and POSTs, per second."""
BEFORE, AFTER = 30, 60
"""Calls of each kind before something is done, and when everything works again."""
_LONGEST = 120.0


class Traffic:
    """A caller, calling while its context is open; made by `traffic`."""

    def __init__(self, system: System, zone: str | None) -> None:
        self._system = system
        self._caller = Caller(system.calling(RATE, zone))
        self.doubled: tuple[str, ...] = ()
        """Ids of POSTs that are in the database more than once; known when the load has ended, as is the next."""
        self.lost: tuple[str, ...] = ()
        """Ids of POSTs that were answered with 201 and are not in the database."""

    def report(self, method: str) -> Report:
        """The calls that have ended so far."""
        return Report(tuple(self._caller.calls[method]))

    def failures(self, method: str) -> tuple[Outcome, ...]:
        """Those that failed."""
        return self.report(method).failures

    def go_on_for(self, calls: int) -> None:
        """Returns when so many more of each kind have ended. Raises: TimeoutError."""
        wanted = max(map(len, self._caller.calls.values())) + calls
        wait_until(
            lambda: min(map(len, self._caller.calls.values())) >= wanted, _LONGEST, f"{calls} calls of each kind"
        )

    def start(self) -> None:
        """Returns when it calls."""
        self._caller.wait_until_ready()

    def stop(self) -> None:
        """Ends the load, and reads what the database has of it."""
        self._caller.stop()
        cards = self._system.cards()
        posts = self.report("POST").outcomes
        self.doubled = tuple(post.id for post in posts if cards.get(post.id, 0) > 1)
        self.lost = tuple(post.id for post in posts if post.error is None and post.id not in cards)

    def close(self) -> None:
        """Ends the caller, whatever it does."""
        self._caller.close()


@contextmanager
def traffic(system: System, zone: str | None = None) -> Iterator[Traffic]:
    """Load on backend-api while the context is open, and a little before and after; then what came of it is known.

    ``zone``: where the caller says that it runs; None: it has no zone, and calls all alike.
    """
    load = Traffic(system, zone)
    try:
        load.start()
        load.go_on_for(BEFORE)
        yield load
        load.go_on_for(AFTER)
        load.stop()
    finally:
        load.close()
