"""Errors that any route may meet, turned into an answer in one place."""

import httpx
from fastapi import FastAPI, Request, Response

from orchestrator.clients import UpstreamError, read_header
from orchestrator.registry import RegistryError, RegistryUnavailableError, ServiceNotFoundError
from registry.fastapi import problem


def status_and_words(error: UpstreamError) -> tuple[int, str]:
    """What a caller of the front door is told about a failed upstream call, 4xx answers aside.

    ===========================  ======  ==============================================
    what happened                status  because
    ===========================  ======  ==============================================
    no (healthy) instance        503     it may be back soon
    Consul can't be asked        503     same
    no answer in time            504     RFC 9110, 15.6.5
    connection refused, broken   502     RFC 9110, 15.6.3
    upstream says 503, 504       same    it means the same to our caller
    any other 5xx                502     the upstream's bug is not ours
    answer not understood        502     same
    ===========================  ======  ==============================================
    """
    service, cause = error.service, error.cause
    match cause:
        case ServiceNotFoundError():
            return 503, f"{service} has no healthy instance: try again in a moment"
        case RegistryUnavailableError():
            return 503, f"Consul can't be asked where {service} is: try again in a moment"
        case RegistryError():
            return 503, f"{service} can't be looked up: {cause}"
        case httpx.HTTPStatusError():
            status = cause.response.status_code
            return status if status in {503, 504} else 502, f"{service} answered with status {status}"
        case httpx.TimeoutException() | TimeoutError():
            return 504, f"{service} did not answer in time"
        case httpx.TransportError():
            return 502, f"{service} could not be reached ({type(cause).__name__})"
        case _:
            return 502, f"{service} gave an answer that could not be understood"


async def _upstream_failed(_: Request, error: UpstreamError) -> Response:
    headers: dict[str, str] = {}
    if isinstance(error.cause, httpx.HTTPStatusError):
        response = error.cause.response
        kept = {"Retry-After": "Retry-After", "X-Service-Instance": "X-Upstream-Instance"}
        headers = {to: value for name, to in kept.items() if (value := read_header(response, name))}
        if response.is_client_error:  # the caller's to mend, so the caller gets it as it is
            return Response(response.content, response.status_code, headers, read_header(response, "Content-Type"))
    status, words = status_and_words(error)
    if status == 503:
        headers.setdefault("Retry-After", "1")
    return problem(status, words, headers, service=error.service)


async def _registry_failed(_: Request, error: RegistryError) -> Response:
    words = "Consul can't be asked" if isinstance(error, RegistryUnavailableError) else f"Consul refused: {error}"
    return problem(503, words, {"Retry-After": "1"})


def add_error_handlers(app: FastAPI) -> None:
    """Answer what fails behind the front door as ``status_and_words`` says."""
    app.exception_handler(UpstreamError)(_upstream_failed)
    app.exception_handler(RegistryError)(_registry_failed)
