"""What an app tells of itself, and what its requests find."""

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import FastAPI, routing
from starlette.types import Receive, Scope, Send

from registry.presence.health import ROOT
from registry.state import STATE_PATH

__all__ = ["about", "known"]


def about(app: FastAPI) -> dict[str, str]:
    """What Consul's users want to know of an instance, as metadata."""
    # Newer releases of FastAPI keep the routes of an included router in one of their own.
    each_route = getattr(routing, "iter_route_contexts", iter)
    paths = [path for route in each_route(app.routes) if isinstance(path := getattr(route, "path", None), str)]
    told = {"metrics_path": "/metrics", "state_path": STATE_PATH}
    found = {name: next((path for path in paths if path.endswith(end)), "") for name, end in told.items()}
    return {"version": app.version} | {name: path for name, path in found.items() if path}


@contextmanager
def known(app: FastAPI, **parts: object) -> Iterator[None]:
    """Within it, requests find these: at the app, and by it from the apps that are mounted in it."""
    stack = app.middleware_stack or app.build_middleware_stack()

    async def with_root(scope: Scope, receive: Receive, send: Send) -> None:
        scope[ROOT] = app
        await stack(scope, receive, send)

    for name, part in parts.items():
        setattr(app.state, name, part)
    app.middleware_stack, whole = with_root, app.middleware_stack
    try:
        yield
    finally:
        app.middleware_stack = whole
        for name in parts:
            delattr(app.state, name)
