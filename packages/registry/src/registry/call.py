"""One call on its way: the request as the caller gave it, its limits, and what its attempts have shown."""

import logging
import math
import time

import httpx

from registry import context
from registry.balancing import Endpoint
from registry.retry import is_idempotent, retry_after
from registry.upstream import Upstream

__all__ = ["Call", "Outcome"]

logger = logging.getLogger("registry")

Outcome = httpx.Response | httpx.TransportError


class Call:
    """What is known of a call between its attempts. Costs a few microseconds, does no I/O."""

    __slots__ = (
        "_deadline",
        "_limit",
        "attempt",
        "hedge",
        "idempotent",
        "notes",
        "outcome",
        "read",
        "replayable",
        "request",
        "retried_before",
        "safe",
        "seen",
        "tried",
        "upstream",
    )

    def __init__(
        self, request: httpx.Request, upstream: Upstream, read: bool, limit: float | None, deadline: float | None
    ) -> None:
        self.request = request
        self.upstream = upstream
        self.read = read
        self.attempt = 0
        self.seen = False
        """Whether an attempt before may have been executed."""
        self.idempotent = is_idempotent(request)
        self.replayable = isinstance(request.stream, httpx.ByteStream)
        self.safe = self.idempotent and self.replayable
        # Called on behalf of a retry: whoever retried there does so again, and must not be multiplied here.
        self.retried_before = context.is_retry.get()
        self.hedge = self.safe and not self.retried_before and request.extensions.get("hedge", False)
        self.tried: list[Endpoint] = []
        self.notes: list[str] = []
        self.outcome: Outcome | None = None
        self._limit = limit
        # A redirect is part of the call that it answers: httpx hands the extensions on.
        self._deadline: float = request.extensions.setdefault(
            "deadline_at", math.inf if deadline is None else time.time() + deadline
        )
        inherited = context.deadline.get()
        if inherited is not None:
            self._deadline = min(self._deadline, inherited)

    def left(self) -> float:
        """Seconds until the deadline; infinite without one."""
        return self._deadline - time.time()

    def attempt_limit(self) -> float | None:
        """Seconds that the next attempt may take; None: as long as it likes."""
        limit = min(self.left(), math.inf if self._limit is None else self._limit)
        return None if limit == math.inf else max(limit, 0.001)

    def start(self, endpoint: Endpoint) -> tuple[int, dict[str, str]]:
        """Begins an attempt: its number, 1-based, and what it says beside the caller's own headers."""
        self.attempt += 1
        self.tried.append(endpoint)
        headers = {} if self._deadline == math.inf else {context.DEADLINE_HEADER: f"{self._deadline:.3f}"}
        if self.seen:
            headers[context.RETRY_HEADER] = str(self.attempt)
        return self.attempt, headers

    def note(self, attempt: int, endpoint: Endpoint, outcome: Outcome) -> None:
        """Remembers a failed attempt, for the error."""
        what = f"HTTP {outcome.status_code}" if isinstance(outcome, httpx.Response) else repr(outcome)
        instance = endpoint.instance
        self.notes.append(f"attempt {attempt} on {instance.id} ({instance.netloc}): {what}")
        logger.debug("attempt failed", extra={"attempt": attempt, "instance": instance.id, "outcome": what})

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
