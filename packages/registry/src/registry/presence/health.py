"""``/health``: whether this instance works. Check its own parts only; otherwise one failure cascades."""

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.types import Scope

from registry.presence.registrar import Registrar
from registry.problems import problem, problem_responses

__all__ = ["ROOT", "Check", "DegradedError", "find_state", "health_router"]

logger = logging.getLogger("registry")

ROOT = "registry.app"
"""The key under which a scope names the app that has the lifespan; "app" is the one mounted in it that answers."""

Check = Callable[[], Awaitable[object]]
"""An async function that returns if its component works, and raises if it does not."""


class DegradedError(Exception):
    """Raised by a check whose component partly works: ``/health`` reports it, and the instance stays in service.

    Callers of ``/health`` see the message.
    """


def health_router(timeout: float = 1.0, **checks: Check) -> APIRouter:
    """A router with ``GET /health``: 200 when every named check returns within ``timeout`` seconds, else 503. A check
    that raises DegradedError is told as ``degraded``, with 200.

    The body is the same: ``{"status": "healthy", "components": {"database": {"status": "healthy"}}}``; with no checks
    ``{"status": "healthy"}``. Checks run side by side. Asked for ``?instance=<id>`` of another instance, or of its own
    once that was withdrawn, it answers 404, so that nobody keeps a ghost registered. Consul reads the status code only.
    An instance that was told to stop answers 503, ``{"status": "leaving"}``, while it serves on, so that a load
    balancer with checks of its own takes it out meanwhile.

    Raises: TypeError, when a check is not an async function.
    """
    for name, check in checks.items():
        if not inspect.iscoroutinefunction(check):
            raise TypeError(f"the health check {name!r} must be an async function; wrap blocking code in a thread")
    router = APIRouter()

    @router.get(
        "/health",
        tags=["health"],
        summary="Whether this instance can work",
        responses={
            503: {"description": "A component is sick, the body says which; or the instance was told to stop"},
            **problem_responses({404: "Not me"}),
        },
    )
    async def health(request: Request, instance: str | None = None) -> JSONResponse:
        registrar: Registrar | None = find_state(request.scope, "registrar")
        if instance is not None and registrar is not None and not registrar.serves(instance):
            own = f"this is {registrar.instance_id}{', and it is leaving' if registrar.withdrawn else ''}"
            return problem(404, own)
        if registrar is not None and registrar.withdrawn:
            return JSONResponse({"status": "leaving"}, status_code=503)
        states = await asyncio.gather(*(_state(name, check, timeout) for name, check in checks.items()))
        components = dict(zip(checks, states, strict=True))
        statuses = {state["status"] for state in states}
        worst = next((status for status in ("unhealthy", "degraded") if status in statuses), "healthy")
        body = {"status": worst} | ({"components": components} if components else {})
        return JSONResponse(body, status_code=503 if worst == "unhealthy" else 200)

    return router


def find_state(scope: Scope, name: str) -> Any:
    """What the lifespan has put into its app's state; None: it does not run."""
    app = scope.get(ROOT) or scope.get("app")
    return getattr(app.state, name, None) if app is not None else None


async def _state(name: str, check: Check, timeout: float) -> dict[str, Any]:
    try:
        async with asyncio.timeout(timeout) as limit:
            await check()
    except DegradedError as error:
        return {"status": "degraded", "error": str(error)}
    except Exception as error:
        if limit.expired():
            logger.warning("health check failed: %s: no answer within %g s", name, timeout, extra={"component": name})
            return {"status": "unhealthy", "error": f"no answer within {timeout:g} s"}
        # The message may hold a connection string with its password: that goes to the log's reader only.
        logger.warning("health check failed: %s: %r", name, error, extra={"component": name})
        return {"status": "unhealthy", "error": type(error).__name__}
    return {"status": "healthy"}
