"""Whether and when a failed attempt is followed by another: a decision table, a delay and a budget. No I/O."""

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import httpx

from registry.backoff import Backoff
from registry.discovery.blame import Failure
from registry.errors import InvalidInputError

__all__ = ["RetryBudget", "RetryPolicy", "is_idempotent"]

# RFC 9110, 9.2.2: "Of the request methods defined by this specification, PUT, DELETE, and safe request methods are
# idempotent." Source: https://www.rfc-editor.org/rfc/rfc9110#section-9.2.2
IDEMPOTENT_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})


def is_idempotent(request: httpx.Request) -> bool:
    """Whether the request may be sent twice: by its method, its ``Idempotency-Key`` or the caller's own word."""
    stated = request.extensions.get("idempotent")
    if stated is not None:
        return bool(stated)
    return request.method in IDEMPOTENT_METHODS or "Idempotency-Key" in request.headers


@dataclass
class RetryBudget:
    """Retries are at most ``ratio`` of the calls plus ``per_second``: an outage is not multiplied. A token bucket.

    Source: https://github.com/twitter/finagle/blob/develop/finagle-core/src/main/scala/com/twitter/finagle/service/RetryBudget.scala
    """

    ratio: float = 0.2
    per_second: float = 10.0
    clock: Callable[[], float] = time.monotonic
    exhausted: int = field(default=0, init=False)
    """How many retries it has refused."""
    _balance: float = field(init=False)
    _updated: float = field(init=False)

    def __post_init__(self) -> None:
        self._balance = self.per_second
        self._updated = self.clock()

    def deposit(self) -> None:
        """A call begins."""
        self._balance += self.ratio

    def withdraw(self) -> bool:
        """Whether a retry may go ahead now; if so, it is paid for."""
        if self.left() < 1:
            self.exhausted += 1
            return False
        self._balance -= 1
        return True

    def left(self) -> float:
        """How many retries may follow now."""
        now = self.clock()
        # Ten seconds' worth is the most that a quiet time may save up.
        limit = 10 * self.per_second
        self._balance = min(limit, self._balance + (now - self._updated) * self.per_second)
        self._updated = now
        return self._balance


@dataclass(frozen=True)
class RetryPolicy:
    """When a failed attempt is followed by another one. Raises: InvalidInputError."""

    max_retries: int = 3
    """Attempts in total, the first included."""
    retry_delay: float = 1.0
    """Seconds from which delays grow, once all instances were asked."""
    max_delay: float = 10.0
    """Seconds to which they grow."""
    max_wait: float = 60.0
    """Seconds that a call without a deadline waits for the next attempt at most, whatever ``Retry-After`` says."""
    budget_ratio: float = 0.2
    """How many retries there may be for each call, on average ..."""
    budget_per_second: float = 10.0
    """... beside so many a second: an outage is not multiplied."""
    failure_statuses: Collection[int] = range(500, 600)
    """Answers that count as failures of the instance."""

    def __post_init__(self) -> None:
        if not (self.max_retries >= 1 and 0 <= self.retry_delay < math.inf and self.max_delay >= 0):
            raise InvalidInputError("max_retries is 1 or more, retry_delay and max_delay are seconds, 0 or more")
        if not (self.budget_ratio >= 0 and self.budget_per_second > 0 and self.max_wait >= 0):
            raise InvalidInputError("budget_ratio and max_wait are 0 or more, budget_per_second is above 0")

    def allows(self, failure: Failure, *, idempotent: bool, replayable: bool) -> bool:
        """Whether this failure may be followed by another attempt at all.

        ``replayable``: the body is in memory, or its source has not been touched yet.

        | failure      | idempotent                  | not idempotent              |
        |--------------|-----------------------------|-----------------------------|
        | not sent     | if the body can be replayed | if the body can be replayed |
        | not executed | if the body can be replayed | if the body can be replayed |
        | sent         | if the body can be replayed | never                       |
        | too early    | if the body can be replayed | never                       |
        | final        | never                       | never                       |
        """
        if failure is Failure.FINAL or not replayable:
            return False
        return failure.without_effect or idempotent

    def delay(self, attempt: int, retry_after: float | None = None) -> float:
        """Seconds to wait before the next attempt once every instance was tried; ``Retry-After`` is a lower bound."""
        return max(Backoff(self.retry_delay, self.max_delay).delay(attempt), retry_after or 0.0)
