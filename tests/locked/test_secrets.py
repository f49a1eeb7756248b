"""Everything is up with nothing done by hand, and each secret is where it is needed and nowhere else."""

import json
import re
import subprocess
from collections.abc import Iterator
from typing import IO

from deploy.keeper.grants import CALLS, SERVERS
from tests.e2e.report import Row
from tests.e2e.system import run_in
from tests.locked.system import JOBS, LockedSystem
from tools.services import SERVICES

CARD = {"title": "Locked", "content": "Every service registers with a token of its own.", "tags": []}
_IMAGES = [f"registry/{name}" for name in (*(service.folder for service in SERVICES), "keeper")]
_CHUNK = 2**24
_LISTING = "for file in /secrets/*; do stat -c '%n %u %a' $file; done"


def needles(system: LockedSystem) -> dict[bytes, str]:
    """Secret → the file of the vault that holds it: what may stand nowhere else."""
    found = {}
    for name, content in system.vault().items():
        if name.endswith(".token"):
            found[str(json.loads(content)["secret"]).encode()] = name
        elif name.endswith("-key.pem"):
            found[content.splitlines()[1].encode()] = name
        elif not name.endswith(".pem"):
            found[content.encode()] = name
    return found


def test_up(system: LockedSystem, scene: Row) -> None:
    """From nothing, one command brings up everything, and it works together."""
    front_door = f"{system.edge['orchestrator-api']}/api/publish"
    assert system.http.post(front_door, json=CARD).status_code == 401
    card = system.http.post(front_door, json=CARD, headers=system.pass_of("alice"))
    assert card.status_code == 201, card.text
    stored = system.http.get(f"{system.edge['backend-api']}/api/cards/{card.json()['id']}")
    assert stored.json()["title"] == CARD["title"]
    assert system.http.get(f"{system.edge['orchestrator-api']}/health").status_code == 200
    scene.saw(f"works {system.started:.0f} s after the command, images built before; leader: {system.leader()}")


def test_again_changes_nothing(system: LockedSystem) -> None:
    """Both jobs, run again, find everything there: no file is given out, and Consul's rules keep their index."""
    paths = ["/v1/acl/policies", "/v1/acl/tokens", "/v1/config/service-intentions"]
    before = [system.get(path) for path in paths], system.vault()
    assert "nothing to do" in system.job("make")
    assert "nothing to do" in system.job("grant")
    assert ([system.get(path) for path in paths], system.vault()) == before


def test_no_secret_in_sight(system: LockedSystem, scene: Row) -> None:
    """No secret of the vault is in what the engine shows of a container, in a log, or in an image and its history."""
    secrets = needles(system)
    assert len(secrets) >= 2 + 4 + 2 + len(CALLS)
    pattern = re.compile(b"|".join(map(re.escape, secrets)))

    def check(content: bytes, where: str) -> None:
        assert {secrets[found] for found in pattern.findall(content)} == set(), where

    everyone = system.engine.containers.list(
        all=True, filters={"label": f"com.docker.compose.project={system.project}"}
    )
    assert {each.labels["com.docker.compose.service"] for each in everyone} >= {*JOBS, *SERVERS, "consul", "postgres"}
    for container in everyone:
        check(json.dumps(container.attrs).encode(), f"docker inspect {container.name}")
        check(container.logs(), f"docker logs {container.name}")
    size = 0
    with subprocess.Popen(["docker", "save", *_IMAGES], stdout=subprocess.PIPE) as saving:
        assert saving.stdout is not None
        for chunk in overlapping(saving.stdout):
            check(chunk, f"docker save {' '.join(_IMAGES)}")
            size += len(chunk)
    assert size > _CHUNK
    scene.saw(f"{len(secrets)} secrets, {len(everyone)} containers, {size / 2**20:,.0f} MiB of images")


def overlapping(stream: IO[bytes]) -> Iterator[bytes]:
    """The stream in pieces, each of which begins with the end of the one before."""
    end = b""
    while piece := stream.read(_CHUNK):
        yield end + piece
        end = piece[-512:]


def test_each_gets_its_own(system: LockedSystem) -> None:
    """A container has the secrets that it needs, as files that its user alone may read, and no other's."""
    secrets = needles(system)
    allowed = {
        "postgres": {"database-password"},
        "edge-identity": {"edge.token"},
        "backend": {"backend-api.token", "database-password"},
        "research": {"research-api.token"},
        "orchestrator": {"orchestrator-api.token"},
        "client": {"orchestrator-api.token"},
        "consul": {"gossip", "agent.token", "agent-key.pem", "dns.token", "ui.token"},
    }
    for server in SERVERS:
        allowed[server] = {"gossip", f"{server}.token", f"{server}-key.pem", "management.token"}
    for container in system.containers():
        service = container.labels["com.docker.compose.service"]
        mounts = {mount["Destination"]: mount["RW"] for mount in container.attrs["Mounts"]}
        if service == "edge":  # its key is in memory, and it asks Consul for nothing
            assert "/secrets" not in mounts
            continue
        held = run_in(container, "sh", "-c", "cat /secrets/*").encode()
        assert {name for secret, name in secrets.items() if secret in held} == allowed[service], service
        user = container.attrs["Config"]["User"].split(":")[0]
        for line in run_in(container, "sh", "-c", _LISTING).splitlines():
            assert line.split()[1:] == [user, "400"], f"{service}: {line}"
        assert mounts["/secrets"] is False, service
        assert "/vault" not in mounts
