"""Real instances of a service for tests: processes that hang, die, slow down or answer 5xx on command, and count.

``with running_instances("backend-api", 3, consul=agent) as (one, two, three): two.kill()``
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypedDict, Unpack

from registry.model import Instance
from registry.testing.agent import ConsulAgent
from registry.testing.instance import Mode, RunningInstance
from registry.testing.ports import free_ports
from registry.testing.stats import Stats, read_journals

__all__ = ["Mode", "Options", "RunningInstance", "Stats", "received", "running_instance", "running_instances"]


class Options(TypedDict, total=False):
    """Options of the instances."""

    consul: ConsulAgent | None
    """The agent with which they are registered, as passing, until the end."""
    registers_itself: bool
    """Whether they register themselves, with `registry.fastapi`: start takes a second more; SIGTERM drains."""
    connect: bool
    """Whether they speak Consul Connect: they serve mutual TLS, by a certificate of the agent, and nothing else."""
    check_interval: float | None
    """Seconds between Consul's checks, 10 by default; None: no checks, so they stay passing."""
    drain_seconds: float
    """Drain time in seconds of instances that register themselves, 0.5 by default."""
    tags: Sequence[str]
    meta: Mapping[str, str]
    weight: int
    running: bool
    """False: neither started nor registered; the test calls `start` (and `register`) itself."""


@contextmanager
def running_instances(service: str, count: int = 1, **options: Unpack[Options]) -> Iterator[list[RunningInstance]]:
    """Starts ``count`` instances concurrently, in about half a second; ends them when the context ends.

    They also end with this process. Raises: RuntimeError, with the end of the log, if one does not start.
    """
    consul, registers_itself = options.get("consul"), options.get("registers_itself", False)
    connect = options.get("connect", False)
    if (registers_itself or connect) and consul is None:
        raise ValueError("an instance that registers itself, or is of the mesh, needs a Consul agent: pass consul=")
    check_interval, running = options.get("check_interval", 10.0), options.get("running", True)
    tags, meta, weight = tuple(options.get("tags", ())), dict(options.get("meta", {})), options.get("weight", 1)
    with ExitStack() as stack:
        started = []
        for port in free_ports(count):
            instance = Instance(
                f"{service}-127.0.0.1-{port}", service, "127.0.0.1", port, tags, meta, weight, connect=connect
            )
            env = {
                "SERVICE_NAME": service,
                "SERVICE_ADDRESS": "127.0.0.1",
                "SERVICE_PORT": str(port),
                "SERVICE_TAGS": ",".join(tags),
                "SERVICE_META": json.dumps(meta),
                "SERVICE_WEIGHT": str(weight),
                "SERVICE_DRAIN_SECONDS": str(options.get("drain_seconds", 0.5)),
                "SERVICE_HEALTH_CHECK_INTERVAL": str(check_interval or 3600.0),
                **({"CONSUL_CONNECT": "true", "CONSUL_CONNECT_ALLOW_UNSAFE_AGENT": "true"} if connect else {}),
                **(consul.env() if consul else {}),
            }
            started.append(RunningInstance(instance, consul, registers_itself, env))
            stack.callback(started[-1].close)
            if running:
                started[-1].start(wait=False)
        for each in started if running else ():
            each.wait_until_ready()
            if consul is not None and not registers_itself:
                each.register(check_interval=check_interval)
        yield started


@contextmanager
def running_instance(service: str, **options: Unpack[Options]) -> Iterator[RunningInstance]:
    """Like `running_instances`, with one instance."""
    with running_instances(service, **options) as (instance,):
        yield instance


def received(instances: Iterable[RunningInstance]) -> Stats:
    """What these instances have received, added up."""
    return read_journals(instance.journal for instance in instances)
