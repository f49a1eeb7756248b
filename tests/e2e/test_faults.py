"""One of three replicas dies, hangs, is cut off, is sick or runs out of memory."""

import pytest

from tests.e2e.caller import ATTEMPT_SECONDS
from tests.e2e.report import Row
from tests.e2e.system import NETWORK, Replica, System, wait_until
from tests.e2e.traffic import BY_NAME, EDGE, Column, Traffic, check_once, now, traffic

BEFORE = 250
"""Calls of every kind before the fault."""
SLOW = 1.0
FEW = 5
"""At most so many POSTs by name fail, of those that go there until it is left out."""
TWO_CHECKS = 2.5
"""Seconds that the edge needs for two failed checks, with time to spare on a busy machine."""


def victim(system: System) -> Replica:
    """The one that is hit."""
    return system.replicas()[1]


def check_under_way(load: Traffic, hit: Replica, since: float) -> None:
    """No GET failed. The only POSTs that did were under way to the one that was hit, at one moment; none came twice."""
    for side in (BY_NAME, EDGE):
        assert load.column(side, "GET").failures == (), side
        post = load.column(side, "POST")
        died = min((call.started + call.seconds for call in post.failures), default=since)
        assert died >= since, side
        assert post.failed_after(died + 0.1) == (), side
        check_only_there(post, hit)
        check_once(post)


def check_only_there(post: Column, hit: Replica) -> None:
    """What failed had reached no other replica. (What was in its queue when it was hit, it may never have read.)"""
    elsewhere = {each for host, reached in post.reached.items() if host != hit.host for each in reached}
    assert [call for call in post.failures if call.id in elsewhere] == []


def test_kill(system: System, scene: Row) -> None:
    """kill -9 of one of three."""
    hit = victim(system)
    instance = hit.instance
    with traffic(system) as load:
        scene.traffic = load
        load.go_on(BEFORE)
        moment = now()
        hit.container.kill()
        noticed = wait_until(lambda: instance not in system.passing(), 25, "Consul notices")
        load.go_on()
    scene.saw(f"critical in Consul after {noticed:.1f} s")
    check_under_way(load, hit, moment)


def test_out_of_memory(system: System, scene: Row) -> None:
    """One of three is OOM-killed, and restarted by policy."""
    hit = victim(system)
    restarts = hit.container.attrs["RestartCount"]
    with traffic(system) as load:
        scene.traffic = load
        load.go_on(BEFORE)
        moment = now()
        hit.eat()

        def restarted() -> bool:
            hit.container.reload()
            return bool(hit.container.attrs["RestartCount"] > restarts)

        wait_until(restarted, 10, "the system ends it, the policy starts it again")
        back = wait_until(lambda: hit.instance in system.passing() and hit.healthy, 10, "it is back")
        load.go_on()
    scene.saw(f"back after {back:.1f} s")
    only = {"container": hit.container.id, "event": "oom"}
    assert list(system.engine.events(since=int(moment), until=int(now()), filters=only)), "it was not for memory"
    check_under_way(load, hit, moment)


def test_pause(system: System, scene: Row) -> None:
    """One of three hangs (paused), and goes on later."""
    hit = victim(system)
    instance = hit.instance
    with traffic(system) as load:
        scene.traffic = load
        load.go_on(BEFORE)
        moment = now()
        hit.container.pause()
        noticed = wait_until(lambda: instance not in system.passing(), 25, "Consul notices")
        load.go_on_for(250)
        hit.container.unpause()
        back = wait_until(lambda: instance in system.passing(), 15, "it is back")
        load.go_on()
    name_get, name_post = load.column(BY_NAME, "GET"), load.column(BY_NAME, "POST")
    edge_get, edge_post = load.column(EDGE, "GET"), load.column(EDGE, "POST")
    slow = [column.report.between(moment - 2).slower_than(SLOW) for column in (name_get, name_post)]
    last = max((call.started for call in edge_post.failures), default=moment) - moment
    scene.saw(f"critical in Consul after {noticed:.1f} s, passing {back:.1f} s after it goes on")
    scene.saw(f"by name {slow[0]} GETs and {slow[1]} POSTs waited longer than {SLOW:g} s")
    scene.saw(f"edge: the last POST that failed began {last:.1f} s after the pause")
    assert name_get.failures == ()
    assert edge_get.failures == ()
    assert sum(slow) <= 20
    assert all(call.seconds < 2.5 for call in name_post.failures)
    assert len(name_post.failures) <= FEW
    # By then the first call that went there has timed out, and told of it.
    assert name_post.failed_after(moment + ATTEMPT_SECONDS) == ()
    assert edge_post.failed_after(moment + TWO_CHECKS) == ()
    for post in (name_post, edge_post):
        check_only_there(post, hit)
        check_once(post)


def test_disconnect(system: System, scene: Row) -> None:
    """One of three loses the network, and gets it back under another address."""
    hit = victim(system)
    before = hit.instance
    network = system.engine.networks.get(NETWORK)
    with traffic(system) as load:
        scene.traffic = load
        load.go_on(BEFORE)
        moment = now()
        network.disconnect(hit.container)
        noticed = wait_until(lambda: before not in system.passing(), 25, "Consul notices")
        load.go_on_for(200)
        network.connect(hit.container, aliases=["backend"], ipv4_address=system.free_address())
        after = hit.instance
        back = wait_until(lambda: after in system.passing(), 30, "it is registered under its new address")
        ghost = wait_until(lambda: before not in system.registered(), 10, "the old registration is gone")
        load.go_on()
    assert after != before
    name_post, edge_post = load.column(BY_NAME, "POST"), load.column(EDGE, "POST")
    scene.saw(f"critical in Consul after {noticed:.1f} s, registered again {back:.1f} s after it is connected")
    scene.saw(f"the old registration gone {ghost:.1f} s after that")
    for side in (BY_NAME, EDGE):
        last = max((call.started for call in load.column(side, "POST").failures), default=moment) - moment
        scene.saw(f"{side}: the last POST that failed began {last:.1f} s after the cut")
    assert load.column(BY_NAME, "GET").failures == ()
    assert load.column(EDGE, "GET").failed_after(moment + TWO_CHECKS) == ()
    assert len(name_post.failures) <= FEW
    assert name_post.failed_after(moment + ATTEMPT_SECONDS) == ()
    assert edge_post.failed_after(moment + TWO_CHECKS) == ()
    for post in (name_post, edge_post):
        check_once(post)


@pytest.mark.parametrize("fault", [{"status": 500}, {"delay": 3.0}], ids=["500", "3 s slow"])
def test_sick(system: System, scene: Row, fault: dict[str, float]) -> None:
    """One of three answers {fault}, and heals."""
    hit = victim(system)
    scene.name = "One of three answers 500, and heals" if "status" in fault else "One of three is 3 s slow, and heals"
    with traffic(system) as load:
        scene.traffic = load
        load.go_on(BEFORE)
        moment = now()
        hit.command(**fault)
        load.go_on(750)
        hit.command()
        healed = now()
        load.go_on()
    name_get, name_post = load.column(BY_NAME, "GET"), load.column(BY_NAME, "POST")
    reached = name_get.reached[hit.host] | name_post.reached[hit.host]
    sick = [call for column in (name_get, name_post) for call in column.report.between(moment + 2, healed).outcomes]
    share = sum(call.id in reached for call in sick) / len(sick)
    scene.saw(f"by name: its share fell to {100 * share:.1f} %")
    for side in (BY_NAME, EDGE):
        post = load.column(side, "POST")
        last = max((call.started for call in post.failures), default=moment) - moment
        scene.saw(f"{side}: the last POST that failed began {last:.1f} s after it fell ill")
    assert share < 0.05
    assert name_get.failures == ()
    # A POST that was carried out, or may have been, is not sent again: each finds out anew, but seldom.
    assert len(name_post.failures) <= FEW
    for side in (BY_NAME, EDGE):
        check_once(load.column(side, "POST"))
