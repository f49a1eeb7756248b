"""Everything that Consul and the vault hold, in one stream, and back again."""

import io
import tarfile
from typing import IO

from deploy.keeper.api import Consul, ConsulError
from deploy.keeper.vault import Vault

__all__ = ["restore_consul", "restore_vault", "save"]

_SNAPSHOT = "consul.snapshot"


def save(consul: Consul, vault: Vault, target: IO[bytes]) -> None:
    """Writes an archive with Consul's snapshot and the vault: it holds every token and every key. Blocks."""
    snapshot = consul.ask("GET", "/v1/snapshot")
    with tarfile.open(fileobj=target, mode="w|gz") as archive:
        entry = tarfile.TarInfo(_SNAPSHOT)
        entry.size = len(snapshot)
        archive.addfile(entry, io.BytesIO(snapshot))
        for path in sorted(vault.folder.iterdir()):
            archive.add(path, f"vault/{path.name}", recursive=False)


def restore_vault(archive: bytes, vault: Vault) -> None:
    """Puts every secret of the archive into the vault, and gives each reader its own. Raises: tarfile.TarError."""
    for name, content in _contents(archive).items():
        if name.startswith("vault/"):
            vault.write(name.removeprefix("vault/"), content)
    vault.deliver()


def restore_consul(consul: Consul, archive: bytes) -> None:
    """Puts the archive's state into Consul, in place of whatever it holds. Raises: ConsulError."""
    snapshot = _contents(archive)[_SNAPSHOT]

    def restored() -> bool:
        # Within a second of an election, Consul refuses.
        consul.ask("PUT", "/v1/snapshot", snapshot)
        return True

    consul.wait_until(restored, "Consul takes the snapshot")
    # It names the nodes of that time, whose names new ones can't have: agents write the catalog again.
    for node in consul.get("/v1/catalog/nodes"):
        consul.put("/v1/catalog/deregister", {"Node": node["Node"]})


def _contents(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        files = {member.name: opened.extractfile(member) for member in opened if member.isfile()}
        found = {name: file.read() for name, file in files.items() if file}
    if _SNAPSHOT not in found or any("/" in name.removeprefix("vault/") for name in found):
        raise ConsulError("this is no archive of `backup`")
    return found
