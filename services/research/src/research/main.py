"""The program of research-api: ``uvicorn research.main:app --port 8001``."""

from fastapi import FastAPI

from registry.fastapi import RegistryMiddleware, add_problem_handlers, health_router, lifespan, state_router
from registry.logs import setup_logging
from registry.metrics import metrics_router
from registry.tracing import server_telemetry, set_up_tracing
from research import clients, routes
from research.settings import Settings


def create_app(settings: Settings) -> FastAPI:
    """The application; nothing is opened or registered before its lifespan starts."""
    setup_logging(settings)
    app = FastAPI(
        title=settings.name,
        max_body_size=2**21,
        telemetry=server_telemetry(settings),
        lifespan=lifespan(settings, upstreams=clients.UPSTREAMS, observer=set_up_tracing(settings)),
    )
    app.state.settings = settings
    app.add_middleware(RegistryMiddleware)
    add_problem_handlers(app)
    app.include_router(health_router())
    app.include_router(metrics_router())
    app.include_router(state_router())
    app.include_router(routes.router)
    return app


app = create_app(Settings())
