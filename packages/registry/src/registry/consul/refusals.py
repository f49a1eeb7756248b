"""Why Consul did not do what it was asked: what py-consul and httpx raise, in our words."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from consul.exceptions import (
    ACLDisabled,
    ACLPermissionDenied,
    BadRequest,
    ClientError,
    ConsulException,
    NotFound,
)

from registry.consul.rights import NOT_FOUND, advice, needed
from registry.consul.tls import tls_advice
from registry.errors import RegistryError, RegistryUnavailableError
from registry.settings import ConsulSettings

__all__ = [
    "MOST_EMPTY",
    "DeniedError",
    "UnprovenEmptyError",
    "brief",
    "check_origin",
    "check_rights",
    "consul_errors",
    "is_signed",
    "is_unknown",
]

_IMPLICIT = ". The anonymous token is used implicitly"
_EMPTY = re.compile(r"/v1/(?:health/(?:service|connect|(?P<checks>state))/.+|catalog/services)")
"""Lists that Consul empties for whom it does not trust."""


MOST_EMPTY = 9
"""Bytes within which an answer must end to be empty."""


class DeniedError(ACLPermissionDenied):  # type: ignore[misc]  # py-consul has no types
    """The token does not have the right, or none was sent. Says what to add to a policy."""

    def __init__(self, said: str, request: httpx.Request) -> None:
        token = "X-Consul-Token" in request.headers
        advised = advice(said, needed(request.url, request.content), token=token)
        super().__init__(f"{brief(said.partition(_IMPLICIT)[0])}; {advised}")


class UnprovenEmptyError(DeniedError):
    """An empty list for a request without a token, where nothing is allowed by default.

    Without a token, rights come from the anonymous or the agent's default one, and Consul does not say what it hid from
    the former: there may be nobody, or nobody that may be seen.
    """

    def __init__(self, answer: httpx.Response) -> None:
        super().__init__("an empty list, which may be all that may be seen", answer.request)
        self.index: str = answer.headers.get("X-Consul-Index", "0")


def is_unknown(denied: ACLPermissionDenied) -> bool:
    """Whether Consul does not know the token, rather than that it lacks a right."""
    return NOT_FOUND in str(denied)


def brief(text: object) -> str:
    """As much of it as fits into an error."""
    said = " ".join(str(text).split())
    return said if len(said) <= 300 else f"{said[:300]}…"


def is_signed(answer: httpx.Response) -> bool:
    """Whether this is Consul's: it signs whatever it says, but for some failures."""
    return any(name.startswith("x-consul-") for name in answer.headers)


def check_origin(answer: httpx.Response) -> None:
    """Raises: ConsulException, if this is not Consul's."""
    # Without that, a 404 would read as "no such service", wherever it came from.
    if answer.status_code < 500 and not is_signed(answer):
        said = " ".join(answer.text.split())[:200]
        raise ConsulException(f"{answer.status_code} {said!r}, without the headers by which Consul is known")


def check_rights(answer: httpx.Response, body: bytes) -> None:
    """Raises: DeniedError, if this answer tells that the token lacks a right, in whichever way Consul does so.

    ``body``: its first bytes will do, unless it is an error.
    """
    request, default = answer.request, answer.headers.get("X-Consul-Default-ACL-Policy")
    text = body.decode(errors="replace").strip() if answer.is_error else ""
    # What a server told the agent over their own channel may come as a 500.
    told = answer.is_server_error and default is not None and (NOT_FOUND in text or "Permission denied" in text)
    if told or answer.status_code == httpx.codes.FORBIDDEN:
        raise DeniedError(text, request)
    empty = _EMPTY.fullmatch(request.url.path)
    if empty and len(body) < MOST_EMPTY and body.strip() in {b"[]", b"{}"}:
        # A token without rights gets an empty list and 200, just as a service without instances does.
        if answer.headers.get("X-Consul-Results-Filtered-By-ACLs") == "true":
            raise DeniedError("an empty list, as the token may not see what there is", request)
        if default == "deny" and "X-Consul-Token" not in request.headers and not empty["checks"]:
            raise UnprovenEmptyError(answer)


@contextmanager
def consul_errors(settings: ConsulSettings) -> Iterator[None]:
    """Turns what py-consul and httpx raise into RegistryUnavailableError (try again) or RegistryError (refused)."""
    where = f"Consul at {settings.url}"
    try:
        yield
    except DeniedError as error:
        raise RegistryError(f"{where} denied the request: {error}") from error
    except (ACLPermissionDenied, ACLDisabled) as error:
        raise RegistryError(f"{where} denied the request: {brief(error)}; pass a token that has this right") from error
    except (BadRequest, NotFound) as error:
        raise RegistryError(f"{where} refused the request: {brief(error)}") from error
    except (ClientError, ConsulException) as error:
        raise RegistryUnavailableError(f"{where} answered with an error: {brief(error)}") from error
    except (httpx.TransportError, OSError) as error:  # an alert of TLS may come as it is
        what = str(error) or type(error).__name__
        advised = tls_advice(error)
        how = f"can't be asked: {what}; {advised}" if advised else f"can't be reached: {what}; is it running?"
        raise RegistryUnavailableError(f"{where} {how}") from error
    except httpx.DecodingError as error:
        raise RegistryUnavailableError(f"{where} sent a broken answer: {error}") from error
