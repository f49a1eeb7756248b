"""What the locked overlay for Kubernetes and its keeper promise: tried on an API server and a Consul, without nodes."""

import asyncio
import json
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from pydantic import SecretStr

from deploy.keeper.access import grant
from deploy.keeper.api import Consul, ConsulError
from deploy.keeper.cluster import VAULT, Cluster, keep
from deploy.keeper.grants import KUBERNETES, identities, policies
from deploy.keeper.passes import AUDIENCE, ISSUER, sign_pass
from deploy.keeper.vault import Vault
from deploy.kubernetes.passes import sign
from deploy.kubernetes.render import HERE, render
from orchestrator.auth import AuthSettings
from registry import ConsulSettings, RegistryError, ServiceRegistry
from registry.testing.ports import free_ports
from tests.support.api_server import ApiServer, ApiServerNotFoundError, running_api_server
from tests.support.command import wait_until
from tests.test_kubernetes import AGENT, NAMES, POSTGRES, SERVERS, Manifests
from tools.services import SERVICES as TABLE

pytestmark = pytest.mark.real
READERS = {*NAMES, AGENT, SERVERS, POSTGRES}


@pytest.fixture(scope="module")
def made() -> Manifests:
    """All objects."""
    return Manifests(list(yaml.safe_load_all(render(HERE / "locked"))))


@pytest.fixture
def consul_on_path(consul_binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper's image has one."""
    monkeypatch.setenv("PATH", str(consul_binary.parent), prepend=":")


@pytest.fixture
def vault(tmp_path: Path, consul_on_path: None) -> Vault:
    """One with everything in it, given out to folders."""
    found = Vault(tmp_path / "vault", tmp_path / "readers", users=False, place=KUBERNETES)
    found.folder.mkdir()
    found.readers.mkdir()
    found.make()
    found.deliver()
    return found


def test_each_reads_its_own_secret_only(made: Manifests) -> None:
    """Every workload mounts one Secret, its own, read-only and for its user alone; the manifests hold none."""
    for name in made.workloads():
        [volume] = [each for each in made.pod(name)["volumes"] if "secret" in each]
        assert volume["secret"] == {"secretName": f"secrets-{name}", "defaultMode": 0o440}
        assert made.pod(name)["securityContext"]["fsGroup"] == made.pod(name)["securityContext"]["runAsGroup"]
        [mount] = [each for each in made.container(name)["volumeMounts"] if each["name"] == volume["name"]]
        assert mount["readOnly"] is True
    assert made.workloads().keys() == READERS
    assert made.of("Secret") == {}


def test_the_keeper_gives_what_is_mounted(made: Manifests, vault: Vault) -> None:
    """It fills a Secret for each workload, with every file that the workload is told to read, and none for another."""
    given = {folder.name: {path.name for path in folder.iterdir()} for folder in vault.readers.iterdir()}
    assert given.keys() == READERS
    for name in READERS:
        told = [value for value in made.variables(name).values() if str(value).startswith("/secrets/")]
        told += [word.partition("=")[2] for word in made.container(name).get("command", []) if "=/secrets/" in word]
        assert {Path(path).name for path in told} <= given[name]
    assert all(path.startswith("/secrets/") for path in tls("server").values())
    assert {Path(path).name for path in tls("server").values()} <= given[SERVERS] & given[AGENT]


def tls(name: str) -> dict[str, str]:
    """The files of one of Consul's configurations."""
    defaults = json.loads((HERE / f"locked/{name}.json").read_text())["tls"]["defaults"]
    return {key: value for key, value in defaults.items() if key.endswith("_file")}


def test_services_speak_mutual_tls(made: Manifests, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the front door, which an Ingress controller calls without a certificate: it asks callers for a token."""
    for name in NAMES:
        variables = made.variables(name)
        front = name == "orchestrator-api"
        assert variables["CONSUL_CONNECT"] == ("client" if front else "true")
        assert ("AUTH_JWKS_FILE" in variables) == front
        assert variables["CONSUL_GRPC_ADDR"] == f"{KUBERNETES.servers_names[0]}:8503"
        assert variables["CONSUL_TLS_SERVER_NAME"] == KUBERNETES.agent_host
        assert made.container(name)["readinessProbe"]["httpGet"].get("scheme") == ("HTTP" if front else "HTTPS")
    assert {"name": "grpc", "containerPort": 8503} in made.container(SERVERS)["ports"]
    for name, value in {"CONSUL_HTTP_SSL": "true", "CONSUL_HOST": "10.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert ConsulSettings().scheme == "https"


def test_only_the_keeper_has_an_account(made: Manifests) -> None:
    """Its Job runs as contained as everybody else, and its role knows Secrets only."""
    pod = made.of("Job")["keeper"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["securityContext"] == made.container(NAMES[0])["securityContext"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["serviceAccountName"] == "keeper"
    assert made.of("Role")["keeper"]["rules"] == [
        {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get", "create", "update"]}
    ]


def test_the_keeper_reaches_servers_and_nobody_else_does(made: Manifests) -> None:
    """It writes the rules over HTTPS; services get signatures only."""
    keeper = {"app.kubernetes.io/name": "keeper"}
    assert made.may_reach(keeper, SERVERS, 8500)
    for name in NAMES:
        assert made.may_reach(made.labels(name), SERVERS, 8503)
        assert not made.may_reach(made.labels(name), SERVERS, 8500)
        assert name == "orchestrator-api" or not made.may_reach(keeper, name, made.port(name))


def test_names_are_those_of_the_manifests(made: Manifests) -> None:
    """The keeper's nodes are the servers' pods, and its names are Services and workloads."""
    servers = made.of("StatefulSet")[SERVERS]["spec"]
    assert KUBERNETES.nodes == tuple(f"{SERVERS}-{number}" for number in range(servers["replicas"]))
    assert KUBERNETES.servers_names == (servers["serviceName"], KUBERNETES.agent_host)
    assert {*KUBERNETES.servers, KUBERNETES.agent} == {SERVERS, AGENT}
    assert "dns" not in policies(KUBERNETES), "nobody asks by DNS"
    assert [each["NodeName"] for each in identities(KUBERNETES)[SERVERS]["NodeIdentities"]] == list(KUBERNETES.nodes)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server with the namespace, the keeper's account and its role."""
    try:
        with running_api_server(tmp_path_factory.mktemp("api-server")) as started:
            for file in ("base/namespace.yaml", "locked/keeper.yaml"):
                done = started.ask("apply", "--namespace=registry", "-f", str(HERE / file))
                assert done.returncode == 0, done.stderr
            yield started
    except ApiServerNotFoundError as error:
        pytest.skip(f"{error}, which `nox -s k8s` would have made")


def as_account(server: ApiServer, name: str) -> Cluster:
    """The cluster, for a pod with this account."""
    token = server.ask("create", "token", "--namespace=registry", name).stdout
    trust = ssl.create_default_context(cafile=str(server.home / "certificates/apiserver.crt"))
    return Cluster("127.0.0.1", server.port, token, "registry", trust)


def test_secrets_are_made_once(server: ApiServer, consul_on_path: None, tmp_path: Path) -> None:
    """The keeper makes them with its account's rights; another run, in an empty pod, finds all and changes nothing."""
    cluster = as_account(server, "keeper")
    expected = {VAULT, *(f"secrets-{name}" for name in READERS)}
    for run, changed in enumerate((expected, set())):
        folder = tmp_path / str(run)
        folder.mkdir()
        vault = Vault(folder / "vault", folder / "readers", users=False, place=KUBERNETES)
        assert set(keep(cluster, vault)) == changed
    held = cluster.read("secrets-research-api")
    assert held == {"ca.pem": vault.trusted.read_bytes(), "token": vault.token("research-api").secret.encode()}
    signed = sign(server.ask("get", "secret", VAULT, "--namespace=registry", "--output=json").stdout, "alice")
    keys = tmp_path / "callers.json"
    keys.write_bytes(vault.callers())
    door = AuthSettings(jwks_file=keys, issuer=ISSUER, audience=AUDIENCE).door()
    assert door is not None
    assert asyncio.run(door.admit([f"Bearer {signed}"])) == "alice"


def test_another_account_reads_no_secret(server: ApiServer) -> None:
    """Whoever else has an account in the namespace is refused."""
    assert server.ask("create", "serviceaccount", "--namespace=registry", "other").returncode == 0
    with pytest.raises(ConsulError, match="403"):
        as_account(server, "other").read(VAULT)


@contextmanager
def consul(binary: Path, folder: Path, name: str, readers: Path, **changed: Any) -> Iterator[dict[str, int]]:
    """An agent with one of the configurations, on loopback, with the secrets of its reader; gives its ports."""
    reader = readers / (SERVERS if name == "server" else AGENT)
    settings = json.loads((HERE / f"locked/{name}.json").read_text().replace("/secrets/", f"{reader}/"))
    names = ["https", "grpc_tls", "server", "serf_lan"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    if name == "agent":
        ports["grpc_tls"] = -1
    data = folder / f"{name}-data"
    more = {"data_dir": str(data), "bind_addr": "127.0.0.1", "ports": settings["ports"] | ports, **changed}
    config = folder / f"{name}.json"
    config.write_text(json.dumps(settings | more))
    command = [str(binary), "agent", f"-config-file={config}", f"-config-file={reader / 'secrets.json'}"]
    with ExitStack() as stack:
        log = stack.enter_context((folder / f"{name}.log").open("wb"))
        process = stack.enter_context(subprocess.Popen(command, stdout=log, stderr=log))
        stack.callback(process.kill)
        yield ports


@contextmanager
def service(made: Manifests, name: str, readers: Path, **settings: str) -> Iterator[str]:
    """One of the services with the variables of the manifests, on loopback; gives its address once it is ready."""
    folder = next(each.folder for each in TABLE if each.name == name)
    variables = {key: str(value) for key, value in made.variables(name).items()}
    variables = {key: value.replace("/secrets/", f"{readers / name}/") for key, value in variables.items()}
    [port] = free_ports(1)
    variables |= {"SERVICE_PORT": str(port), "SERVICE_ADDRESS": "127.0.0.1", "SERVICE_ZONE": "", **settings}
    command = [sys.executable, "-m", "uvicorn", f"{folder}.main:app", "--port", str(port), "--log-level", "warning"]
    probe = made.container(name)["readinessProbe"]["httpGet"]
    address = f"{probe['scheme'].lower()}://127.0.0.1:{port}"
    with subprocess.Popen(command, env=os.environ | variables) as process:
        try:
            wait_until(lambda: succeeds(f"{address}{probe['path']}"), 60)
            yield address
        finally:
            process.terminate()


def succeeds(url: str, caller: Mapping[str, str] | None = None) -> bool:
    """Whether it answers so, whoever it says that it is; not while nobody listens there."""
    with suppress(httpx.TransportError):
        return httpx.get(url, headers=caller, verify=False, trust_env=False, timeout=10).is_success
    return False


def test_the_locked_system_runs(made: Manifests, vault: Vault, tmp_path: Path, consul_binary: Path) -> None:
    """Consul's configurations, the keeper's secrets and the services' variables fit each other.

    A server and an agent trust each other, rules are written once, services become ready as kubelets ask, and the front
    door, which serves without TLS, calls one over mutual TLS for whoever has a token of callers, and for nobody else.
    """
    node = KUBERNETES.nodes[0]
    with ExitStack() as stack:
        alone = {"bootstrap_expect": 1, "retry_join": [], "node_name": node}
        at = stack.enter_context(consul(consul_binary, tmp_path, "server", vault.readers, **alone))
        rules = Consul(vault, ["localhost"], at["https"])
        rules.wait_until_led()
        assert grant(rules, vault) != []
        assert grant(rules, vault) == []
        beside = {"retry_join": [f"127.0.0.1:{at['serf_lan']}"], "node_name": "any-node"}
        local = stack.enter_context(consul(consul_binary, tmp_path, "agent", vault.readers, **beside))
        ports = {
            "CONSUL_HOST": "127.0.0.1",
            "CONSUL_PORT": str(local["https"]),
            "CONSUL_GRPC_ADDR": f"localhost:{at['grpc_tls']}",
        }
        research = stack.enter_context(service(made, "research-api", vault.readers, **ports))
        door = stack.enter_context(service(made, "orchestrator-api", vault.readers, **ports))
        # The agent's token, for a node that no keeper knew, has written it into the catalog.
        rules.wait_until(
            lambda: [each["Node"] for each in rules.get("/v1/catalog/service/research-api")] == ["any-node"],
            "the service is in the catalog",
        )
        with pytest.raises(httpx.TransportError):
            httpx.get(research.replace("https", "http"), trust_env=False)
        asked = f"{door}/api/health/research-api"
        assert httpx.get(asked, trust_env=False).status_code == 401
        caller = {"Authorization": f"Bearer {sign_pass(vault, 'alice')}"}
        wait_until(lambda: succeeds(asked, caller), 60)
        with stranger(vault, "backend-api", local["https"]) as registry, pytest.raises(RegistryError):
            registry.register_service("research-api", "127.0.0.1", 8009)
        assert forget(made, vault.readers / AGENT, at["https"], "any-node") == "true"
        assert "Permission denied" in forget(made, vault.readers / "research-api", at["https"], "any-node")


def forget(made: Manifests, reader: Path, port: int, node: str) -> str:
    """What a server says to an agent that makes it forget what its node was before, with the secrets of a reader."""
    pod = made.pod(AGENT)
    [container] = [each for each in pod["initContainers"] if each["name"] == "forget"]
    command = [word.replace("/secrets/", f"{reader}/") for word in container["command"]]
    command = [word.replace("//consul-server:8500", f"//localhost:{port}") for word in command]
    variables = os.environ | {"NODE_NAME": node, "no_proxy": "localhost"}
    return subprocess.run(command, env=variables, check=True, capture_output=True, text=True, timeout=20).stdout.strip()


def stranger(vault: Vault, name: str, port: int) -> ServiceRegistry:
    """The agent, asked with the token of this service."""
    return ServiceRegistry(
        settings=ConsulSettings(
            scheme="https",
            host="127.0.0.1",
            port=port,
            token=SecretStr(vault.token(name).secret),
            ca_file=vault.trusted,
            tls_server_name=KUBERNETES.agent_host,
        )
    )
