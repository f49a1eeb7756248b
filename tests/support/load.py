"""A small load generator: callers that call without pause, or calls at a steady rate, and what each call came to.

``async with Load(call, callers=4) as load: await load.reached(1000); two.kill(); await load.reached(4000)``
"""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from itertools import starmap
from types import TracebackType
from typing import Any, Self

import httpx

__all__ = ["Call", "Load", "Outcome", "Report"]

Call = Callable[[str], Awaitable[httpx.Response]]
"""Makes one call that carries this id, such as in ``X-Request-Id``; an answer of 400 or more is a failure too."""

_TICK = 0.002
_LONGEST_TURN = 0.2


@dataclass(frozen=True, slots=True)
class Outcome:
    """One call. Times in seconds."""

    id: str
    """Of this call alone, so that servers can tell a second attempt from another call."""
    started: float
    """Since the load began."""
    seconds: float
    """How long the caller waited."""
    instance: str | None
    """Who answered: ``X-Service-Instance``, else ``instance`` in the body; None: nobody, or somebody unnamed."""
    error: str | None = None
    """``"HTTP 503"``, or the exception's class name; None: it succeeded."""
    message: str = ""
    """What the exception said, with its notes."""


@dataclass(frozen=True, slots=True)
class Report:
    """The calls that have ended, in the order in which they ended."""

    outcomes: tuple[Outcome, ...]

    def between(self, since: float, until: float = float("inf")) -> "Report":
        """Those that began in this time, in seconds since the load began."""
        return Report(tuple(outcome for outcome in self.outcomes if since <= outcome.started < until))

    @property
    def calls(self) -> int:
        """How many there are."""
        return len(self.outcomes)

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """Those that failed."""
        return tuple(outcome for outcome in self.outcomes if outcome.error is not None)

    @property
    def errors(self) -> Mapping[str, int]:
        """What failed calls failed with → how many."""
        return Counter(outcome.error for outcome in self.outcomes if outcome.error is not None)

    @property
    def shares(self) -> Mapping[str, float]:
        """Instance → its part of all answers that name one."""
        counts = Counter(outcome.instance for outcome in self.outcomes if outcome.instance is not None)
        return {instance: count / counts.total() for instance, count in counts.most_common()}

    def slower_than(self, seconds: float) -> int:
        """How many callers waited longer."""
        return sum(outcome.seconds > seconds for outcome in self.outcomes)

    def latency(self, quantile: float = 0.5) -> float:
        """Seconds within which this part of the calls ended; NaN without any."""
        ordered = sorted(outcome.seconds for outcome in self.outcomes)
        return ordered[min(int(quantile * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


class Load:
    """Calls while its context is open; leaving it begins no new call and waits for those under way.

    ``callers``: so many at a time, each beginning its next call when the last has ended. ``rate``: so many calls per
    second instead, each at its time, however many are still under way. ``calls``: stops by itself after so many.
    """

    def __init__(
        self, call: Call, *, callers: int = 4, rate: float | None = None, calls: int | float = float("inf")
    ) -> None:
        self._call = call
        self._callers = callers
        self._rate = rate
        self._calls = calls
        # Plain tuples, which the garbage collector soon forgets: its pauses would be taken for the client's.
        self._outcomes: list[tuple[str, float, float, str | None, str | None, str]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._prefix = uuid.uuid4().hex[:8]
        self._begun = 0
        self._ending = False
        self._began_at = time.monotonic()

    @property
    def now(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self._began_at

    @property
    def report(self) -> Report:
        """The calls that have ended so far."""
        return self.last(len(self._outcomes))

    @property
    def calls(self) -> int:
        """How many calls have ended so far."""
        return len(self._outcomes)

    def last(self, calls: int) -> Report:
        """The last so many calls that have ended."""
        return Report(tuple(starmap(Outcome, self._outcomes[-calls:])) if calls else ())

    async def reached(self, calls: int) -> None:
        """Returns when so many calls have ended. Raises: TimeoutError after a minute."""
        await self.until(lambda: len(self._outcomes) >= calls, what=f"{calls} calls")

    async def until(self, condition: Callable[[], bool], seconds: float = 60.0, *, what: str = "condition") -> float:
        """Returns when the condition holds, with the seconds that took. Raises: TimeoutError, naming ``what``."""
        started = time.monotonic()
        while not condition():
            waited = time.monotonic() - started
            if waited > seconds:
                raise TimeoutError(
                    f"{what}: not within {seconds} s; {len(self._outcomes)} of {self._begun} calls have ended, "
                    f"failed: {dict(self.report.errors)}"
                )
            await asyncio.sleep(_TICK)
        return time.monotonic() - started

    async def run(self) -> Report:
        """Makes all ``calls`` and returns what they came to."""
        async with self:
            await self.until(lambda: self._begun >= self._calls, float("inf"))
        return self.report

    async def __aenter__(self) -> Self:
        self._began_at = time.monotonic()
        if self._rate is None:
            for _ in range(self._callers):
                self._spawn(self._keep_calling())
        else:
            self._spawn(self._offer(self._rate))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ending = True
        if error is not None:
            for task in self._tasks:
                task.cancel()
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep_calling(self) -> None:
        turned = time.monotonic()
        while not self._ending and self._begun < self._calls:
            self._begun += 1
            await self._one(self._begun)
            if time.monotonic() - turned > _LONGEST_TURN:
                # A client that never waits blocks the event loop, which must show, but not for ever.
                await asyncio.sleep(0)
                turned = time.monotonic()

    async def _offer(self, rate: float) -> None:
        while not self._ending and self._begun < self._calls:
            due = min(self.now * rate, self._calls)
            while self._begun < int(due):
                self._begun += 1
                self._spawn(self._one(self._begun))
            await asyncio.sleep(_TICK)

    async def _one(self, number: int) -> None:
        request_id = f"{self._prefix}-{number}"
        started = time.monotonic()
        instance = error = None
        message = ""
        try:
            response = await self._call(request_id)
            instance = _instance_of(response)
            if response.is_error:
                error = f"HTTP {response.status_code}"
        except httpx.HTTPStatusError as failure:
            error, message = f"HTTP {failure.response.status_code}", _told(failure)
            instance = _instance_of(failure.response)
        except Exception as failure:
            error, message = type(failure).__name__, _told(failure)
        seconds = time.monotonic() - started
        self._outcomes.append((request_id, started - self._began_at, seconds, instance, error, message))


def _instance_of(response: httpx.Response) -> str | None:
    named = response.headers.get("X-Service-Instance")
    if named is not None:
        return str(named)
    try:
        body = response.json()
    except ValueError:
        return None
    return str(body["instance"]) if isinstance(body, dict) and "instance" in body else None


def _told(error: Exception) -> str:
    return "; ".join([str(error), *getattr(error, "__notes__", ())])
