"""What a request in progress imposes on the calls made on its behalf: its deadline, and that it is a retry itself.

``registry.fastapi`` reads both from the request's headers; the transport obeys and passes them on.
"""

import time
from contextvars import ContextVar

__all__ = ["DEADLINE_HEADER", "RETRY_HEADER", "deadline", "is_retry", "seconds_left"]

DEADLINE_HEADER = "X-Request-Deadline"
"""Unix time, in seconds with a fraction, after which nobody waits for the answer.

A point in time and not a duration, because a request can wait unseen in the queue of a stopped process; so the clocks
of machines that call each other must agree to well within their time-outs.
"""
RETRY_HEADER = "X-Retry-Attempt"
"""The number of the attempt, from 2 on."""

deadline: ContextVar[float | None] = ContextVar("deadline", default=None)
"""Unix time by which the request being served must be answered."""
is_retry: ContextVar[bool] = ContextVar("is_retry", default=False)
"""Whether the request being served is a retry, so that calls on its behalf must not be multiplied again."""


def seconds_left(stamp: str) -> float | None:
    """Seconds until the deadline in a header, below 0 when it has passed; None when it is no number."""
    try:
        return float(stamp) - time.time()
    except ValueError:
        return None
