"""Everything dies at once, as with the host, and comes back."""

from tests.e2e.report import Row
from tests.e2e.system import System, wait_until

CARD = {"title": "Written before the end", "content": "These were made", "tags": []}


def test_host(system: System, scene: Row) -> None:
    """The host dies with everything on it, and starts again."""
    backend = system.edge["backend-api"]
    card = system.http.post(f"{backend}/api/publish", json=CARD)
    assert card.status_code == 201
    containers = system.containers()
    for container in containers:
        container.kill()
    # The engine starts all at once after a boot, and knows no order; the last ones first is the worst of them.
    for container in reversed(containers):
        container.start()
    back = wait_until(system.works, 60, "everything works again")
    assert system.http.get(f"{backend}/api/cards/{card.json()['id']}").json()["title"] == CARD["title"]
    scene.saw(f"{len(system.ghosts())} old registrations are left, as critical, for Consul to drop")
    scene.saw(f"everything works {back:.0f} s after the containers were started, in any order; no card lost")
