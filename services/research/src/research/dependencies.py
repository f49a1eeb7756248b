"""What routes ask for. Here, and nowhere else, what the app holds gets its type."""

from typing import Annotated

from fastapi import Depends, Request

from registry.fastapi import DiscoveryClient
from research.clients import BackendClient
from research.settings import Settings


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


SettingsDependency = Annotated[Settings, Depends(_settings)]


async def _backend(client: DiscoveryClient, settings: SettingsDependency) -> BackendClient:
    # Half the time for one attempt leaves room for a second instance.
    return BackendClient(client, settings.search_timeout / 2)


BackendDependency = Annotated[BackendClient, Depends(_backend)]
