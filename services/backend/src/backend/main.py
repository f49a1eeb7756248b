"""The program of backend-api: ``uvicorn backend.main:app --port 8002``."""

from fastapi import FastAPI

from backend import clients, routes
from backend.database import Database
from backend.errors import add_error_handlers
from backend.lifespan import keep
from backend.password import read_password
from backend.settings import Settings
from registry.fastapi import RegistryMiddleware, add_problem_handlers, health_router, lifespan, state_router
from registry.logs import setup_logging
from registry.metrics import metrics_router
from registry.tracing import server_telemetry, set_up_tracing


def create_app(settings: Settings) -> FastAPI:
    """The application; nothing is opened or registered before its lifespan starts."""
    setup_logging(settings)
    database = Database(settings.database_url, settings.database_timeout, password=read_password(settings))
    app = FastAPI(
        title=settings.name,
        max_body_size=2**21,  # the longest card, every character escaped, takes 1.2 MB
        telemetry=server_telemetry(settings),
        lifespan=lifespan(
            settings,
            upstreams=clients.UPSTREAMS,
            observer=set_up_tracing(settings),
            inner=keep(database, settings.key_age),
        ),
    )
    app.state.settings = settings
    app.state.database = database
    app.add_middleware(RegistryMiddleware)
    add_problem_handlers(app)
    add_error_handlers(app)
    app.include_router(health_router(database=database.ping))
    app.include_router(metrics_router())
    app.include_router(state_router())
    app.include_router(routes.router)
    return app


app = create_app(Settings())
