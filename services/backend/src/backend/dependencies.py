"""What routes ask for. Here, and nowhere else, what the app holds gets its type."""

from typing import Annotated

from fastapi import Depends, Header, Request

from backend.cards import Cards
from backend.clients import ResearchClient
from backend.database import Database
from backend.settings import Settings
from registry.fastapi import Caller, DiscoveryClient

_FRONT_DOOR = "orchestrator-api"
"""The only service that speaks for others, where services prove who they are."""


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


async def _cards(database: Annotated[Database, Depends(_database)]) -> Cards:
    return Cards(database)


async def _research(client: DiscoveryClient, settings: Annotated[Settings, Depends(_settings)]) -> ResearchClient:
    return ResearchClient(client, settings.enrich_timeout)


async def _owner(
    service: Caller,
    subject: Annotated[
        str | None,
        Header(alias="X-Subject", min_length=1, max_length=1_000, pattern=r"^[\x21-\x7e]+$", include_in_schema=False),
    ] = None,
) -> str | None:
    if subject and service in {None, _FRONT_DOOR}:
        return f"subject {subject}"
    return f"service {service}" if service else None


CardsDependency = Annotated[Cards, Depends(_cards)]
ResearchDependency = Annotated[ResearchClient, Depends(_research)]
OwnerDependency = Annotated[str | None, Depends(_owner)]
"""On whose behalf: of whom orchestrator-api has authenticated, else of the service that calls; None: nobody knows."""
