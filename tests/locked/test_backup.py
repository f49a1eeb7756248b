"""A backup, restored on empty servers, gives the same tokens, rules and authorities."""

from pathlib import Path

from deploy.compose.locked.backup import save
from deploy.compose.locked.restore import restore
from tests.e2e.report import Row
from tests.locked.system import LockedSystem

PATHS = ["/v1/acl/tokens", "/v1/acl/policies", "/v1/config/service-intentions", "/v1/connect/ca/roots"]


def held(system: LockedSystem) -> list[object]:
    """What must be the same: ids, names and contents, without indexes."""
    found: list[object] = []
    for path in PATHS:
        answer = system.get(path)
        entries = answer["Roots"] if isinstance(answer, dict) else answer
        keys = ("AccessorID", "SecretID", "ID", "Name", "Rules", "Description", "Sources", "RootCert")
        found.append(sorted(str({key: each[key] for key in keys if key in each}) for each in entries))
    return found


def test_restored_on_empty_servers(system: LockedSystem, scene: Row, tmp_path: Path) -> None:
    """Every volume but that of Postgres is gone; a backup brings tokens, rules and roots back."""
    file = tmp_path / "backup"
    before, vault = held(system), system.vault()
    save(system.stack, file)
    assert file.stat().st_mode & 0o777 == 0o600
    system.keep_logs("before the restore")
    system.stack.compose("down", "--remove-orphans")
    for volume in system.stack.volumes():
        if not volume.endswith("postgres-data"):
            system.engine.volumes.get(volume).remove()
    restore(system.stack, file, "--scale", "backend=3")
    system.connect()
    system.settle()
    assert system.vault() == vault
    assert held(system) == before
    scene.saw(f"{file.stat().st_size / 1024:.0f} KiB; {len(before[0])} tokens, the same roots")  # type: ignore[arg-type]
