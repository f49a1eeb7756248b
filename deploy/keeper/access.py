"""Writes policies, tokens and intentions into Consul, each only if it is not there just so."""

from typing import Any
from urllib.parse import quote

from deploy.keeper.api import Consul
from deploy.keeper.grants import Identity, identities, intentions, policies
from deploy.keeper.vault import Token, Vault

__all__ = ["grant", "write_token"]


def grant(consul: Consul, vault: Vault) -> list[str]:
    """Returns what had to be written: nothing, when all of it is there. Blocks. Raises: ConsulError."""
    changed = [f"policy {name}" for name, rules in policies(vault.place).items() if _write_policy(consul, name, rules)]
    changed += [
        f"token {name}"
        for name, identity in identities(vault.place).items()
        if write_token(consul, name, vault.token(name), identity)
    ]
    changed += [
        f"intentions {name}" for name, sources in intentions(vault.place).items() if _write(consul, name, sources)
    ]
    return changed


def _write_policy(consul: Consul, name: str, rules: str) -> bool:
    known = consul.get(f"/v1/acl/policy/name/{name}")
    if known and known["Rules"] == rules:
        return False
    consul.put(f"/v1/acl/policy/{known['ID']}" if known else "/v1/acl/policy", {"Name": name, "Rules": rules})
    return True


def write_token(consul: Consul, name: str, token: Token, identity: Identity) -> bool:
    """Whether it had to be written. ``name``: its description, by which tokens of one reader are found."""
    wanted = {"Description": name, **identity}
    known = consul.get(f"/v1/acl/token/{token.accessor}")
    if known and all(_plain(known.get(key)) == _plain(value) for key, value in wanted.items()):
        return False
    body = wanted | {"AccessorID": token.accessor, "SecretID": token.secret}
    consul.put(f"/v1/acl/token/{token.accessor}" if known else "/v1/acl/token", body)
    return True


def _plain(value: Any) -> Any:
    """Without the ids that Consul adds."""
    return [{key: each[key] for key in each if key != "ID"} for each in value] if isinstance(value, list) else value


def _write(consul: Consul, name: str, sources: list[dict[str, str]]) -> bool:
    known = consul.get(f"/v1/config/service-intentions/{quote(name)}")
    found = [{"Name": each["Name"], "Action": each["Action"]} for each in known["Sources"]] if known else []
    if sorted(found, key=str) == sorted(sources, key=str):
        return False
    consul.put("/v1/config", {"Kind": "service-intentions", "Name": name, "Sources": sources})
    return True
