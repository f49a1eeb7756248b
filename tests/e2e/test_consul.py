"""Consul goes and comes back, with what it knew and without."""

from collections.abc import Callable

import httpx

from tests.e2e.report import Row
from tests.e2e.system import System, run_in, wait_until
from tests.e2e.traffic import BY_NAME, EDGE, check_once, traffic

AWAY = 200
"""Calls of every kind while Consul is away."""


def leads(system: System) -> bool:
    """Whether Consul answers and has a leader."""
    try:
        return len(system.http.get(f"{system.consul}/v1/status/leader").text) > 2
    except httpx.TransportError:
        return False


def play(system: System, scene: Row, before_kill: Callable[[], object]) -> None:
    """Kills Consul under load, starts it again, and checks what no caller by name may notice."""
    with traffic(system) as load:
        scene.traffic = load
        load.go_on(100)
        before_kill()
        system.container("consul").kill()
        load.go_on_for(AWAY)
        system.container("consul").start()
        led = wait_until(lambda: leads(system), 30, "Consul leads")
        back = wait_until(system.everyone_passes, 10, "everyone is registered again")
        load.go_on()
    scene.saw(f"leads after {led:.1f} s, all registered {back:.1f} s after that")
    for method in ("GET", "POST"):
        assert load.column(BY_NAME, method).failures == ()
    for side in (BY_NAME, EDGE):
        check_once(load.column(side, "POST"))
    assert load.column(EDGE, "GET").failures == ()
    scene.saw(f"edge: {dict(load.column(EDGE, 'POST').report.errors) or 'no POST failed'}")
    assert load.column(EDGE, "POST").failures == ()


def test_consul_killed(system: System, scene: Row) -> None:
    """Consul is killed, and started again."""
    play(system, scene, lambda: None)


def test_consul_emptied(system: System, scene: Row) -> None:
    """Consul is killed, and started again without its data."""
    play(system, scene, lambda: run_in(system.container("consul"), "sh", "-c", "rm -rf /consul/data/*"))
