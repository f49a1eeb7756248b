"""What an answer says about asking again: that the request was not executed, and how long to wait. No I/O."""

import re
import time
from datetime import UTC
from email.utils import parsedate_to_datetime

import httpx

__all__ = ["NOT_EXECUTED_HEADER", "retry_after", "why_declined"]

NOT_EXECUTED_HEADER = "X-Not-Executed"
"""With a 503 or 429: nothing was done for this request, so whoever sent it may send it elsewhere, POST included.

The value is the reason, in a word. What other statuses say with it is ignored: they are answers of the app.
"""
_DECLINES = frozenset({429, 503})
_MOST = 40


def why_declined(response: httpx.Response) -> str | None:
    """The reason for which the request was not executed; None: it was, or nobody can tell."""
    if response.status_code not in _DECLINES:
        return None
    reason: str | None = response.headers.get(NOT_EXECUTED_HEADER)
    return None if reason is None else reason[:_MOST]


def retry_after(response: httpx.Response) -> float | None:
    """Seconds that the answer asks to wait, None if it does not. Source: RFC 9110, 10.2.3."""
    value = response.headers.get("Retry-After")
    if value is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", value.strip()):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
        # RFC 9110, 5.6.7: a date in one of its older forms names no zone, and "MUST be interpreted as" UTC.
        utc = date if date.tzinfo else date.replace(tzinfo=UTC)
        return max(0.0, utc.timestamp() - time.time())
    except (ValueError, TypeError):
        return None
