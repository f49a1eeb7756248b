"""Nodes, agents and servers of Consul are lost, under load: only POSTs under way on what was killed may fail."""

import time

import pytest

from tests.e2e.system import wait_until
from tests.k8s.report import Row
from tests.k8s.system import BACKENDS, SERVERS, System, address_of
from tests.k8s.test_pods import none_failed, only_under_way
from tests.k8s.traffic import traffic

LOST = 3
"""The node that is killed: neither the one of the caller and the database, nor the one that is drained first."""


def kill_node(system: System, scene: Row) -> set[str]:
    """Kills it; returns the addresses of its pods when others have taken the place of its backends."""
    gone = {address_of(pod) for pod in system.cluster.get("pods")["items"] if pod["spec"]["nodeName"] == f"node{LOST}"}
    assert address_of(system.backend_on(LOST)) in gone
    begun = time.monotonic()
    system.cluster.kill(LOST)
    wait_until(lambda: LOST not in system.cluster.ready_nodes(), 120.0, "the node counts as lost")
    lost = time.monotonic() - begun
    wait_until(lambda: len(alive(system.passing(), gone)) == BACKENDS, 150.0, f"{BACKENDS} pass elsewhere")
    scene.seen.append(
        f"NotReady {lost:.0f} s after its end, {BACKENDS} passing elsewhere after {time.monotonic() - begun:.0f} s"
    )
    return gone


def alive(instances: set[str], gone: set[str]) -> set[str]:
    """Those that are not at these addresses."""
    return {instance for instance in instances if not any(f"-{address}-" in instance for address in gone)}


def test_a_node_is_lost(system: System, scene: Row) -> None:
    """A node is lost: its first process is killed."""
    with traffic(system) as load:
        scene.load = load
        gone = kill_node(system, scene)
    only_under_way(load, gone)


def test_a_node_comes_back(system: System, scene: Row) -> None:
    """A node that was lost comes back."""
    gone = kill_node(system, scene)
    scene.seen.clear()
    ghosts: set[str] = set()

    def whole() -> bool:
        passing = system.passing()
        ghosts.update(passing - alive(passing, gone))
        return system.agents_are_ready() and LOST in system.cluster.ready_nodes()

    with traffic(system) as load:
        scene.load = load
        system.cluster.start(LOST)
        scene.seen.append(f"node and agent ready after {wait_until(whole, 90.0, 'the node is ready'):.0f} s")
        scene.seen.append(f"servers of Consul whole {system.wait_for_servers():.0f} s later")
        system.wait_until_everyone_passes(BACKENDS)
        load.go_on_for(50)
    none_failed(load)
    assert ghosts == set(), "instances that ended with the node pass again"


@pytest.mark.parametrize("node", [1, 2])
def test_an_agent_is_lost(system: System, scene: Row, node: int) -> None:
    """An agent of Consul is lost."""
    scene.name += ", that of the caller" if node == 1 else ", that of a backend"
    with traffic(system) as load:
        scene.load = load
        agent = next(pod for pod in system.cluster.pods("consul-agent") if pod["spec"]["nodeName"] == f"node{node}")
        system.cluster.kubectl("delete", "pod", agent["metadata"]["name"], "--force", "--grace-period=0")
        system.cluster.wait_until_rolled_out()
        scene.seen.append(f"everyone passes again {system.wait_until_everyone_passes(BACKENDS):.1f} s after its return")
        load.go_on_for(50)
    none_failed(load)


def test_the_leader_is_lost(system: System, scene: Row) -> None:
    """Consul's leader is lost."""
    with traffic(system) as load:
        scene.load = load
        leader = system.leader()
        name, address = str(leader["metadata"]["name"]), address_of(leader)
        system.cluster.kubectl("delete", "pod", name, "--force", "--grace-period=0")
        again = wait_until(lambda: system.led_again(address), 90.0, "a server leads")
        scene.seen.append(f"led again after {again:.1f} s, whole {system.wait_for_servers():.0f} s later")
        system.wait_until_everyone_passes(BACKENDS)
    none_failed(load)


def test_all_servers_are_lost(system: System, scene: Row) -> None:
    """All servers of Consul are lost at once."""
    with traffic(system) as load:
        scene.load = load
        servers = [str(pod["metadata"]["name"]) for pod in system.cluster.pods("consul-server")]
        assert len(servers) == SERVERS
        system.cluster.kubectl("delete", "pod", *servers, "--force", "--grace-period=0")
        begun = time.monotonic()
        system.wait_for_servers()
        system.wait_until_everyone_passes(BACKENDS)
        scene.seen.append(f"whole, and everyone passes, after {time.monotonic() - begun:.0f} s")
        load.go_on_for(50)
    none_failed(load)
