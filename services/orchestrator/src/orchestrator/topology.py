"""Who is registered, and how the upstreams are, read from Consul. Blocking: run it in a thread."""

import json
from dataclasses import dataclass

from orchestrator.registry import Instance, ServiceRegistry
from orchestrator.schemas import Topology, TopologyInstance, TopologyService


@dataclass(frozen=True)
class Standing:
    """A service's instances: all by id, and which of them pass their checks."""

    instances: dict[str, Instance]
    passing: frozenset[str]


def read_standing(registry: ServiceRegistry, service: str) -> Standing:
    """One service's instances. Raises: RegistryError."""
    known = {instance.id: instance for instance in registry.discover_service(service, passing=False)}
    passing = {instance.id: instance for instance in registry.discover_service(service)}
    # Two questions, so an instance may have come or gone between them.
    return Standing(instances=known | passing, passing=frozenset(passing))


def read_topology(registry: ServiceRegistry) -> Topology:
    """Every service and its instances. Raises: RegistryError."""
    return Topology(services=[_service(registry, name) for name in sorted(registry.discover_all_services())])


def _service(registry: ServiceRegistry, name: str) -> TopologyService:
    standing = read_standing(registry, name)
    instances = [
        TopologyInstance(
            id=instance.id,
            address=instance.address,
            port=instance.port,
            tags=list(instance.tags),
            healthy=instance.id in standing.passing,
        )
        for _, instance in sorted(standing.instances.items())
    ]
    return TopologyService(service=name, healthy_instances=len(standing.passing), instances=instances)


def read_complaints(registry: ServiceRegistry, standing: Standing) -> dict[str, str]:
    """Why each failing instance fails, by id, as far as our Consul agent knows. Raises: RegistryError."""
    complaints: dict[str, str] = {}
    for instance_id in sorted(standing.instances.keys() - standing.passing):
        health = registry.get_service_health(instance_id)
        outputs = health.outputs.items() if health else ()
        failing = [output for check, output in outputs if health and health.checks[check] != "passing"]
        complaints[instance_id] = "; ".join(map(complaint, failing)) or "no reason known here"
    return complaints


def complaint(output: str) -> str:
    """The sick components in what a check saw or ``/health`` answered, else its first 200 characters."""
    try:
        components = json.loads(output[output.index("{") :])["components"]
        sick = [
            f"{name} is {state['status']} ({state.get('error', 'no reason given')})"
            for name, state in components.items()
            if state["status"] != "healthy"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sick = []
    words = ", ".join(sick) or output.strip()[:200] or "no reason given"
    return words.encode(errors="replace").decode()  # JSON can name half of a surrogate pair, which no answer can hold


def says_degraded(answer: str) -> bool:
    """Whether this answer of ``/health`` says that a component works in part only. Any other service's is no."""
    try:
        return bool(json.loads(answer)["status"] == "degraded")
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
