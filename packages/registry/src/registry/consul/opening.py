"""The httpx clients that lead to Consul."""

from typing import Any

import httpx

from registry.consul.tls import Trust
from registry.settings import ConsulSettings

__all__ = ["async_client", "base_url", "server_name", "sync_client"]


def sync_client(settings: ConsulSettings) -> httpx.Client:
    """Blocks, and is thread-safe."""
    trust = _trust(settings)

    def refresh(_: httpx.Request) -> None:
        if trust:
            trust.refresh()

    transport = httpx.HTTPTransport(**_transport(settings, trust))
    return httpx.Client(transport=transport, event_hooks={"request": [refresh]}, **_options(settings))


def async_client(settings: ConsulSettings) -> httpx.AsyncClient:
    """Belongs to one event loop."""
    trust = _trust(settings)

    async def refresh(_: httpx.Request) -> None:
        if trust:
            trust.refresh()

    # A parked watch holds its connection: a pool limit would starve every call behind it.
    transport = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=None), **_transport(settings, trust))
    return httpx.AsyncClient(transport=transport, event_hooks={"request": [refresh]}, **_options(settings))


def base_url(settings: ConsulSettings) -> str:
    """What the paths of its API are appended to."""
    return settings.url if settings.socket is None else f"{settings.scheme}://localhost"


def server_name(settings: ConsulSettings) -> dict[str, Any]:
    """The extensions of a request that name whom its certificate must be for."""
    return {"sni_hostname": settings.tls_server_name} if settings.tls_server_name else {}


def _options(settings: ConsulSettings) -> dict[str, Any]:
    auth = settings.auth.get_secret_value().partition(":") if settings.auth else None
    return {
        "auth": (auth[0], auth[2]) if auth else None,
        "timeout": settings.timeout,
        "trust_env": False,  # a proxy for the outside world is none for the agent beside us
    }


def _trust(settings: ConsulSettings) -> Trust | None:
    return Trust(settings) if settings.scheme == "https" else None


def _transport(settings: ConsulSettings, trust: Trust | None) -> dict[str, Any]:
    return {
        "verify": trust.context if trust else False,
        "uds": None if settings.socket is None else str(settings.socket),
    }
