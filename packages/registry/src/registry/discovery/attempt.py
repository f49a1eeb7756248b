"""The bookkeeping of one attempt: what is under way, how it ended, and whom that speaks against."""

import asyncio
import time
from types import TracebackType
from typing import Self

from registry.discovery.blame import Blame, Failure
from registry.discovery.call import Call, Outcome
from registry.discovery.endpoint import Endpoint

__all__ = ["Attempt"]

_AVOIDED = 0.2
"""Seconds that an attempt which failed for no known reason counts as, so that failing quickly attracts no calls."""


class Attempt:
    """A context around one request to one endpoint; reports to the endpoint's pool however it is left.

    Set ``outcome`` to the answer; an exception inside becomes the outcome, unless it is the caller's: what the source
    of the request's body raises, and a cancellation.
    """

    __slots__ = ("_call", "_endpoint", "_started", "failure", "headers", "number", "outcome")

    def __init__(self, call: Call, endpoint: Endpoint, picked: float | None = None) -> None:
        """``picked``: when the endpoint was chosen, if the attempt begins later."""
        self._call = call
        self._endpoint = endpoint
        self._started = time.monotonic() if picked is None else picked
        self.outcome: Outcome | None = None
        self.failure: Failure | None = None
        """How far it came; None: it succeeded."""
        self.number, self.headers = call.start(endpoint)

    def __enter__(self) -> Self:
        self._endpoint.started[self] = self._started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        del self._endpoint.started[self]
        now = time.monotonic()
        seconds = now - self._started
        if isinstance(error, Exception):
            self.outcome = error
        elif error is not None:
            if isinstance(error, asyncio.CancelledError):
                # Its silence is a measurement too: an answer would have taken longer.
                self._endpoint.observe(seconds, now)
            return False
        assert self.outcome is not None
        self._report(self.outcome, seconds, now)
        return True

    def _report(self, outcome: Outcome, seconds: float, now: float) -> None:
        call, endpoint = self._call, self._endpoint
        pool = call.upstream.pool
        self.failure, blame = call.judge(endpoint, outcome, seconds)
        if self.failure is None:
            pool.succeeded(endpoint, seconds)
            call.upstream.latencies.append(seconds)
            return
        if blame is Blame.INSTANCE:
            pool.failed(endpoint, self.failure, seconds)
        elif blame is Blame.NOBODY:
            endpoint.observe(max(seconds, _AVOIDED), now)
        elif self.failure is Failure.SENT:
            endpoint.observe(seconds, now)
        call.note(self.number, endpoint, outcome)
