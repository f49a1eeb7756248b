"""Servers of Consul end, one for good, and are upgraded: services go on calling each other, and Consul leads again."""

import subprocess
from collections.abc import Callable

import pytest

from deploy.compose.locked.roll import roll
from tests.e2e.report import Row
from tests.e2e.system import run_in, wait_until
from tests.e2e.traffic import BY_NAME, check_once, traffic
from tests.locked.probe import probing
from tests.locked.system import LockedSystem

RATE = 10.0
BEFORE, AFTER = 50, 100
"""Calls of every kind before and after something is done."""


def kill(system: LockedSystem, leader: str) -> None:
    """As a power cut would."""
    system.container(leader).kill()


def terminate(system: LockedSystem, leader: str) -> None:
    """As `docker stop` does."""
    system.container(leader).stop(timeout=10)


def leave(system: LockedSystem, leader: str) -> None:
    """It says good-bye to the others, and ends."""
    system.container(leader).exec_run(["consul", "leave"])  # which ends with the container that it runs in
    system.container(leader).stop(timeout=10)  # the engine would start it again


def transfer(system: LockedSystem, leader: str) -> None:
    """Another one leads first."""
    run_in(system.container(leader), "consul", "operator", "raft", "transfer-leader")
    terminate(system, leader)


def none_failed(scene: Row) -> None:
    """Of what is called by name nothing failed, nothing was done twice, and nothing is lost.

    What fails at the edge, whose callers never repeat anything, is counted and shown.
    """
    assert scene.traffic is not None
    for method in ("GET", "POST"):
        assert scene.traffic.column(BY_NAME, method).failures == ()
    check_once(scene.traffic.column(BY_NAME, "POST"))


@pytest.mark.parametrize("end", [transfer, terminate, leave, kill], ids=lambda end: end.__name__)
def test_the_leader_ends(system: LockedSystem, scene: Row, end: Callable[[LockedSystem, str], None]) -> None:
    """The leader of the three servers ends, and comes back."""
    system.wait_until_whole()
    leader = system.leader()
    scene.name = f"The leader ends by {end.__name__}, and comes back"
    with traffic(system, RATE) as load, probing(system) as probe:
        scene.traffic = load
        load.go_on(BEFORE)
        end(system, leader)
        load.go_on_for(AFTER)
        system.container(leader).start()
        back = system.wait_until_whole()
        load.go_on_for(BEFORE)
    scene.saw(f"{probe.told()}; three healthy voters {back:.1f} s after its start")
    assert system.everyone_passes()
    none_failed(scene)


def test_a_server_is_lost_for_good(system: LockedSystem, scene: Row) -> None:
    """One server of three is lost with all its data, and a new one takes its place."""
    system.wait_until_whole()
    lost = system.leader()
    with traffic(system, RATE) as load:
        scene.traffic = load
        load.go_on(BEFORE)
        system.container(lost).remove(force=True)
        subprocess.run(
            ["docker", "volume", "rm", f"{system.project}_{lost}-data"], check=True, stdout=subprocess.DEVNULL
        )
        load.go_on_for(BEFORE)
        system.stack.compose("up", "-d", "--no-deps", lost)
        back = system.wait_until_whole()
        load.go_on_for(BEFORE)
    scene.saw(f"{lost} led; three healthy voters {back:.1f} s after a new one was started in its place")
    assert system.everyone_passes()
    none_failed(scene)


def test_upgrade(system: LockedSystem, scene: Row) -> None:
    """The three servers and the agent get another image, one after another, the leader by transfer."""
    system.wait_until_whole()
    image = system.stack.variables["CONSUL_IMAGE"]
    other = "registry-local/consul:next"
    subprocess.run(["docker", "tag", image, other], check=True)
    system.stack.variables = {**system.stack.variables, "CONSUL_IMAGE": other}
    said: list[str] = []
    with traffic(system, RATE) as load, probing(system) as probe:
        scene.traffic = load
        load.go_on(BEFORE)
        roll(system.stack, said.append)
        load.go_on_for(BEFORE)
    names = ("consul-1", "consul-2", "consul-3", "consul")
    assert {system.container(name).attrs["Config"]["Image"] for name in names} == {other}
    scene.saw(f"{probe.told()}; {'; '.join(said)}")
    wait_until(system.everyone_passes, 30, "everyone passes")
    none_failed(scene)
