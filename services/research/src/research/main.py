"""The program of research-api: ``uvicorn research.main:app --port 8001``."""

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError

from registry.fastapi import RegistryMiddleware, health_router, lifespan, refuse_invalid_request
from research import clients, routes
from research.settings import Settings


def create_app(settings: Settings) -> FastAPI:
    """The application; nothing is opened or registered before its lifespan starts."""
    app = FastAPI(title=settings.name, max_body_size=2**21, lifespan=lifespan(settings, upstreams=clients.UPSTREAMS))
    app.state.settings = settings
    app.add_middleware(RegistryMiddleware)
    app.exception_handler(RequestValidationError)(refuse_invalid_request)
    app.include_router(health_router())
    app.include_router(routes.router)
    return app


app = create_app(Settings())
