"""What routes ask for. Here, and nowhere else, what the app holds gets its type."""

from typing import Annotated

from fastapi import Depends, Request

from backend.cards import Cards
from backend.clients import ResearchClient
from backend.database import Database
from backend.settings import Settings
from registry.fastapi import DiscoveryClient


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


CardsDependency = Annotated[Cards, Depends(_cards)]
ResearchDependency = Annotated[ResearchClient, Depends(_research)]
