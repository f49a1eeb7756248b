"""What routes ask for. Here, and nowhere else, what the app holds gets its type."""

from typing import Annotated

from fastapi import Depends, Request

from orchestrator.clients import BackendClient, ResearchClient
from orchestrator.registry import ServiceRegistry
from orchestrator.settings import Settings
from registry.fastapi import DiscoveryClient


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def _registry(request: Request) -> ServiceRegistry:
    registry: ServiceRegistry = request.app.state.service_registry
    return registry


SettingsDependency = Annotated[Settings, Depends(_settings)]
RegistryDependency = Annotated[ServiceRegistry, Depends(_registry)]


async def _backend(client: DiscoveryClient, settings: SettingsDependency) -> BackendClient:
    return BackendClient(client, settings.upstream_timeout)


async def _research(client: DiscoveryClient, settings: SettingsDependency) -> ResearchClient:
    return ResearchClient(client, settings.upstream_timeout)


BackendDependency = Annotated[BackendClient, Depends(_backend)]
ResearchDependency = Annotated[ResearchClient, Depends(_research)]
