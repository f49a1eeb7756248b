"""Secrets change under load, and the old ones are worth nothing afterwards."""

import json

from deploy.keeper.grants import CALLS
from tests.e2e.report import Row
from tests.e2e.system import wait_until
from tests.e2e.traffic import traffic
from tests.locked.system import LockedSystem
from tests.locked.test_servers import BEFORE, RATE, none_failed


def rotate(system: LockedSystem, scene: Row, what: str) -> str:
    """Rotates under load, and returns what the keeper said."""
    with traffic(system, RATE) as load:
        scene.traffic = load
        load.go_on(BEFORE)
        said = system.job(what)
        load.go_on_for(2 * BEFORE)
    system.connect()
    wait_until(system.everyone_passes, 10, "everyone passes")
    return said


def test_service_tokens(system: LockedSystem, scene: Row) -> None:
    """Every service gets a new token, and the old one is deleted."""
    before = system.vault()
    said = rotate(system, scene, "tokens")
    after = system.vault()
    for name in CALLS:
        old, new = (json.loads(vault[f"{name}.token"])["secret"] for vault in (before, after))
        assert old != new
        assert system.ask("GET", "/v1/acl/token/self", old).status_code == 403
        assert system.ask("GET", "/v1/acl/token/self", new).json()["Description"] == name
        assert old not in said
        assert new not in said
    descriptions = [each["Description"] for each in system.get("/v1/acl/tokens")]
    assert {name: descriptions.count(name) for name in CALLS} == dict.fromkeys(CALLS, 1)
    none_failed(scene)


def test_gossip_key(system: LockedSystem, scene: Row) -> None:
    """The key of gossip changes on all four agents."""
    before = system.vault()["gossip"]
    rotate(system, scene, "gossip")
    key = system.vault()["gossip"]
    assert key != before
    assert [ring["Keys"] for ring in system.get("/v1/operator/keyring")] == [{key: 4}]
    none_failed(scene)


def test_authority(system: LockedSystem, scene: Row) -> None:
    """Another authority signs for every agent; services that run on trust it, and nobody the old one."""
    old = system.authority.read_text()
    rotate(system, scene, "ca")
    new = system.vault()["ca.pem"]
    assert new.strip() not in old
    assert system.authority.read_text() == new
    for container in (system.container("consul"), system.container("consul-1")):
        container.restart()
    system.wait_until_whole()
    system.settle()
    none_failed(scene)
