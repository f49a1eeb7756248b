"""research-api: suggestions for a text from related cards. Run it: ``uvicorn research.main:app --port 8001``."""

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError

from registry.fastapi import RegistryMiddleware, health_router, lifespan, refuse_invalid_request
from research.routes import router
from research.settings import Settings


def create_app(settings: Settings) -> FastAPI:
    """The application; nothing is opened or registered before its lifespan starts."""
    app = FastAPI(
        title="research-api",
        summary="Suggestions for a text from related cards",
        lifespan=lifespan(settings, upstreams=["backend-api"]),
    )
    app.state.settings = settings
    app.add_middleware(RegistryMiddleware)
    app.exception_handler(RequestValidationError)(refuse_invalid_request)
    app.include_router(health_router())
    app.include_router(router)
    return app


app = create_app(Settings())
