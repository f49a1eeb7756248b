"""Sheds load: what a service can't do in time it declines at once, so that it goes on doing what it can."""

import asyncio
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Literal, Self, TypeAlias

from starlette.datastructures import State
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from registry.discovery.advice import NOT_EXECUTED_HEADER
from registry.logs import POLLED
from registry.problems import problem
from registry.settings import ServiceSettings

__all__ = ["Reason", "Shedding", "caller_of", "shedding"]

logger = logging.getLogger("registry")

Reason: TypeAlias = Literal["lag", "in-flight", "rate"]
"""Why a request is declined: the event loop is late; too many are in progress; its caller sends too many."""

_SAMPLES = 4
"""How often the lag is measured within the time that it may last."""
_QUIET = 10.0
"""Seconds between two records in the log."""
_WORDS: dict[Reason, str] = {
    "lag": "this instance is overloaded: its event loop is late",
    "in-flight": "this instance is overloaded: too many requests are in progress",
}


def caller_of(scope: Scope) -> str | None:
    """The name of the service that sent this request, as its certificate has it; None: nobody has verified one.

    Whoever verifies it puts the name into ``scope["state"]["caller"]``, before this package's middleware is called.
    """
    caller = (scope.get("state") or {}).get("caller")
    return None if caller is None else str(caller)


@contextmanager
def shedding(state: State, settings: ServiceSettings) -> Iterator[None]:
    """Within it, an app with this state sheds what the settings say is too much, if it has ``RegistryMiddleware``.

    That finds it as ``state.shedding``; None: nothing is too much, and requests pass without being looked at.
    """
    asked = settings.shed_lag or settings.max_in_flight or settings.caller_rate
    try:
        with Shedding(settings) if asked else nullcontext() as state.shedding:
            yield
    finally:
        del state.shedding


class Shedding:
    """Executes a request or declines it, with 503, or with 429 if its caller sends too many. One for each app.

    A declined request is not executed, and ``X-Not-Executed`` says so: its sender may send it elsewhere at once, POST
    included. What machines ask every few seconds is always executed: ``/health``, ``/metrics``, ``/registry/state``.
    Belongs to one event loop, whose lag it measures from its entering until it is left.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self.counts: dict[Reason, int] = {}
        """How many requests were declined, and why."""
        self.in_flight = 0
        """Requests in progress, without those that are always executed."""
        self._lag = _Lag(settings.shed_lag) if settings.shed_lag else None
        self._most = settings.max_in_flight or math.inf
        self._rates = {caller.lower(): _Bucket(rate) for caller, rate in settings.caller_rate.items()}
        self._exempt = POLLED | {settings.health_check_path}
        self._answers = {reason: _answer(503, words, reason) for reason, words in _WORDS.items()}
        self._told = -math.inf
        self._warned = False

    def __enter__(self) -> Self:
        if self._lag is not None:
            self._lag.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._lag is not None:
            self._lag.stop()

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets the app answer, or declines in its place; in the latter case the app never sees the request."""
        if scope["path"].removeprefix(scope.get("root_path", "")) in self._exempt:
            await app(scope, receive, send)
            return
        declined = self._decline(scope)
        if declined is not None:
            await declined(scope, receive, send)
            return
        self.in_flight += 1
        try:
            await app(scope, receive, send)
        finally:
            self.in_flight -= 1

    def _decline(self, scope: Scope) -> Response | None:
        if self._lag is not None and self._lag.exceeded:
            return self._count("lag", self._answers["lag"])
        if self.in_flight >= self._most:
            return self._count("in-flight", self._answers["in-flight"])
        if not self._rates:
            return None
        caller = caller_of(scope)
        if caller is None:
            self._warn_of_nameless()
            return None
        bucket = self._rates.get(caller.lower())
        if bucket is None or not (seconds := bucket.take(time.monotonic())):
            return None
        words = f"{caller} sends more than the {bucket.rate:g} requests a second that this instance takes from it"
        return self._count("rate", _answer(429, words, "rate", seconds))

    def _warn_of_nameless(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "SERVICE_CALLER_RATE limits nobody, for callers show no certificates here; set CONSUL_CONNECT=true"
            )

    def _count(self, reason: Reason, answer: Response) -> Response:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        now = time.monotonic()
        if now - self._told >= _QUIET:
            self._told = now
            logger.warning(
                "declining requests, for too many come (%s); this is said once in 10 s",
                reason,
                extra={"reason": reason, "declined": sum(self.counts.values())},
            )
        return answer


class _Lag:
    """How late the event loop is: one timer, which tells by how much later than asked for it fires.

    By the system's clock, which is the same for every loop: uvloop counts milliseconds. "Exceeded" is meant as CoDel
    means it, for as long again as the limit: one late turn, for a garbage collection say, is no overload.
    Source: RFC 8289, 3.2.
    """

    def __init__(self, limit: float) -> None:
        self.exceeded = False
        self._limit = limit
        self._pause = limit / _SAMPLES
        self._late_since: float | None = None
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begins, on the running loop."""
        self._due = time.monotonic() + self._pause
        self._timer = asyncio.get_running_loop().call_later(self._pause, self._sample)

    def stop(self) -> None:
        """Ends."""
        if self._timer is not None:
            self._timer.cancel()

    def _sample(self) -> None:
        now = time.monotonic()
        if now - self._due <= self._limit:
            self._late_since, self.exceeded = None, False
        elif self._late_since is None:
            self._late_since = now
        else:
            self.exceeded = now - self._late_since >= self._limit
        self.start()


class _Bucket:
    """Lets so many a second through, and a second's worth at once."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._most = self._tokens = max(rate, 1.0)
        self._updated = -math.inf

    def take(self, now: float) -> float:
        """Takes one; 0.0: there was one. Otherwise the seconds until there is."""
        self._tokens = min(self._most, self._tokens + (now - self._updated) * self.rate)
        self._updated = now
        if self._tokens < 1:
            return (1 - self._tokens) / self.rate
        self._tokens -= 1
        return 0.0


def _answer(status: int, words: str, reason: Reason, seconds: float = 1.0) -> Response:
    return problem(status, words, {"Retry-After": str(math.ceil(seconds)), NOT_EXECUTED_HEADER: reason})
