"""The bookkeeping of one attempt: what is under way, how it ended, and whom that speaks against."""

import asyncio
import time
from types import TracebackType
from typing import Self

import httpx

from registry.discovery.blame import Blame, Failure, Verdict, outcome_name
from registry.discovery.call import Call, Outcome
from registry.discovery.endpoint import Endpoint
from registry.telemetry import AttemptOutcome, ObservedAttempt

__all__ = ["Attempt"]


class Attempt:
    """A context around one request to one endpoint, from its pick on; reports to the pool however it is left.

    Set ``outcome`` to the answer; an exception inside becomes the outcome, unless it is the caller's: what the source
    of the request's body raises, and a cancellation.
    """

    __slots__ = ("_call", "_observed", "_started", "endpoint", "failure", "headers", "number", "outcome")

    def __init__(self, call: Call, endpoint: Endpoint, *, hedge: bool = False) -> None:
        """``hedge``: it is sent because the one before takes long."""
        self._call = call
        self.endpoint = endpoint
        self._started = time.monotonic()
        self.outcome: Outcome | None = None
        self.failure: Failure | None = None
        """How far it came; None: it succeeded."""
        self.number, self.headers = call.start(endpoint)
        self._observed: ObservedAttempt | None = None
        if call.observed is not None:
            self._observed = ObservedAttempt(
                call.observed, self.number, endpoint.instance, endpoint.reason, self.headers, hedge=hedge
            )

    def __enter__(self) -> Self:
        self.endpoint.started[self] = self._started
        if self._observed is not None:
            self._call.upstream.observers.attempt_begun(self._observed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        del self.endpoint.started[self]
        now = time.monotonic()
        seconds = now - self._started
        if isinstance(error, Exception):
            self.outcome = error
        elif error is not None:
            if isinstance(error, asyncio.CancelledError):
                # Its silence is a measurement too: an answer would have taken longer.
                self.endpoint.observe(seconds, now)
            self._count("cancelled", error, seconds)
            return False
        assert self.outcome is not None
        try:
            verdict = self._call.judge(self.endpoint, self.outcome, seconds)
        except Exception as raised:
            self._count("error", raised, seconds)
            raise
        self._report(self.outcome, verdict, seconds, now)
        return True

    def _report(self, outcome: Outcome, verdict: Verdict, seconds: float, now: float) -> None:
        call, endpoint = self._call, self.endpoint
        pool = call.upstream.pool
        self.failure, blame = verdict
        name = outcome_name(outcome, verdict)
        if self.failure is None:
            pool.succeeded(endpoint, seconds)
            call.upstream.latencies.append(seconds)
        else:
            words = call.note(self.number, endpoint, outcome, name)
            if blame is Blame.INSTANCE:
                pool.failed(endpoint, self.failure, seconds, name, words)
            elif self.failure is Failure.NOT_EXECUTED:
                pool.succeeded(endpoint, seconds, executed=False)
            elif blame is Blame.NOBODY:
                endpoint.avoid(seconds, now)
            elif self.failure is Failure.SENT:
                endpoint.observe(seconds, now)
        self._count(name, outcome, seconds)

    def _count(self, name: AttemptOutcome, result: httpx.Response | BaseException, seconds: float) -> None:
        outcomes = self.endpoint.counts.outcomes
        outcomes[name] = outcomes.get(name, 0) + 1
        if self._observed is not None:
            self._observed.end(name, seconds, result)
            self._call.upstream.observers.attempt_ended(self._observed)
