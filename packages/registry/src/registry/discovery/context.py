"""What a request in progress imposes on the calls made on its behalf: its deadline, and that it is a retry itself.

``registry.fastapi`` reads both from the request's headers; the transport obeys and passes them on.
"""

import re
import time
from collections import OrderedDict
from collections.abc import Iterable
from contextvars import ContextVar

__all__ = [
    "DEADLINE_HEADER",
    "RETRY_HEADER",
    "Clocks",
    "Inherited",
    "deadline",
    "inherited",
    "is_retry",
    "read",
    "said",
]

DEADLINE_HEADER = "X-Request-Deadline"
"""Unix time, in seconds with a fraction, after which nobody waits for the answer; ``; left=``: seconds until then.

A point in time and not only a duration, because a request can wait unseen in the queue of a stopped process. What was
left when it was sent tells how far the caller's clock is from ours: `Clocks`.
"""
RETRY_HEADER = "X-Retry-Attempt"
"""The number of the attempt, from 2 on; said once an earlier one may have been executed."""

_DEADLINE, _RETRY = DEADLINE_HEADER.lower().encode(), RETRY_HEADER.lower().encode()
_STAMP = re.compile(rb"([0-9]{1,15}(?:\.[0-9]{1,9})?)(?:; *left=([0-9]{1,9}(?:\.[0-9]{1,9})?))?")
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


class Clocks:
    """How far the clocks of callers are from ours, as far as their requests tell; for those that are far off.

    A request comes late by its way, by its time in a queue, and by how far its caller's clock is behind. The least of
    a caller's requests shows the last of these, a queue delays only some. The first request of a caller can't be told
    from one that waited: it gets the time that it says is left.
    """

    _AGREE = 0.5
    """Seconds that clocks may differ without being corrected: the way of a request, and a short queue, are as long."""
    _DRIFT = 0.001
    """Seconds by which a clock may change in a second, so that one that was set right is believed again."""
    _MOST = 1_024

    def __init__(self) -> None:
        self._behind: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def ours(self, stamp: float, left: float, caller: str, now: float) -> float:
        """The caller's point in time by our clock."""
        behind = now - (stamp - left)
        known, since = self._behind.pop(caller, (behind, now))
        behind = min(behind, known + self._DRIFT * max(0.0, now - since))
        self._behind[caller] = behind, now
        if len(self._behind) > self._MOST:
            self._behind.popitem(last=False)
        return stamp + (behind if abs(behind) > self._AGREE else 0.0)


_clocks = Clocks()

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


def said(deadline: float) -> str:
    """The header's value for a point in time by our clock."""
    return f"{deadline:.3f}; left={max(0.0, deadline - time.time()):.3f}"


def read(headers: Iterable[tuple[bytes, bytes]], caller: str = "") -> Inherited:
    """The deadline and whether it is a retry, from a request's headers, whose names are in lower case.

    ``caller``: the address that it comes from, by whose clock the deadline is meant.

    None stands for no deadline, and for one that no caller can mean: a duration in place of a time, milliseconds, or a
    time more than a day ahead.
    """
    values = dict(headers)
    deadline, retry = values.get(_DEADLINE), values.get(_RETRY)
    return Inherited(
        None if deadline is None else _ours(deadline, caller), retry is not None and bool(_ATTEMPT.fullmatch(retry))
    )


def _ours(value: bytes, caller: str) -> float | None:
    said, now = _STAMP.fullmatch(value), time.time()
    if said is None or float(said[1]) < _EARLIEST:
        return None
    stamp = float(said[1])
    if said[2] is not None:
        stamp = _clocks.ours(stamp, float(said[2]), caller, now)
    return stamp if stamp <= now + _AHEAD else None
