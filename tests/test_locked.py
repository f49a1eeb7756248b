"""What the locked overlay and its keeper promise, read from the files and tried on a vault: needs no engine."""

import asyncio
import importlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from demo.locked import locked
from deploy.keeper import vault as vaults
from deploy.keeper.access import grant
from deploy.keeper.api import Consul
from deploy.keeper.grants import (
    AGENT,
    CALLS,
    EDGE,
    FRONT_DOOR,
    SERVERS,
    SERVERS_NAME,
    identities,
    intentions,
    policies,
)
from deploy.keeper.passes import AUDIENCE, ISSUER, sign_pass
from deploy.keeper.vault import Vault
from orchestrator.auth import AuthSettings, RefusedError
from registry import RegistryError, ServiceRegistry
from registry.testing.ports import free_ports
from tools.services import ROOT
from tools.services import SERVICES as TABLE

COMPOSE = ROOT / "deploy/compose"
PLAIN: dict[str, Any] = yaml.safe_load((COMPOSE / "docker-compose.yml").read_text())
TEXT = (COMPOSE / "docker-compose.locked.yml").read_text()
LOCKED: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = LOCKED["services"]
JOBS = {"keeper", "access"}
BESIDE = {"edge-identity"}
OURS = {service.folder: service.name for service in TABLE}


def test_the_table_of_callers_is_what_the_services_call() -> None:
    """A service may read exactly the services that its code names as upstreams."""
    code = {name: set(importlib.import_module(f"{folder}.clients").UPSTREAMS) for folder, name in OURS.items()}
    assert {name: set(callees) for name, callees in CALLS.items()} == code


@pytest.mark.parametrize("name", CALLS)
def test_a_service_has_no_more_rights_than_it_needs(name: str) -> None:
    """It may write itself, read whom it calls and the nodes, and nothing else."""
    rules = policies()[name].splitlines()
    expected = [f'service "{name}" {{ policy = "write" }}']
    expected += [f'service "{callee}" {{ policy = "read" }}' for callee in CALLS[name]]
    assert sorted(rules) == sorted([*expected, 'node_prefix "" { policy = "read" }'])
    assert identities()[name] == {"Policies": [{"Name": name}]}


def test_only_callers_are_let_in() -> None:
    """An intention per service lets in those that call it, and the edge; everybody else is denied.

    The front door calls itself, too: its page asks every instance.
    """
    for name, sources in intentions().items():
        allowed = {source["Name"] for source in sources if source["Action"] == "allow"}
        assert allowed == (
            set()
            if name == "*"
            else {caller for caller, callees in CALLS.items() if name in callees or caller == name == FRONT_DOOR}
            | {EDGE}
        )
    assert intentions()["*"] == [{"Name": "*", "Action": "deny"}]


def test_the_overlay_adds_servers_and_jobs() -> None:
    """It adds servers, jobs and the edge's identity, and every container it adds is as contained as those below it."""
    assert SERVICES.keys() - PLAIN["services"].keys() == {*SERVERS, *JOBS, *BESIDE}
    kept = {key: value for key, value in PLAIN["x-base"].items() if key in LOCKED["x-base"]}
    assert LOCKED["x-base"] == kept
    assert PLAIN["x-base"].keys() - LOCKED["x-base"].keys() == {"environment", "healthcheck"}
    for name in (*SERVERS, *JOBS, *BESIDE):
        service = SERVICES[name]
        assert (service["user"] == "0:0") == (name == "keeper"), name
        assert service.get("cap_add", []) == (["CHOWN", "DAC_OVERRIDE", "FOWNER"] if name == "keeper" else []), name
        assert "ports" not in service
        assert service["restart"] == ("no" if name in JOBS else "unless-stopped")


def test_consul_speaks_no_plain_http() -> None:
    """HTTPS only, certificates checked, gossip and everything else closed to those without a token."""
    for name in ("server", "agent"):
        settings = json.loads((COMPOSE / f"locked/{name}.json").read_text())
        assert settings["ports"]["http"] == settings["ports"]["grpc"] == -1
        assert settings["acl"]["enabled"] is True
        assert settings["acl"]["default_policy"] == "deny"
        assert settings["tls"]["defaults"]["verify_outgoing"] is True
        assert settings["tls"]["internal_rpc"] == {"verify_incoming": True, "verify_server_hostname": True}
        assert "tokens" not in settings["acl"]
        assert "encrypt" not in settings
    assert json.loads((COMPOSE / "locked/server.json").read_text())["default_intention_policy"] == "deny"


def test_a_volume_of_secrets_has_one_reader() -> None:
    """Each is filled by the keeper and mounted, read-only, by one container; the vault only by the jobs."""
    filled = dict(line.split(":")[:2] for line in SERVICES["keeper"]["volumes"])
    readers: dict[str, list[str]] = {}
    for name, service in SERVICES.items():
        for line in service.get("volumes", []) if name != "keeper" else []:
            source, target, *mode = line.split(":")
            if source in filled and source != "agent-data":
                readers.setdefault(source, []).append(name)
                assert mode == ["ro"], f"{name}: {line}"
                assert target == ("/vault" if source == "vault" else "/secrets"), f"{name}: {line}"
    assert readers.pop("vault") == ["access"]
    assert readers.keys() == filled.keys() - {"vault", "agent-data"}
    assert all(len(names) == 1 for names in readers.values())
    for folder, name in OURS.items():
        assert (filled[f"secrets-{folder}"], readers[f"secrets-{folder}"]) == (f"/readers/{name}", [folder])
    assert LOCKED["volumes"].keys() >= filled.keys()


def test_services_are_of_the_mesh() -> None:
    """Each serves mutual TLS by a certificate that the servers sign, for a key that no agent has; so does the edge."""
    for name in (*OURS, *BESIDE):
        environment = SERVICES[name]["environment"]
        assert environment["CONSUL_CONNECT"] == "true", name
        assert environment["CONSUL_GRPC_ADDR"] == f"{SERVERS_NAME}:8503", name
        assert environment["CONSUL_GRPC_CACERT"] == "/secrets/ca.pem", name
        assert "CONSUL_CONNECT_ALLOW_UNSAFE_AGENT" not in environment
    assert all(SERVICES[name]["networks"]["default"]["aliases"] == [SERVERS_NAME] for name in SERVERS)
    assert json.loads((COMPOSE / "locked/server.json").read_text())["ports"]["grpc_tls"] == 8503
    memory = LOCKED["volumes"]["edge-mesh"]["driver_opts"]
    assert (memory["type"], memory["device"]) == ("tmpfs", "tmpfs")
    assert {name for name, service in SERVICES.items() if "edge-mesh:/mesh" in service.get("volumes", [])} == {
        *("edge", "edge-identity")
    }


def test_no_variable_holds_a_secret() -> None:
    """Variables name files, and every one that Compose fills in has the default of the other file."""
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            assert not re.search("(?i)token|password|key", name) or value.startswith("/secrets/"), name
    plain = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", (COMPOSE / "docker-compose.yml").read_text()))
    for name, default in re.findall(r"\$\{?(\w+):-([^}]*)\}", TEXT):
        assert plain[name] == default, name


@pytest.fixture
def vault(tmp_path: Path, consul_binary: Path, monkeypatch: pytest.MonkeyPatch) -> Vault:
    """A vault and its readers; files belong to whoever runs this."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/consul").symlink_to(consul_binary)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(shutil, "chown", lambda path, user, group: None)
    (tmp_path / "readers").mkdir()
    return Vault(tmp_path / "vault", tmp_path / "readers")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_secrets_are_made_once(vault: Vault, tmp_path: Path) -> None:
    """What is there stays; each reader gets its own token, as a file that its user alone may read, and no other's."""
    vault.make()
    assert vault.deliver()
    shown = ["openssl", "x509", "-noout", "-text", "-in", str(vault.folder / f"{SERVERS[0]}.pem")]
    named = subprocess.run(shown, check=True, capture_output=True, text=True).stdout
    assert {f"DNS:{SERVERS[0]}", f"DNS:{SERVERS_NAME}"} <= set(re.findall(r"DNS:[\w-]+", named))
    before = contents(tmp_path)
    vault.make()
    assert vault.deliver() == []
    assert contents(tmp_path) == before
    given = contents(tmp_path / "readers")
    for name in identities():
        holders = {path.split("/")[0] for path, text in given.items() if vault.token(name).secret.encode() in text}
        assert holders == ({AGENT} if name in {"dns", "ui"} else {name})
    for path in (tmp_path / "readers").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o400)
    assert not [path for path, text in given.items() if path.split("/")[1] != "key.pem" and b"PRIVATE KEY" in text]


def test_a_file_that_is_nobodys_any_more_is_taken_back(vault: Vault, tmp_path: Path) -> None:
    """What a reader should not have goes, and a changed secret replaces the old one."""
    vault.make()
    vault.deliver()
    (tmp_path / "readers" / EDGE / "left-over").write_text("x")
    vault.keep(EDGE, vaults.Token.new())
    assert sorted(vault.deliver()) == ["edge/left-over", "edge/token"]
    assert (tmp_path / "readers" / EDGE / "token").read_text() == vault.token(EDGE).secret


def test_a_pass_lets_in(vault: Vault) -> None:
    """A token of the keeper is what orchestrator-api asks for, and names its subject; one of another key is none."""
    vault.make()
    vault.deliver()
    environment = SERVICES["orchestrator"]["environment"]
    assert (environment["AUTH_ISSUER"], environment["AUTH_AUDIENCE"]) == (ISSUER, AUDIENCE)
    jwks = vault.readers / "orchestrator-api" / Path(environment["AUTH_JWKS_FILE"]).name
    door = AuthSettings(jwks_file=jwks, issuer=ISSUER, audience=AUDIENCE).door()
    assert door is not None
    token = sign_pass(vault, "alice")
    assert asyncio.run(door.admit([f"Bearer {token}"])) == "alice"
    vault.callers_key.unlink()
    vault.make()
    with pytest.raises(RefusedError):
        asyncio.run(door.admit([f"Bearer {sign_pass(vault, 'alice')}"]))


def test_the_demo_is_locked(consul_binary: Path) -> None:
    """Its Consul speaks TLS and tells nobody without a token anything; a service does what it needs, and no more."""
    [port] = free_ports(1)
    with locked(port, consul_binary) as lock, lock.open():
        token = (lock.folder / "readers/research-api/token").read_text()
        with (
            lock.registry as reading,
            ServiceRegistry("localhost", port, None, "https", ca_file=lock.vault.trusted) as anybody,
            ServiceRegistry("localhost", port, token, "https", ca_file=lock.vault.trusted) as research,
        ):
            assert "consul" in reading.discover_all_services()
            assert research.deregister_service(research.register_service("research-api", "127.0.0.1", 80))
            for weak in (reading, anybody, research):
                with pytest.raises(RegistryError, match="denied"):
                    weak.register_service("backend-api", "127.0.0.1", 80)
        assert grant(Consul(lock.vault, ["localhost"], port), lock.vault) == []
        folder = lock.folder
    assert not folder.exists()


def test_a_token_shows_no_secret() -> None:
    """Its repr names it, without the secret."""
    token = vaults.Token.new()
    assert token.accessor in repr(token)
    assert token.secret not in repr(token)
