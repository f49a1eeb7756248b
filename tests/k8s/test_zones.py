"""Zones are the labels of nodes, and a caller keeps to its own while somebody is there."""

import time

from tests.k8s.report import Row
from tests.k8s.system import BACKENDS, System, instance_of
from tests.k8s.test_pods import none_failed
from tests.k8s.traffic import Traffic, traffic
from tools.kube.place import NODES, zone
from tools.services import SERVICES

HERE = 1
"""The node of the caller."""
KEPT = 0.6
"""At least so much stays; without zones, a third would. All but 2 % stay, unless answers here are slower than there."""
CALLS = 100
"""Of each kind, from which a share is taken."""


def share_of(own: str, system: System, load: Traffic) -> float:
    """How much of the next calls this zone's instances answer."""
    here = {instance for instance, its in system.zones().items() if its == own}
    begun = time.time()
    load.go_on_for(CALLS)
    answered = [call.instance for m in ("GET", "POST") for call in load.report(m).between(begun).outcomes]
    return sum(instance in here for instance in answered) / len(answered)


def test_a_zone_is_left(system: System, scene: Row) -> None:
    """A caller's zone loses its only backend, and gets another."""
    zones = {f"node{node}": zone(node) for node in NODES}
    for service in SERVICES:
        pods = system.cluster.pods(service.name)
        assert system.zones(service) == {instance_of(pod, service): zones[pod["spec"]["nodeName"]] for pod in pods}
    assert set(system.zones().values()) == set(zones.values())
    own = zone(HERE)
    with traffic(system, zone=own) as load:
        scene.load = load
        before = share_of(own, system, load)
        system.cluster.kubectl("cordon", f"node{HERE}")
        system.cluster.kubectl("delete", "pod", system.backend_on(HERE)["metadata"]["name"])
        system.wait_until_everyone_passes(BACKENDS)
        without = share_of(own, system, load)
        system.cluster.kubectl("uncordon", f"node{HERE}")
        system.roll()
        system.wait_until_everyone_passes(BACKENDS)
        again = share_of(own, system, load)
        scene.seen.append(f"{before:.0%} of the calls stay in the zone, {without:.0%} without it, {again:.0%} after")
    none_failed(load)
    assert (before > KEPT, without, again > KEPT) == (True, 0.0, True)
