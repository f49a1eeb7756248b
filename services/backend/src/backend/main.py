"""backend-api: cards in a real database. Run it: ``uvicorn backend.main:app --port 8002``."""

from fastapi import FastAPI

from backend.database import Database
from backend.errors import add_error_handlers
from backend.routes import router
from backend.settings import Settings
from registry.fastapi import RegistryMiddleware, health_router, lifespan


def create_app(settings: Settings) -> FastAPI:
    """The application; nothing is opened or registered before its lifespan starts."""
    database = Database(settings.database_url, settings.database_timeout)
    app = FastAPI(
        title="backend-api",
        summary="Cards in a real database",
        lifespan=lifespan(settings, upstreams=["research-api"], inner=database.lifespan),
    )
    app.state.settings, app.state.database = settings, database
    app.add_middleware(RegistryMiddleware)
    add_error_handlers(app)
    app.include_router(health_router(database=database.ping))
    app.include_router(router)
    return app


app = create_app(Settings())
