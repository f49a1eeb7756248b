"""Who is to blame for an outcome. Only proof takes an instance out; what nobody knows counts against nobody.

| outcome of an attempt                                                     | sent?   | speaks against |
|---------------------------------------------------------------------------|---------|----------------|
| an answer below 500                                                       | yes     | nobody         |
| an answer from 500 on                                                     | yes     | the instance   |
| ``ConnectError``: refused, unreachable, no such host                      | no      | the instance   |
| ``ConnectTimeout``, after longer than answers usually take                | no      | the instance   |
| ``ReadTimeout``, ``WriteTimeout``, likewise                               | perhaps | the instance   |
| any of these, cut sooner by a limit of the caller's own                   | perhaps | the caller     |
| ``ReadError``, ``WriteError``, ``RemoteProtocolError``, ``DecodingError`` | perhaps | the instance   |
| ``ConnectError``, ``ConnectTimeout`` in the handshake of TLS              | no      | nobody         |
| no descriptor, port or memory left; a name server that does not answer    | no      | the caller     |
| ``PoolTimeout``: all connections in use                                   | no      | the caller     |
| ``LocalProtocolError``, ``UnsupportedProtocol``                           | no      | the caller     |
| whatever the source of the request's body raises                          | perhaps | the caller     |
| cancelled                                                                 | perhaps | the caller     |
| ``ResponseTooLargeError``                                                 | yes     | nobody         |
| anything else                                                             | perhaps | nobody         |

A failed handshake may mean no more than that TLS was asked of a port that does not speak it, or that the caller lacks
a CA; one that an instance with ``secure=true`` breaks off or leaves unanswered speaks against it. An outcome that
speaks against nobody ejects nobody, and yet makes the instance a less likely choice for a moment: one that fails in
an unknown way must not attract calls by failing quickly.
"""

import ssl
from collections.abc import Container, Iterator
from enum import Enum
from typing import NamedTuple

import httpx

from registry.discovery.connections import is_local_shortage

__all__ = ["Blame", "Failure", "Verdict", "judge"]


class Failure(Enum):
    """How far a failed attempt came."""

    NOT_SENT = "not sent"
    """The instance can't have seen the request."""
    SENT = "sent"
    """The request may have been seen, and may have had its effect."""
    FINAL = "final"
    """The caller's own doing, or nothing that another instance would answer differently."""


class Blame(Enum):
    """Whom an outcome speaks against."""

    INSTANCE = "the instance"
    CALLER = "the caller"
    NOBODY = "nobody"


class Verdict(NamedTuple):
    """What an outcome means."""

    failure: Failure | None
    """None: it is no failure."""
    blame: Blame


_SUCCESS = Verdict(None, Blame.NOBODY)
_BROKEN = (httpx.ReadTimeout, httpx.WriteTimeout, httpx.NetworkError, httpx.RemoteProtocolError, httpx.DecodingError)


def judge(
    outcome: httpx.Response | Exception, *, tls: bool = False, failures: Container[int] = range(500, 600)
) -> Verdict:
    """What the outcome of one attempt means, by the table above; but for time-outs, where it takes the worst case.

    ``tls``: the instance says of itself that it speaks TLS. ``failures``: the statuses that are.
    """
    if isinstance(outcome, httpx.Response):
        return Verdict(Failure.SENT, Blame.INSTANCE) if outcome.status_code in failures else _SUCCESS
    if isinstance(outcome, (httpx.ConnectError, httpx.ConnectTimeout)):
        causes = list(_causes(outcome))
        if any(isinstance(cause, ssl.SSLError) for cause in causes):
            unknown = not tls or any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes)
            return Verdict(Failure.NOT_SENT, Blame.NOBODY if unknown else Blame.INSTANCE)
        short = any(is_local_shortage(cause) for cause in causes)
        return Verdict(Failure.NOT_SENT, Blame.CALLER if short else Blame.INSTANCE)
    if isinstance(outcome, httpx.PoolTimeout):
        return Verdict(Failure.NOT_SENT, Blame.CALLER)
    if isinstance(outcome, _BROKEN):
        return Verdict(Failure.SENT, Blame.INSTANCE)
    if isinstance(outcome, (httpx.LocalProtocolError, httpx.UnsupportedProtocol)):
        return Verdict(Failure.FINAL, Blame.CALLER)
    return Verdict(Failure.FINAL, Blame.NOBODY)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and all that led to it: an inner transport may have wrapped the system's own several times."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for each in error.exceptions:
                yield from _causes(each)
        error = error.__cause__
