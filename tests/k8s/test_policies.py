"""The NetworkPolicies, enforced: who is no service is let in by the front door only."""

from deploy.keeper.grants import FRONT_DOOR
from tests.e2e.system import wait_until
from tests.k8s.report import Row
from tests.k8s.system import System, address_of
from tools.services import SERVICES

COMPONENT = "app.kubernetes.io/component"
"""The label that makes a pod a service, for policies."""
_SECONDS = 30.0
"""Within which what a label allows is known on every node."""


def doors(system: System) -> dict[str, tuple[str, int]]:
    """Everything that listens, each by one pod of it."""
    [database, *_], [server, *_], [agent, *_] = map(system.cluster.pods, ("postgres", "consul-server", "consul-agent"))
    found = {service.name: (address_of(system.cluster.pods(service.name)[0]), service.port) for service in SERVICES}
    return found | {
        "postgres": (address_of(database), 5432),
        "consul-server": (address_of(server), 8300),
        "consul-agent": (agent["status"]["hostIP"], 8500),
    }


def test_strangers_are_not_let_in(system: System, scene: Row) -> None:
    """A pod that is no service knocks at every door, and one that is."""
    known = doors(system)
    open_to_services = {service.name for service in SERVICES} | {"consul-agent"}

    def let_in() -> set[str]:
        return {name for name, (address, port) in known.items() if system.connects(address, port)}

    def wait_until_let_in(expected: set[str]) -> None:
        wait_until(lambda: let_in() == expected, _SECONDS, f"let in by {expected}", lambda: f"by {let_in()}")

    wait_until_let_in(open_to_services)
    try:
        system.label_client(f"{COMPONENT}-")
        wait_until_let_in({FRONT_DOOR})
    finally:
        system.label_client(f"{COMPONENT}=service")
    wait_until_let_in(open_to_services)
    scene.seen.append(f"a service gets to services and the agents of Consul, a stranger to {FRONT_DOOR} only")
