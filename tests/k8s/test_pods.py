"""Pods end and begin as Kubernetes does it every day, under load: no call by name fails."""

import pytest

from tests.k8s.report import Row
from tests.k8s.system import BACKEND, BACKENDS, System, address_of, drain
from tests.k8s.traffic import Traffic, traffic


def none_failed(load: Traffic) -> None:
    """No call failed, nothing was done twice, and nothing that was answered is lost."""
    for method in ("GET", "POST"):
        assert load.failures(method) == (), method
    assert (load.doubled, load.lost) == ((), ())


@pytest.mark.parametrize("force", [False, True], ids=["politely", "by force"])
def test_delete_pod(system: System, scene: Row, force: bool) -> None:
    """kubectl delete pod."""
    options = ["--force", "--grace-period=0"] if force else []
    scene.name += " --force" if force else ""
    with traffic(system) as load:
        scene.load = load
        pod = system.backend_on(2)
        system.cluster.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false", *options)
        scene.seen.append(f"another one in its place after {system.wait_until_everyone_passes(BACKENDS):.1f} s")
    if force:  # killed at once: what was under way there can be lost
        only_under_way(load, {address_of(pod)})
    else:
        none_failed(load)


def test_scale(system: System, scene: Row) -> None:
    """kubectl scale 1 → 5 → 1."""
    deployment = f"deployment/{BACKEND.name}"
    system.cluster.kubectl("scale", deployment, "--replicas=1")
    system.wait_until_everyone_passes(1)
    with traffic(system) as load:
        scene.load = load
        for replicas in (5, 1):
            system.cluster.kubectl("scale", deployment, f"--replicas={replicas}")
            scene.seen.append(f"{replicas} passing after {system.wait_until_everyone_passes(replicas):.1f} s")
            load.go_on_for(50)
    none_failed(load)


def test_rollout_restart(system: System, scene: Row) -> None:
    """kubectl rollout restart, twice."""
    with traffic(system) as load:
        scene.load = load
        for _ in range(2):
            before = system.instances()
            system.roll()
            caught_up = system.wait_until_everyone_passes(BACKENDS)
            assert not before & system.instances()
            scene.seen.append(f"rolled, Consul has the new ones {caught_up:.1f} s later")
            load.go_on_for(30)
    none_failed(load)


@pytest.mark.parametrize("node", [2, 3])
def test_drain(system: System, scene: Row, node: int) -> None:
    """kubectl drain of a node, and uncordon."""
    scene.name = f"kubectl drain node{node}, and uncordon"
    with traffic(system) as load:
        scene.load = load
        assert system.backend_on(node)
        drain(system, node)
        scene.seen.append(f"{BACKENDS} passing elsewhere {system.wait_until_everyone_passes(BACKENDS):.1f} s after it")
        load.go_on_for(30)
        system.cluster.kubectl("uncordon", f"node{node}")
        scene.seen.append(f"servers of Consul whole {system.wait_for_servers():.1f} s after uncordon")
    none_failed(load)


def only_under_way(load: Traffic, killed: set[str]) -> None:
    """No GET failed; POSTs only on these addresses; nothing was done twice, and nothing that was answered is lost."""
    assert load.failures("GET") == ()
    elsewhere = [post for post in load.failures("POST") if not any(address in post.message for address in killed)]
    assert elsewhere == []
    assert (load.doubled, load.lost) == ((), ())
