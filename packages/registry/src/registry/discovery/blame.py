"""Whom an outcome counts against. Only proof ejects an instance; an unclear outcome counts against nobody.

| outcome of an attempt                                                     | sent?   | counts against |
|---------------------------------------------------------------------------|---------|----------------|
| a 503 or 429 that says ``X-Not-Executed``                                 | yes     | nobody         |
| a 429 that says ``Retry-After``                                           | yes     | nobody         |
| any other response with a status below 500                                | yes     | nobody         |
| a response with a status of 500 or above                                  | yes     | the instance   |
| ``ConnectError``: refused, unreachable, no such host                      | no      | the instance   |
| ``ConnectTimeout``, after longer than responses usually take              | no      | the instance   |
| ``ReadTimeout``, ``WriteTimeout``, likewise                               | perhaps | the instance   |
| any of these timeouts, earlier, because of the caller's own limit         | perhaps | the caller     |
| ``ReadError``, ``WriteError``, ``RemoteProtocolError``, ``DecodingError`` | perhaps | the instance   |
| ``ConnectError``, ``ConnectTimeout`` during the TLS handshake             | no      | nobody         |
| likewise, with an instance that has ``connect`` or ``secure=true``        | no      | the instance   |
| ``ConnectError``: it proved to be another service than the one called     | no      | the instance   |
| ``ConnectError``: it does not accept our certificate, or we have none     | no      | nobody         |
| no file descriptor, port or memory left; the name server does not answer  | no      | the caller     |
| ``PoolTimeout``: all connections in use                                   | no      | the caller     |
| ``LocalProtocolError``, ``UnsupportedProtocol``                           | no      | the caller     |
| any error that the source of the request's body raises                    | perhaps | the caller     |
| cancelled                                                                 | perhaps | the caller     |
| ``ResponseTooLargeError``                                                 | yes     | nobody         |
| anything else                                                             | perhaps | nobody         |

A failed handshake may only mean that the port does not serve TLS, or that the caller lacks a CA. If an instance with
``secure=true`` breaks off the handshake or does not answer it, that counts against the instance. So does, with
``connect``, a certificate that is not the called service's; a caller's own that a server refuses, or that is not there
yet, counts against nobody. With TLS 1.3 a server refuses it after the request may have been sent: if it says so by an
alert, it has read none of it; if it only closes the connection, that is a ``ReadError``. An outcome that counts
against nobody ejects nobody, but makes the instance a less likely choice for a moment: an instance that fails in an
unknown way must not attract calls by failing quickly.
"""

import ssl
from collections.abc import Container, Iterator
from enum import Enum
from typing import NamedTuple

import httpx

from registry.discovery.advice import retry_after, why_declined
from registry.discovery.connections import is_local_shortage
from registry.discovery.peers import NoCertificateError, PeerError, RejectedError, rejection
from registry.telemetry import AttemptOutcome

__all__ = ["Blame", "Failure", "Verdict", "judge", "outcome_name"]


class Failure(Enum):
    """How far a failed attempt got."""

    NOT_SENT = "not sent"
    """The instance can't have seen the request."""
    NOT_EXECUTED = "not executed"
    """The instance has seen the request, and says that it did nothing for it."""
    SENT = "sent"
    """The instance may have seen the request, and may have acted on it."""
    TOO_EARLY = "too early"
    """The instance says when to ask again: not before, and no other in its place."""
    FINAL = "final"
    """The caller's own fault, or a failure that another instance would repeat."""

    @property
    def without_effect(self) -> bool:
        """Whether the request has certainly done nothing, so that it may be sent again whatever it asks for."""
        return self is Failure.NOT_SENT or self is Failure.NOT_EXECUTED


class Blame(Enum):
    """Whom an outcome counts against."""

    INSTANCE = "the instance"
    CALLER = "the caller"
    NOBODY = "nobody"


class Verdict(NamedTuple):
    """What an outcome means."""

    failure: Failure | None
    """None: the attempt succeeded."""
    blame: Blame


_SUCCESS = Verdict(None, Blame.NOBODY)
_BROKEN = (httpx.ReadTimeout, httpx.WriteTimeout, httpx.NetworkError, httpx.RemoteProtocolError, httpx.DecodingError)


def judge(
    outcome: httpx.Response | Exception, *, tls: bool = False, failures: Container[int] = range(500, 600)
) -> Verdict:
    """What the outcome of one attempt means, according to the table above. For timeouts it assumes the worst case.

    ``tls``: the instance is registered as serving TLS. ``failures``: the statuses that count as failures.
    """
    if isinstance(outcome, httpx.Response):
        if why_declined(outcome) is not None:
            return Verdict(Failure.NOT_EXECUTED, Blame.NOBODY)
        if outcome.status_code in failures:
            return Verdict(Failure.SENT, Blame.INSTANCE)
        too_early = outcome.status_code == httpx.codes.TOO_MANY_REQUESTS and retry_after(outcome) is not None
        return Verdict(Failure.TOO_EARLY, Blame.NOBODY) if too_early else _SUCCESS
    if isinstance(outcome, (httpx.ConnectError, httpx.ConnectTimeout)):
        causes = list(_causes(outcome))
        if any(isinstance(cause, ssl.SSLError) for cause in causes):
            proven = any(isinstance(cause, PeerError) for cause in causes)
            unknown = not tls or any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes)
            ours = any(isinstance(cause, (NoCertificateError, RejectedError)) or rejection(cause) for cause in causes)
            unknown = ours or (unknown and not proven)
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


def outcome_name(outcome: httpx.Response | Exception, verdict: Verdict) -> AttemptOutcome:
    """The verdict in a word, for those who count and watch."""
    if verdict.failure is None:
        return "ok"
    if isinstance(outcome, httpx.Response):
        return "shed" if verdict.failure is Failure.NOT_EXECUTED else "status"
    if verdict.failure is Failure.NOT_SENT:
        if verdict.blame is not Blame.INSTANCE:
            return "not_sent"
        return "connect_timeout" if isinstance(outcome, httpx.ConnectTimeout) else "refused"
    if isinstance(outcome, (httpx.ReadTimeout, httpx.WriteTimeout)):
        return "timeout"
    if isinstance(outcome, _BROKEN):
        return "broken"
    return "error" if verdict.blame is Blame.NOBODY else "not_sent"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and all that led to it: an inner transport may have wrapped the system's own several times."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):
            for each in error.exceptions:
                yield from _causes(each)
        error = error.__cause__
