"""How the upstreams are, in words: what Consul's checks say, and what a call by name meets right now."""

import asyncio
from dataclasses import dataclass
from functools import partial

import anyio.to_thread
import httpx

from orchestrator.clients import UPSTREAMS, UpstreamError, read_header
from orchestrator.errors import status_and_words
from orchestrator.registry import RegistryError, ServiceDiscoveryClient, ServiceRegistry
from orchestrator.schemas import HealthReport, Status, UpstreamHealth
from orchestrator.topology import complaint, read_complaints, read_standing, says_degraded

CONSUL = "consul"


async def report_health(client: ServiceDiscoveryClient, registry: ServiceRegistry, timeout: float) -> HealthReport:
    """Ask every upstream, side by side; each takes at most about ``timeout`` seconds. Raises nothing."""
    services = await asyncio.gather(*(report_service(client, registry, service, timeout) for service in UPSTREAMS))
    statuses = {upstream.status for upstream in services}
    worst: Status = "unhealthy" if "unhealthy" in statuses else "degraded" if "degraded" in statuses else "healthy"
    troubled = [upstream.words for upstream in services if upstream.status != "healthy"]
    return HealthReport(status=worst, words="; ".join(troubled) or "Everything works", services=services)


async def report_service(
    client: ServiceDiscoveryClient, registry: ServiceRegistry, service: str, timeout: float
) -> UpstreamHealth:
    """Ask one service by name; takes at most about ``timeout`` seconds. Raises nothing."""
    met, (failing, checks) = await asyncio.gather(
        _ask_consul(registry) if service == CONSUL else _call(client, service, timeout),
        anyio.to_thread.run_sync(partial(_checks, registry, service)),
    )
    status: Status = "degraded" if failing and met.status == "healthy" else met.status
    return UpstreamHealth(service=service, status=status, words=f"{met.words}; {checks}", instance=met.instance)


@dataclass(frozen=True)
class _Met:
    """What a question met."""

    status: Status
    words: str
    instance: str | None = None


async def _ask_consul(registry: ServiceRegistry) -> _Met:
    """Consul registers itself under the port on which its servers talk to each other: no HTTP is spoken there."""
    if await anyio.to_thread.run_sync(registry.is_healthy):
        return _Met("healthy", f"{CONSUL} works")
    return _Met("unhealthy", f"{CONSUL} can't be asked, or has no leader")


async def _call(client: ServiceDiscoveryClient, service: str, timeout: float) -> _Met:
    try:
        async with asyncio.timeout(timeout):
            answer = await client.get(service, "/health", timeout=timeout / 2)
    except (RegistryError, httpx.HTTPError, TimeoutError) as error:
        _, words = status_and_words(UpstreamError(service, error))
        if isinstance(error, httpx.HTTPStatusError):
            words += f": {complaint(error.response.text)}"
            return _Met("unhealthy", words, read_header(error.response, "X-Service-Instance"))
        return _Met("unhealthy", words)
    instance = read_header(answer, "X-Service-Instance")
    if says_degraded(answer.text):
        return _Met("degraded", f"{service} works in part: {complaint(answer.text)}", instance)
    return _Met("healthy", f"{service} works", instance)


def _checks(registry: ServiceRegistry, service: str) -> tuple[bool, str]:
    """Whether an instance fails its checks, and the count in words. Blocks."""
    try:
        standing = read_standing(registry, service)
        complaints = read_complaints(registry, standing)
    except RegistryError as error:
        return False, f"its checks are unknown ({error})"
    if not standing.instances:
        return False, "none is registered"
    count = f"instances that pass their checks: {len(standing.passing)} of {len(standing.instances)}"
    return bool(complaints), "; ".join([count, *(f"{name}: {why}" for name, why in complaints.items())])
