"""What a request in progress imposes on the calls made on its behalf: its deadline, and that it is a retry itself.

``registry.fastapi`` reads both from the request's headers; the transport obeys and passes them on.
"""

import re
import time
from collections.abc import Iterable
from contextvars import ContextVar

__all__ = ["DEADLINE_HEADER", "RETRY_HEADER", "Inherited", "deadline", "inherited", "is_retry", "read"]

DEADLINE_HEADER = "X-Request-Deadline"
"""Unix time, in seconds with a fraction, after which nobody waits for the answer.

A point in time and not a duration, because a request can wait unseen in the queue of a stopped process; so the clocks
of machines that call each other must agree to well within their time-outs.
"""
RETRY_HEADER = "X-Retry-Attempt"
"""The number of the attempt, from 2 on; said once an earlier one may have been executed."""

_DEADLINE, _RETRY = DEADLINE_HEADER.lower().encode(), RETRY_HEADER.lower().encode()
_STAMP = re.compile(rb"[0-9]{1,15}(\.[0-9]{1,9})?")
_ATTEMPT = re.compile(rb"[2-9]|[1-9][0-9]{1,3}")
_EARLIEST = 1e9
_AHEAD = 86_400.0


class Inherited:
    """What the request being served imposes. Tasks that it starts share it, and see it end with the answer."""

    __slots__ = ("deadline", "is_retry")

    def __init__(self, deadline: float | None, is_retry: bool) -> None:
        self.deadline = deadline
        """Unix time by which the answer must have begun; None: at leisure."""
        self.is_retry = is_retry
        """Whether calls on its behalf must not be multiplied again."""


inherited: ContextVar[Inherited | None] = ContextVar("inherited", default=None)
"""Set while a request is served."""


def deadline() -> float | None:
    """Unix time by which the request being served must be answered; None: there is no such request or limit."""
    request = inherited.get()
    return None if request is None else request.deadline


def is_retry() -> bool:
    """Whether the request being served is a retry."""
    request = inherited.get()
    return request is not None and request.is_retry


def read(headers: Iterable[tuple[bytes, bytes]]) -> Inherited:
    """The deadline and whether it is a retry, from a request's headers, whose names are in lower case.

    None stands for no deadline, and for one that no caller can mean: a duration in place of a time, milliseconds, or a
    time more than a day ahead.
    """
    found = Inherited(None, False)
    for name, value in headers:
        if name == _DEADLINE:
            stamp = float(value) if _STAMP.fullmatch(value) else 0.0
            found.deadline = stamp if _EARLIEST <= stamp <= time.time() + _AHEAD else None
        elif name == _RETRY:
            found.is_retry = _ATTEMPT.fullmatch(value) is not None
    return found
