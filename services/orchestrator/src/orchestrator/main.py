"""The program of orchestrator-api: ``uvicorn orchestrator.main:app --port 8003``."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from orchestrator import auth, clients, routes
from orchestrator.errors import add_error_handlers
from orchestrator.page import routes as page
from orchestrator.page.hub import Hub
from orchestrator.registry import ConsulSettings, ServiceRegistry
from orchestrator.settings import Settings
from registry.fastapi import RegistryMiddleware, add_problem_handlers, health_router, lifespan, state_router
from registry.logs import setup_logging
from registry.metrics import metrics_router
from registry.tracing import server_telemetry, set_up_tracing


@asynccontextmanager
async def open_registry(app: FastAPI) -> AsyncIterator[None]:
    """``app.state.service_registry`` and ``app.state.hub`` are set inside."""
    consul = ConsulSettings()
    with ServiceRegistry(settings=consul) as app.state.service_registry:
        app.state.hub = Hub(consul, leaving=lambda: app.state.registrar.leaving, peers=lambda: app.state.mesh.identity)
        try:
            yield
        finally:
            await app.state.hub.aclose()


def create_app(settings: Settings) -> FastAPI:
    """The application; nothing is opened or registered before its lifespan starts."""
    setup_logging(settings)
    app = FastAPI(
        title=settings.name,
        max_body_size=2**21,  # the longest card, every character escaped, takes 1.2 MB
        telemetry=server_telemetry(settings),
        lifespan=lifespan(
            settings, upstreams=clients.UPSTREAMS, observer=set_up_tracing(settings), inner=open_registry
        ),
    )
    app.state.settings = settings
    app.add_middleware(RegistryMiddleware, trust_caller=False)
    auth.lock(app)
    add_problem_handlers(app)
    add_error_handlers(app)
    app.include_router(health_router())
    app.include_router(metrics_router())
    app.include_router(state_router())
    app.include_router(routes.router)
    app.include_router(page.router)
    return app


app = create_app(Settings())
