"""More and fewer replicas, and new ones in place of old ones, while calls come."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.e2e.report import Row
from tests.e2e.system import Replica, System, run_in, wait_until
from tests.e2e.traffic import BY_NAME, EDGE, Traffic, check_once, now, traffic

STEP = 200
"""Calls of every kind after each change of scale."""
ONE, TWO = 20.0, 30.0
"""GETs, and POSTs, per second from each side: so many replicas bear it, while others start on the same two cores."""


@pytest.mark.parametrize("backends", [1], indirect=True)
def test_scale(system: System, scene: Row) -> None:
    """backend scales 1 → 3 → 5 → 1."""
    spans: list[tuple[int, float, float]] = []
    first: dict[str, float] = {}
    with traffic(system, ONE) as load:
        scene.traffic = load
        load.go_on(200)
        for backends in (3, 5, 1):
            system.scale(backends)
            replicas = system.replicas()
            wait_until(partial(all_healthy, replicas), 60, "all are healthy")
            wait_until(partial(all_called, load, replicas), 10, "each was called")
            first |= first_calls(load, replicas)
            since = now()
            load.go_on_for(STEP)
            spans.append((backends, since, now()))
    shares = [share for span in spans for share in relative_shares(load, *span)]
    latest = max(first.values())
    scene.saw(
        f"a new one's first call by name ended {abs(latest):.1f} s {'before' if latest < 0 else 'after'} the engine "
        "found it healthy, at the latest"
    )
    scene.saw(f"by name, a replica's share of the calls is {min(shares):.2f} to {max(shares):.2f} of an equal one")
    assert latest < 3
    assert min(shares) > 0.8
    assert max(shares) < 1.2
    assert load.column(BY_NAME, "POST").failures == ()
    for side in (BY_NAME, EDGE):
        assert load.column(side, "GET").failures == ()
        check_once(load.column(side, "POST"))
    explain(load)


def test_rolling_restart(system: System, scene: Row) -> None:
    """All three are restarted, one after another."""
    took = []
    with traffic(system, TWO) as load:
        scene.traffic = load
        load.go_on(100)
        for replica in system.replicas():
            begun = now()
            restart_watched(system, replica)
            wait_until(partial(is_back, system, replica), 60, f"{replica} is back")
            took.append(now() - begun)
            load.go_on_for(30)
        load.go_on()
    scene.saw(f"each restart took {max(took):.1f} s at most")
    for side in (BY_NAME, EDGE):
        for method in ("GET", "POST"):
            column = load.column(side, method)
            assert column.failures == (), (side, method)
            check_once(column)


def restart_watched(system: System, replica: Replica) -> None:
    """Restarts it in good order: it leaves Consul at once, and serves on after that."""
    instance = replica.instance
    with ThreadPoolExecutor(1) as pool:
        restarted = pool.submit(replica.container.restart, timeout=10)
        wait_until(lambda: instance not in system.registered(), 5, f"{replica} leaves Consul")
        search = f"http://127.0.0.1:{replica.service.port}/api/cards"
        run_in(replica.container, "python", "-c", f"from urllib.request import urlopen; urlopen('{search}')")
        restarted.result()


def all_healthy(replicas: list[Replica]) -> bool:
    """Whether the engine says so."""
    return all(replica.healthy for replica in replicas)


def all_called(load: Traffic, replicas: list[Replica]) -> bool:
    """Whether each has answered a call by name."""
    answered = {call.instance for method in ("GET", "POST") for call in tuple(load.ended(BY_NAME, method))}
    return answered >= {replica.instance for replica in replicas}


def is_back(system: System, replica: Replica) -> bool:
    """Whether Consul and the engine say so."""
    return replica.instance in system.passing() and replica.healthy


def first_calls(load: Traffic, replicas: list[Replica]) -> dict[str, float]:
    """Instance → seconds from its health to its first answer by name; negative: Consul knew before the engine did."""
    calls = [call for method in ("GET", "POST") for call in tuple(load.ended(BY_NAME, method))]
    return {
        instance: min(call.started + call.seconds for call in calls if call.instance == instance) - replica.healthy_at
        for replica in replicas
        if (instance := replica.instance)
    }


def relative_shares(load: Traffic, backends: int, since: float, until: float) -> list[float]:
    """Each replica's share of the calls by name of this time, 1.0: an equal share."""
    calls = [
        call
        for method in ("GET", "POST")
        for call in load.column(BY_NAME, method).report.between(since, until).outcomes
    ]
    counts = dict.fromkeys({call.instance for call in calls}, 0)
    for call in calls:
        counts[call.instance] += 1
    assert len(counts) == backends
    return [count * backends / len(calls) for count in counts.values()]


def explain(load: Traffic) -> None:
    """POSTs through the edge may fail only when the replica that they were sent to was being removed: as 502 or 503."""
    for call in load.column(EDGE, "POST").failures:
        assert call.error in {"HTTP 502", "HTTP 503"}, call
