"""What live discovery promises when things break: on real processes, a real Consul, and counted on both sides.

Times are asserted only where the promise is a time. `pytest -s` shows what was counted.
"""

from functools import partial

import pytest

from registry import EjectionPolicy
from registry.testing.fixtures import ConsulAgent
from tests.failover import scenes
from tests.failover.scenes import Absence, ConsulFault, Outage, Scene, Sickness

CALLERS = 4


def counted(scene: Scene) -> Scene:
    """The scene, shown, once it is big enough to say anything and its metrics agree with callers and instances."""
    print(scene)  # noqa: T201
    assert scene.report.calls >= scenes.CALLS
    assert scene.miscounted == []
    return scene


async def test_a_kill_fails_no_get(consul_agent: ConsulAgent) -> None:
    """kill -9 of one of three, which Consul doesn't notice: no caller does either, and few calls are made twice."""
    scene = counted(await scenes.kill_one_of_three(consul_agent, "GET"))
    assert scene.report.errors == {}
    assert scene.duplicated <= CALLERS


async def test_a_kill_repeats_no_post(consul_agent: ConsulAgent) -> None:
    """kill -9 of one of three fails at most the POSTs that were under way there; none arrives twice."""
    scene = counted(await scenes.kill_one_of_three(consul_agent, "POST"))
    assert scene.report.errors.keys() <= {"ReadError", "RemoteProtocolError"}
    assert len(scene.report.failures) <= CALLERS
    assert scene.duplicated == 0
    assert scene.requests == scene.report.calls - scene.figures["unseen"]
    assert scene.figures["failed_later"] == 0


async def test_a_hung_instance_costs_one_timeout_each_at_most(consul_agent: ConsulAgent) -> None:
    """SIGSTOP of one of two: only callers that were waiting for it wait one time-out, and nobody fails."""
    scene = counted(await scenes.stop_one_of_two(consul_agent))
    assert scene.report.errors == {}
    assert scene.figures["slow"] <= CALLERS
    assert scene.figures["slow_later"] == 0


async def test_a_hung_instance_is_tried_again_at_nobodys_cost(
    consul_agent: ConsulAgent,
) -> None:
    """Once its time-outs are forgotten (shortened here) it is tried a few times more, and no caller waits for it."""
    forgetful = partial(scenes.connect_ours, ejection=EjectionPolicy(latency_peaks=0))
    scene = counted(await scenes.stop_one_of_two(consul_agent, forgetful, seconds=6.0))
    assert scene.report.errors == {}
    assert scene.figures["slow_later"] == 0
    assert 0 < scene.figures["tried_again"] <= 2 * CALLERS


@pytest.mark.parametrize("sickness", ["500 always", "500 on half", "300 ms slow"])
async def test_a_sick_instance_is_avoided_until_it_heals(consul_agent: ConsulAgent, sickness: Sickness) -> None:
    """Errors and slowness reach no caller, the sick one gets under 5 % from two seconds on, and returns when it heals.

    Its ejection is shortened from 30 s, and so is the memory of latencies, for the test not to wait that long.
    """
    forgetful = partial(scenes.connect_ours, ejection=EjectionPolicy(seconds=3.0, latency_peaks=2))
    scene = counted(await scenes.sicken_one_of_three(consul_agent, sickness, forgetful))
    assert scene.report.errors == {}
    assert scene.figures["share"] < 0.05


@pytest.mark.parametrize("absence", ["killed", "deregistered"])
async def test_nobody_there_is_said_at_once_and_a_return_is_noticed(
    consul_agent: ConsulAgent, absence: Absence
) -> None:
    """With every instance gone calls fail clearly within 50 ms and block nobody; one back is found within a second."""
    scene = counted(await scenes.lose_all_then_one_back(consul_agent, absence))
    assert scene.report.errors.keys() <= {
        *("NoHealthyInstanceError", "ServiceNotFoundError"),
        *("ConnectError", "ReadError", "RemoteProtocolError"),
    }
    assert scene.figures["gone_ok"] == 0
    assert scene.figures["gone_p99"] < 0.05
    assert scene.figures["blocked_p99"] < 0.05
    assert scene.figures["back"] < 1.0
    assert scene.figures["failed_later"] == 0


@pytest.mark.parametrize("fault", ["killed", "emptied", "paused", "restarted while instances change"])
async def test_consul_itself_may_fail(private_consul_agent: ConsulAgent, fault: ConsulFault) -> None:
    """Whatever becomes of Consul, no call fails, and five seconds after its return the view is right again."""
    scene = counted(await scenes.break_consul(private_consul_agent, fault))
    assert scene.report.errors == {}
    assert scene.figures["correct"] < 5.0


async def test_scaling_up_and_down_is_not_noticed(consul_agent: ConsulAgent) -> None:
    """1 → 20 → 1 while calling: nobody fails, newcomers are called within a second and get their fair share."""
    scene = counted(await scenes.scale_to_and_back(consul_agent))
    assert scene.report.errors == {}
    assert scene.figures["first_call"] < 1.0
    assert scene.figures["least"] > 0.8
    assert scene.figures["most"] < 1.2


@pytest.mark.parametrize("kind", ["killed", "paused", "500 always"])
async def test_an_outage_is_not_multiplied(consul_agent: ConsulAgent, kind: Outage) -> None:
    """A whole upstream fails for six seconds under steady load, and meets 1.3 times that at most when it returns."""
    scene = counted(await scenes.outage(consul_agent, kind))
    assert scene.figures["during"] < 1.3
    assert scene.figures["after"] <= 1.3
    assert scene.figures["ok_last"] == 1.0
