"""One call on its way: the request as the caller gave it, its limits, and what its attempts have shown."""

import logging
import math
import time
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from functools import partial

import httpx

from registry.discovery import context
from registry.discovery.advice import retry_after, why_declined
from registry.discovery.blame import Blame, Verdict, judge
from registry.discovery.endpoint import Endpoint
from registry.discovery.retry import is_idempotent
from registry.discovery.upstream import Upstream
from registry.errors import RegistryError
from registry.telemetry import AttemptOutcome, CallOutcome, ObservedCall

__all__ = ["Call", "Outcome", "Terms"]

logger = logging.getLogger("registry")

Outcome = httpx.Response | Exception
_CLOSE = 0.005
"""Seconds by which a time-out may come before the deadline that it is due to: they are read from two clocks."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What is asked of a call beside the request itself; nothing of it is left in the caller's request."""

    service: str | None = None
    """The service's name, where it can't stand as the URL's host."""
    tag: str | None = None
    """Only instances with this tag."""
    read: bool = False
    """The body is part of the attempt, and of what the limits are for."""
    limit: float | None = None
    """Seconds for one attempt."""
    patience: float | None = None
    """Seconds after which the client considers any instance late, whatever this call's own limit."""
    deadline: float = math.inf
    """Unix time by which the call has an outcome."""


class Call:
    """What is known of a call between its attempts. Costs a few microseconds, does no I/O."""

    __slots__ = (
        "_deadline",
        "_source",
        "attempt",
        "failed",
        "hedge",
        "idempotent",
        "notes",
        "observed",
        "outcome",
        "request",
        "retried_before",
        "safe",
        "seen",
        "terms",
        "too_early",
        "tried",
        "upstream",
    )

    def __init__(self, request: httpx.Request, upstream: Upstream, terms: Terms) -> None:
        self._source: _Source | None = None
        self.request = request
        self.upstream = upstream
        self.terms = terms
        self.attempt = 0
        self.seen = False
        """Whether an attempt before may have been executed."""
        self.too_early = False
        """Whether the last answer asked to wait, before anybody is asked again."""
        self.idempotent = is_idempotent(request)
        if not isinstance(request.stream, httpx.ByteStream):
            self._source = _Source(request)
            self.request = self._source.request
        self.safe = self.idempotent and self._source is None
        # Called on behalf of a retry: whoever retried there does so again, and must not be multiplied here.
        self.retried_before = context.is_retry()
        self.hedge = self.safe and not self.retried_before and request.extensions.get("hedge", False)
        self.tried: list[Endpoint] = []
        self.notes: list[str] = []
        self.outcome: Outcome | None = None
        inherited = context.deadline()
        self._deadline = terms.deadline if inherited is None else min(terms.deadline, inherited)
        self.failed: AttemptOutcome = "error"
        """How the attempt ended that failed last."""
        self.observed: ObservedCall | None = None
        if upstream.observers.of_calls:
            self.observed = ObservedCall(upstream.pool.service, request.method, partial(_bare, request.url))
            upstream.observers.call_begun(self.observed)

    @property
    def replayable(self) -> bool:
        """Whether the body can be sent (again)."""
        return self._source is None or not self._source.touched

    def left(self) -> float:
        """Seconds until the deadline; infinite without one."""
        return self._deadline - time.time()

    def attempt_limit(self) -> float | None:
        """Seconds that the next attempt may take; None: as long as it likes."""
        limit = min(self.left(), math.inf if self.terms.limit is None else self.terms.limit)
        return None if limit == math.inf else max(limit, 0.001)

    def start(self, endpoint: Endpoint) -> tuple[int, dict[str, str]]:
        """Begins an attempt: its number, 1-based, and what it says beside the caller's own headers."""
        self.attempt += 1
        self.tried.append(endpoint)
        headers = {} if self._deadline == math.inf else {context.DEADLINE_HEADER: context.said(self._deadline)}
        if self.seen:
            headers[context.RETRY_HEADER] = str(self.attempt)
        return self.attempt, headers

    def judge(self, endpoint: Endpoint, outcome: Outcome, seconds: float) -> Verdict:
        """What the outcome of an attempt that took so long means. Raises: what the request's own source raised."""
        if self._source is not None and self._source.error is not None:
            raise self._source.error
        verdict = judge(
            outcome,
            tls=endpoint.instance.scheme == "https",
            failures=self.upstream.retry.failure_statuses,
        )
        if verdict.blame is Blame.INSTANCE and isinstance(outcome, httpx.TimeoutException):
            patience = self.terms.patience
            if (patience is None or seconds < patience) and not self.upstream.is_long(seconds):
                return Verdict(verdict.failure, Blame.CALLER)
        return verdict

    def note(self, attempt: int, endpoint: Endpoint, outcome: Outcome, name: AttemptOutcome) -> str:
        """Remembers a failed attempt, for the error. Returns it in words."""
        what = _words(outcome)
        instance = endpoint.instance
        self.failed = name
        self.notes.append(f"attempt {attempt} on {instance.id} ({instance.netloc}): {what}")
        logger.debug("attempt failed", extra={"attempt": attempt, "peer": instance.id, "outcome": what})
        return what

    def end(self, result: httpx.Response | BaseException) -> None:
        """Counts what the call has come to, and tells it."""
        outcome, upstream = self._outcome(result), self.upstream
        upstream.calls[outcome] = upstream.calls.get(outcome, 0) + 1
        if self.observed is not None:
            seconds = time.monotonic() - self.observed.started
            self.observed.end(outcome, seconds, result)
            upstream.observers.call_ended(self.observed)

    def _outcome(self, result: httpx.Response | BaseException) -> CallOutcome:
        if isinstance(result, httpx.Response):
            return "status" if result.is_error else "ok"
        if not isinstance(result, Exception):
            return "cancelled"
        if isinstance(result, RegistryError):
            return "failing_fast" if self.upstream.pool.failing_fast_for else "no_instance"
        return "deadline" if isinstance(result, httpx.TimeoutException) and self.left() < _CLOSE else "error"

    def retry_after(self) -> float | None:
        """Seconds that the last answer asks to wait; None when it does not."""
        return retry_after(self.outcome) if isinstance(self.outcome, httpx.Response) else None

    async def discard(self) -> None:
        """The last outcome will not be the call's: an answer is closed, and its connection with it."""
        if isinstance(self.outcome, httpx.Response):
            await self.outcome.aclose()

    def give_up(self) -> httpx.Response:
        """The last outcome as the call's: the answer returned, or the error raised with its notes."""
        if isinstance(self.outcome, httpx.Response):
            self.outcome.extensions["attempts"] = self.notes
            return self.outcome
        assert self.outcome is not None
        for note in self.notes:
            self.outcome.add_note(note)
        raise self.outcome


def _words(outcome: Outcome) -> str:
    if not isinstance(outcome, httpx.Response):
        return repr(outcome)
    reason = why_declined(outcome)
    return f"HTTP {outcome.status_code}" + ("" if reason is None else f", not executed: {reason}")


def _bare(url: httpx.URL) -> str:
    """Without query and credentials, and 40 µs quicker than httpx's own way."""
    return f"{url.scheme}://{url.netloc.decode('ascii')}{url.raw_path.partition(b'?')[0].decode('ascii')}"


class _Source(httpx.AsyncByteStream):
    """A request's body that comes from the caller piece by piece: whether it was touched, and what it raised."""

    def __init__(self, request: httpx.Request) -> None:
        if not isinstance(request.stream, AsyncIterable):
            raise RuntimeError("the request's body is a plain iterator or file: pass bytes or an async iterator")
        self.touched = False
        self.error: Exception | None = None
        self._pieces = request.stream
        self.request = httpx.Request(
            request.method, request.url, headers=request.headers, stream=self, extensions=request.extensions
        )

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.touched = True
        try:
            async for piece in self._pieces:
                yield piece
        except Exception as error:
            self.error = error
            raise
