"""What mutual TLS costs, in µs of CPU per call on a kept connection: a real service, served plainly and by the mesh."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from fastapi import FastAPI

from registry import ConnectionOptions, ConsulResolver, ConsulSettings, ServiceDiscoveryClient, ServiceSettings
from registry.fastapi import RegistryMiddleware, health_router, lifespan
from registry.mesh.agent import AgentSource
from registry.mesh.identity import MeshIdentity
from registry.testing.agent import ConsulAgent
from tests.support.command import ServiceProcess, running_service, wait_until

__all__ = ["PROMISED_RATIO", "MeshCost", "app", "mesh_costs"]

PROMISED_RATIO = 1.4
CALLERS = (1, 8)
SERVED = {"plain": "false", "mutual TLS": "true"}
"""How → what CONSUL_CONNECT says there."""
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class MeshCost:
    """What so many callers at a time have seen."""

    callers: int
    caller: dict[str, float]
    """How it is served → µs of CPU per call, of the client's process; the median of all rounds."""
    service: dict[str, float]
    """Likewise, of the service's process."""
    ratio: float
    """Both sides' CPU over mutual TLS by the same served plainly, in each round, and the median of that."""


def app() -> FastAPI:
    """What both processes serve."""
    made = FastAPI(lifespan=lifespan(ServiceSettings()))
    made.add_middleware(RegistryMiddleware)
    made.include_router(health_router())

    @made.get("/api/cards/1")
    async def card() -> dict[str, str]:
        return {"status": "ok"}

    return made


def mesh_costs(agent: ConsulAgent, rounds: int, calls: int) -> list[MeshCost]:
    """For one caller and for several: so many rounds of so many calls each way, which take turns."""
    return asyncio.run(_measure(agent, rounds, calls))


async def _measure(agent: ConsulAgent, rounds: int, calls: int) -> list[MeshCost]:
    consul = ConsulSettings(host="127.0.0.1", port=agent.http_port)
    async with AsyncExitStack() as stack:
        source = AgentSource(consul, allow_unsafe_agent=True)
        me = await stack.enter_async_context(MeshIdentity("bench-caller", source))
        ways: dict[str, tuple[ServiceProcess, ServiceDiscoveryClient]] = {}
        for number, (way, connect) in enumerate(SERVED.items()):
            env = {"CONSUL_CONNECT": connect, "CONSUL_CONNECT_ALLOW_UNSAFE_AGENT": "true"}
            name = f"bench-mesh-{number}"
            service = running_service(
                "benchmarks.mesh:app", name, "--factory", "--no-access-log", consul=agent, cwd=ROOT, wait=False, env=env
            )
            process = stack.enter_context(service)
            await asyncio.to_thread(wait_until, process.is_found, 60)
            resolver, connections = ConsulResolver(consul, mesh="client"), ConnectionOptions(peers=me, keepalive=60.0)
            client = await stack.enter_async_context(ServiceDiscoveryClient(resolver, connections=connections))
            ways[way] = process, client
            await _turn(*ways[way], max(CALLERS), calls)  # the handshakes, and all that happens once
        return [
            _cost(
                callers,
                [{way: await _turn(*each, callers, calls) for way, each in ways.items()} for _ in range(rounds)],
            )
            for callers in CALLERS
        ]


def _cost(callers: int, taken: Sequence[Mapping[str, tuple[float, float]]]) -> MeshCost:
    return MeshCost(
        callers,
        caller={way: median(each[way][0] for each in taken) for way in SERVED},
        service={way: median(each[way][1] for each in taken) for way in SERVED},
        ratio=median(sum(each["mutual TLS"]) / sum(each["plain"]) for each in taken),
    )


async def _turn(
    process: ServiceProcess, client: ServiceDiscoveryClient, callers: int, calls: int
) -> tuple[float, float]:
    """µs of CPU per call, here and there."""
    left = iter(range(calls))

    async def caller() -> None:
        for _ in left:
            await client.get(process.name, "/api/cards/1")

    here, there = _cpu(os.getpid()), _cpu(process.process.pid)
    await asyncio.gather(*(caller() for _ in range(callers)))
    return (_cpu(os.getpid()) - here) / calls, (_cpu(process.process.pid) - there) / calls


def _cpu(pid: int) -> float:
    """µs that all threads of a process have run. Source: https://docs.kernel.org/scheduler/sched-stats.html"""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e3
