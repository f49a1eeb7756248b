"""The same promises over mutual TLS: instances of the mesh die, hang, are rolled and scaled while a member calls.

One agent serves everybody here, so it may be unsafe; what is tried is the calls.
"""

import pytest

from registry.testing.fixtures import ConsulAgent
from tests.failover import scenes
from tests.failover.scenes import Method, connect_in_mesh
from tests.failover.test_scenes import CALLERS, counted


async def test_a_kill_fails_no_get(consul_agent: ConsulAgent) -> None:
    """kill -9 of one of three, which Consul doesn't notice: no caller does either, and few calls are made twice."""
    scene = counted(await scenes.kill_one_of_three(consul_agent, "GET", connect_in_mesh, mesh=True))
    assert scene.report.errors == {}
    assert scene.duplicated <= CALLERS


async def test_a_kill_repeats_no_post(consul_agent: ConsulAgent) -> None:
    """kill -9 of one of three fails at most the POSTs that were under way there; none arrives twice."""
    scene = counted(await scenes.kill_one_of_three(consul_agent, "POST", connect_in_mesh, mesh=True))
    assert scene.report.errors.keys() <= {"ReadError", "RemoteProtocolError"}
    assert len(scene.report.failures) <= CALLERS
    assert scene.duplicated == 0
    assert scene.figures["failed_later"] == 0


async def test_a_hung_instance_costs_one_timeout_each_at_most(consul_agent: ConsulAgent) -> None:
    """SIGSTOP of one of two: only callers that were waiting for it wait one time-out, and nobody fails."""
    scene = counted(await scenes.stop_one_of_two(consul_agent, connect_in_mesh, mesh=True))
    assert scene.report.errors == {}
    assert scene.figures["slow"] <= CALLERS
    assert scene.figures["slow_later"] == 0


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_roll_fails_nothing(consul_agent: ConsulAgent, method: Method) -> None:
    """Three are restarted one after another: no call fails, and no POST arrives twice."""
    scene = counted(await scenes.roll_three(consul_agent, method, connect_in_mesh, mesh=True))
    assert scene.report.errors == {}
    assert scene.duplicated == 0 or method == "GET"


async def test_scaling_up_and_down_is_not_noticed(consul_agent: ConsulAgent) -> None:
    """1 → 10 → 1 while calling: nobody fails, and newcomers are called within a second."""
    scene = counted(await scenes.scale_to_and_back(consul_agent, 10, connect_in_mesh, mesh=True))
    assert scene.report.errors == {}
    assert scene.figures["first_call"] < 1.0
