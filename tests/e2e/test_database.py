"""Postgres stops, and comes back."""

import httpx

from tests.e2e.report import Row
from tests.e2e.system import BACKEND, System, wait_until
from tests.e2e.traffic import BY_NAME, EDGE, check_once, now, traffic

ERRORS = {BY_NAME: {"HTTP 503", "NoHealthyInstanceError"}, EDGE: {"HTTP 503"}}
"""What callers are told."""
TIMED_OUT = {BY_NAME: "ReadTimeout", EDGE: "HTTP 504"}
"""What a few are told instead that were under way when the connections broke: it takes one time-out, 2 s."""
CHECK = 2.0 + 2.0
"""Seconds from one of Consul's checks to the next, when each takes its whole time-out."""


def test_database(system: System, scene: Row) -> None:
    """Postgres is stopped, and started again."""
    backends = {replica.instance for replica in system.replicas()}
    with traffic(system) as load:
        scene.traffic = load
        load.go_on(300)
        system.container("postgres").stop(timeout=10)
        moment = now()
        sick = wait_until(lambda: not system.passing(), 3 * CHECK, "every backend is critical")
        assert system.registered() == backends
        words = said_by_orchestrator(system)
        answer = system.http.post(
            f"{system.edge['research-api']}/api/enrich", json={"content": "Research works without the database."}
        )
        assert answer.status_code == 200
        assert answer.json()["complete"] is False
        load.go_on_for(50)
        system.container("postgres").start()
        back = wait_until(lambda: system.passing() == backends, 30, "every backend passes again")
        healed = now()
        load.go_on()
    scene.saw(f"critical in Consul after {sick:.1f} s, passing {back:.1f} s after the start; no card lost")
    scene.saw(f"the orchestrator says: {words.partition(';')[0]}; … {words.rpartition(': ')[2]}")
    for side in (BY_NAME, EDGE):
        for method in ("GET", "POST"):
            column = load.column(side, method)
            assert column.report.errors.keys() <= ERRORS[side] | {TIMED_OUT[side]}, (side, method, column.report.errors)
            assert column.report.errors.get(TIMED_OUT[side], 0) <= 10, (side, method)
            assert all(moment - 11 < call.started < healed + 1 for call in column.failures), (side, method)
            assert column.report.slower_than(6) == 0
            check_once(column)


def said_by_orchestrator(system: System) -> str:
    """What the front door says of backend-api while it is sick. Raises: TimeoutError, when it does not."""
    words: list[str] = []

    def says() -> bool:
        try:
            answer = system.http.get(f"{system.edge['orchestrator-api']}/api/health")
        except httpx.TransportError:
            return False
        said = {each["service"]: each for each in answer.json()["services"]} if "services" in answer.json() else {}
        words[:] = [said.get(BACKEND.name, {}).get("words", "")]
        return answer.status_code == 503 and "database" in words[0]

    wait_until(says, 10, "the orchestrator names the database", lambda: words)
    return words[0]
