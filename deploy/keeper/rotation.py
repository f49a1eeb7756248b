"""Changes secrets while everything runs: the new one is known everywhere before the old one is forgotten."""

import json
from pathlib import Path

from deploy.keeper.access import write_token
from deploy.keeper.api import Consul
from deploy.keeper.grants import identities
from deploy.keeper.vault import Token, Vault, new_gossip_key

__all__ = ["rotate_authority", "rotate_gossip", "rotate_token"]

REGISTRATIONS = Path("/agent")
"""The data of the agent, which keeps each registration together with the token that wrote it."""


def rotate_token(consul: Consul, vault: Vault, name: str) -> int:
    """Gives a service another token, and returns how many older ones were deleted, once nothing relies on them.

    Begun again after an interruption, it finishes what it had begun. Blocks. Raises: ConsulError.
    """
    new = Token.new()
    write_token(consul, name, new, identities(vault.place)[name])  # first: who gets it must be able to use it
    vault.keep(name, new)
    vault.deliver()
    older = [each for each in consul.get("/v1/acl/tokens") if each["Description"] == name]
    older = [each for each in older if each["AccessorID"] != new.accessor]
    gone = {str(consul.get(f"/v1/acl/token/{each['AccessorID']}")["SecretID"]) for each in older}
    consul.wait_until(lambda: not gone & _used(), f"{name} has registered with its new token")
    for each in older:
        consul.ask("DELETE", f"/v1/acl/token/{each['AccessorID']}")
    return len(older)


def _used() -> set[str]:
    """The tokens that registrations of this moment were written with."""
    used = set()
    for kind in ("services", "checks"):
        for path in REGISTRATIONS.glob(f"{kind}/*"):
            try:
                used.add(str(json.loads(path.read_bytes()).get("Token", "")))
            except (OSError, ValueError):
                continue  # just removed, or just being written
    return used


def rotate_gossip(consul: Consul, vault: Vault) -> None:
    """Another key for what agents tell each other; every agent has it before one uses it. Raises: ConsulError."""
    new = new_gossip_key()
    old = {key for ring in consul.get("/v1/operator/keyring") for key in ring["Keys"]}
    consul.ask("POST", "/v1/operator/keyring", json.dumps({"Key": new}).encode())
    members = len(vault.place.nodes) + 1
    consul.wait_until(
        lambda: all(ring["Keys"].get(new) == members for ring in consul.get("/v1/operator/keyring")),
        f"all {members} agents have the new key",
    )
    consul.put("/v1/operator/keyring", {"Key": new})
    # Agents go on with what they were told; the file is for those that are made anew.
    vault.write("gossip", new.encode())
    vault.deliver()
    for key in old:
        consul.ask("DELETE", "/v1/operator/keyring", json.dumps({"Key": key}).encode())


def rotate_authority(vault: Vault) -> None:
    """Another authority signs for every agent: first all trust both, then it signs, then the old one is dropped.

    Services read the file of authorities again when it has changed. Begun again after an interruption, it finishes what
    it had begun. Blocks. Raises: ConsulError.
    """
    if not (vault.folder / "next.pem").exists():
        vault.make_authority("next")
    new = (vault.folder / "next.pem").read_bytes()
    # What was trusted stays so: after an interruption, either may have signed what an agent shows.
    _trust(vault, vault.trusted.read_bytes().replace(new, b"") + new)
    for kind in ("-key.pem", ".pem"):
        vault.write(f"ca{kind}", (vault.folder / f"next{kind}").read_bytes())
    for name in (*vault.place.servers, vault.place.agent):
        vault.make_certificate(name)
    vault.deliver()
    Consul(vault).reload()
    _trust(vault, new)
    for kind in ("-key.pem", ".pem"):
        (vault.folder / f"next{kind}").unlink()


def _trust(vault: Vault, authorities: bytes) -> None:
    vault.write("trusted.pem", authorities)
    vault.deliver()
    Consul(vault).reload()
