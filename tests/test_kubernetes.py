"""What the manifests for Kubernetes promise, read from what kustomize makes of them: needs no cluster."""

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from deploy.kubernetes.render import HERE, OVERLAYS, render
from registry import ConsulSettings, ServiceSettings
from tests.pages import Block, blocks
from tests.test_docs_tables import documented_variables
from tools.kubernetes_schemas import SCHEMAS
from tools.services import ROOT, SERVICES

pytestmark = pytest.mark.real
NAMES = tuple(service.name for service in SERVICES)
KNOWN: dict[str, Any] = json.loads(SCHEMAS.read_text())
PAGE = blocks((ROOT / "docs/howto/kubernetes.md").read_text())
SERVERS, AGENT, POSTGRES = "consul-server", "consul-agent", "postgres"
STRANGER = {"app.kubernetes.io/name": "stranger"}
WITHDRAWING, CLOSING = 2.0, 2.0
"""Seconds that leaving Consul and closing may take at most; see docs/adr/0003-presence-and-drain.md."""


class Manifests:
    """All objects of an overlay."""

    def __init__(self, objects: list[dict[str, Any]]) -> None:
        self.objects = objects

    def of(self, kind: str) -> dict[str, dict[str, Any]]:
        """Name → object, of one kind."""
        return {found["metadata"]["name"]: found for found in self.objects if found["kind"] == kind}

    def workloads(self) -> dict[str, dict[str, Any]]:
        """Name → what makes pods."""
        return {
            name: each for kind in ("Deployment", "StatefulSet", "DaemonSet") for name, each in self.of(kind).items()
        }

    def pod(self, name: str) -> dict[str, Any]:
        """The pod's spec of one of them."""
        found: dict[str, Any] = self.workloads()[name]["spec"]["template"]["spec"]
        return found

    def labels(self, name: str) -> dict[str, str]:
        """Those of its pods."""
        found: dict[str, str] = self.workloads()[name]["spec"]["template"]["metadata"]["labels"]
        return found

    def container(self, name: str) -> dict[str, Any]:
        """Its only container."""
        [found] = self.pod(name)["containers"]
        assert isinstance(found, dict)
        return found

    def containers(self, name: str) -> list[dict[str, Any]]:
        """That one, and those that run before it."""
        return [*self.pod(name).get("initContainers", []), self.container(name)]

    def variables(self, name: str) -> dict[str, Any]:
        """Variable → its value, or the field of the pod that it comes from."""
        return {
            each["name"]: each["value"] if "value" in each else each["valueFrom"]["fieldRef"]["fieldPath"]
            for each in self.container(name).get("env", [])
        }

    def port(self, name: str) -> int:
        """The one that its container calls http, or else its only one."""
        [found] = self.container(name)["ports"]
        return int(found["containerPort"])

    def may_reach(self, source: dict[str, str], target: str, port: int, protocol: str = "TCP") -> bool:
        """Whether the policies let pods of this namespace with these labels reach a workload's port."""
        rules = [
            rule
            for policy in self.of("NetworkPolicy").values()
            if selects(policy["spec"]["podSelector"], self.labels(target))
            for rule in policy["spec"].get("ingress", [])
        ]
        named = {each.get("name"): each["containerPort"] for each in self.container(target)["ports"]}
        return any(
            ("from" not in rule or any(selects(each["podSelector"], source) for each in rule["from"]))
            and any(
                (named.get(each["port"], each["port"]), each.get("protocol", "TCP")) == (port, protocol)
                for each in rule["ports"]
            )
            for rule in rules
        )


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether pods with these labels are meant."""
    assert selector.keys() <= {"matchLabels"}
    meant: dict[str, str] = selector.get("matchLabels", {})
    return meant.items() <= labels.items()


def problems(document: dict[str, Any]) -> list[str]:
    """What Kubernetes' schema of its kind says against an object."""
    kind = KNOWN["kinds"][f"{document['apiVersion']} {document['kind']}"]
    validator = jsonschema_rs.Draft7Validator(kind | {"definitions": KNOWN["definitions"]})
    return [error.message for error in validator.iter_errors(document)]


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    """The name of its folder."""
    return str(request.param)


@pytest.fixture(scope="module")
def text(overlay: str) -> str:
    """What `kubectl apply -k` would apply; kustomize is built once, in half a minute."""
    return render(HERE / overlay)


@pytest.fixture(scope="module")
def made(text: str) -> Manifests:
    """The same, as objects."""
    return Manifests(list(yaml.safe_load_all(text)))


def own(made: Manifests) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Each of the repository's services: its name, its pod's spec, and its container."""
    for name in NAMES:
        yield name, made.pod(name), made.container(name)


def test_kubernetes_knows_every_field(made: Manifests) -> None:
    """No object has a kind, a field or a type of value that Kubernetes does not know."""
    assert {each["metadata"]["name"]: problems(each) for each in made.objects if problems(each)} == {}
    assert len(made.objects) > 20


def test_mistakes_are_seen(made: Manifests) -> None:
    """The schemas refuse a field that is not there, a value of another type, and one that is missing."""
    deployment = made.of("Deployment")[NAMES[0]]
    spec = deployment["spec"]
    for mistaken in (
        spec | {"replica": 3},
        spec | {"replicas": "3"},
        {key: value for key, value in spec.items() if key != "selector"},
    ):
        assert len(problems(deployment | {"spec": mistaken})) == 1


def test_kubectl_makes_the_same(overlay: str, text: str) -> None:
    """The kustomize in kubectl, which a user has, makes the same objects as the one by which they are checked here."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("there is no kubectl")
    version = json.loads(subprocess.check_output([kubectl, "version", "--client", "--output=json"]))
    if not version.get("kustomizeVersion", "").startswith("v5."):
        pytest.skip("this kubectl has a kustomize older than 5")
    assert subprocess.check_output([kubectl, "kustomize", HERE / overlay], text=True) == text


def test_the_workloads_are_the_ones_meant(made: Manifests) -> None:
    """There are Consul, Postgres and exactly the services of this repository, all in the namespace."""
    assert made.of("Deployment").keys() == set(NAMES)
    assert made.of("StatefulSet").keys() == {SERVERS, POSTGRES}
    assert made.of("DaemonSet").keys() == {AGENT}
    assert {each["metadata"].get("namespace") for each in made.objects if each["kind"] != "Namespace"} == {"registry"}
    assert made.of("Namespace").keys() == {"registry"}


def test_a_service_runs_its_image_on_its_port(made: Manifests) -> None:
    """Image and port are those of Compose, and two replicas or more carry it."""
    for service in SERVICES:
        assert made.container(service.name)["image"] == f"registry/{service.folder}:latest"
        assert made.port(service.name) == service.port
        assert made.workloads()[service.name]["spec"]["replicas"] >= 2


def test_images_are_those_of_compose(made: Manifests) -> None:
    """Consul and Postgres have the same versions as in containers."""
    named = dict(re.findall(r"^(\w+_IMAGE)=(.*)$", (ROOT / ".env").read_text(), re.MULTILINE))
    consul, postgres = named["CONSUL_IMAGE"], named["POSTGRES_IMAGE"]
    for name, image in {SERVERS: consul, AGENT: consul, POSTGRES: postgres}.items():
        assert {container["image"] for container in made.containers(name)} == {image}


def test_a_pod_has_no_more_rights_than_it_needs(made: Manifests) -> None:
    """Every pod is non-root, on a read-only root, without capabilities or account; only agents have a node's port."""
    for name in made.workloads():
        pod = made.pod(name)
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in made.containers(name):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
        assert pod["automountServiceAccountToken"] is False
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"}
        assert not [volume for volume in pod["volumes"] if "hostPath" in volume]
        assert any("hostPort" in port for port in made.container(name)["ports"]) == (name == AGENT)


def test_nothing_that_kubernetes_sets_reaches_a_pod(made: Manifests) -> None:
    """No pod gets variables of Services, such as CONSUL_PORT=tcp://…, which look like settings."""
    assert {made.pod(name)["enableServiceLinks"] for name in made.workloads()} == {False}


def test_a_pod_has_bounds(made: Manifests) -> None:
    """Every pod says what it needs, and has a limit on memory and on what it writes beside its volumes."""
    for name in made.workloads():
        for resources in (container["resources"] for container in made.containers(name)):
            assert resources["requests"].keys() == {"cpu", "memory"}
            assert resources["limits"].keys() == {"memory"}, "a limit on CPU would stall what could run"
        assert all("sizeLimit" in each["emptyDir"] for each in made.pod(name)["volumes"] if "emptyDir" in each)


def test_every_pod_is_probed(made: Manifests) -> None:
    """A pod gets traffic once it is ready and is restarted when it hangs; a service that lacks its database is not."""
    for name in made.workloads():
        container = made.container(name)
        assert {"readinessProbe", "livenessProbe"} <= container.keys()
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["timeoutSeconds"] >= 2, "a busy node is slow, not dead"
    for _, _, container in own(made):
        settings = ServiceSettings.model_fields
        ready = container["readinessProbe"]["httpGet"]
        assert (ready["path"], ready["port"]) == (settings["health_check_path"].default, "http")
        assert container["livenessProbe"]["tcpSocket"] == container["startupProbe"]["tcpSocket"] == {"port": "http"}


def test_few_pods_go_at_a_time(made: Manifests) -> None:
    """A drain or a rollout takes one pod of a workload at a time, and its replacement is ready first."""
    budgets = made.of("PodDisruptionBudget")
    assert budgets.keys() == {SERVERS, *NAMES}
    for name, budget in budgets.items():
        assert budget["spec"]["maxUnavailable"] == 1
        meant = [other for other in made.workloads() if selects(budget["spec"]["selector"], made.labels(other))]
        assert meant == [name]
    for name in NAMES:
        spec = made.workloads()[name]["spec"]
        assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
        assert spec["minReadySeconds"] > 0
    assert made.workloads()[AGENT]["spec"]["minReadySeconds"] > 0


def test_replicas_are_spread(made: Manifests) -> None:
    """Replicas of one rollout are on different nodes, as far as there are some; Consul's servers always are."""
    for name, pod, _ in own(made):
        [constraint] = pod["topologySpreadConstraints"]
        assert selects(constraint["labelSelector"], made.labels(name))
        assert constraint["matchLabelKeys"] == ["pod-template-hash"]
        assert (constraint["topologyKey"], constraint["maxSkew"]) == ("kubernetes.io/hostname", 1)
        assert constraint["whenUnsatisfiable"] == "ScheduleAnyway"
    [term] = made.pod(SERVERS)["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    assert selects(term["labelSelector"], made.labels(SERVERS))


def test_a_pod_has_the_time_to_drain(made: Manifests) -> None:
    """Kubernetes waits longer than withdrawing, draining, calls under way and closing take together."""
    dockerfile = (ROOT / "deploy/compose/Dockerfile").read_text()
    calls = float(re.findall(r"UVICORN_TIMEOUT_GRACEFUL_SHUTDOWN=(\d+)", dockerfile)[0])
    for name, pod, _ in own(made):
        drain = float(made.variables(name)["SERVICE_DRAIN_SECONDS"])
        assert drain >= 5, "an Ingress hears later than Consul's watchers that a pod is going"
        assert pod["terminationGracePeriodSeconds"] > WITHDRAWING + drain + calls + CLOSING


def test_a_pod_registers_its_own_address_with_the_agent_of_its_node(made: Manifests) -> None:
    """A service asks its node's agent, whose port is the node's, and registers the address of its pod."""
    for name in NAMES:
        variables = made.variables(name)
        assert variables["SERVICE_ADDRESS"] == "status.podIP"
        assert variables["CONSUL_HOST"] == "status.hostIP"
        assert not {"CONSUL_PORT", "CONSUL_HTTP_ADDR"} & variables.keys()
        assert variables["SERVICE_ZONE"] == "metadata.labels['topology.kubernetes.io/zone']"
    [port] = made.container(AGENT)["ports"]
    assert port["hostPort"] == port["containerPort"] == ConsulSettings.model_fields["port"].default
    assert made.pod(AGENT)["tolerations"] == [{"operator": "Exists"}], "on every node"


def test_every_variable_is_one_that_a_service_reads(made: Manifests) -> None:
    """The table of variables has each that a service is given; its password is told elsewhere."""
    told_elsewhere = {"DATABASE_PASSWORD_FILE"}
    for name in NAMES:
        told = documented_variables().keys() | told_elsewhere
        assert [key for key in made.variables(name) if key not in told and not key.startswith("AUTH_")] == []


def test_consul_has_three_servers_that_keep_their_data(made: Manifests) -> None:
    """As many servers as they expect, each on a volume of its own, each known to the others by name."""
    servers = made.of("StatefulSet")[SERVERS]["spec"]
    settings = json.loads((HERE / "base/server.json").read_text())
    assert servers["replicas"] == settings["bootstrap_expect"] == 3
    assert settings["retry_join"] == [f"{SERVERS}-{number}.{servers['serviceName']}" for number in range(3)]
    assert servers["podManagementPolicy"] == "Parallel"
    [claim] = servers["volumeClaimTemplates"]
    mounts = {each["name"]: each["mountPath"] for each in made.container(SERVERS)["volumeMounts"]}
    assert mounts[claim["metadata"]["name"]] == settings["data_dir"]
    service = made.of("Service")[servers["serviceName"]]["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"] is True
    assert selects({"matchLabels": service["selector"]}, made.labels(SERVERS))
    assert json.loads((HERE / "base/agent.json").read_text())["retry_join"] == [servers["serviceName"]]


@pytest.mark.parametrize("name", ["server", "agent"])
def test_consul_accepts_its_configuration(name: str, consul_binary: Path, tmp_path: Path) -> None:
    """Consul itself finds nothing to say against either file."""
    address = tmp_path / "address.json"  # which pods give as an option
    address.write_text('{"bind_addr": "127.0.0.1"}')
    command = [str(consul_binary), "validate", str(HERE / f"base/{name}.json"), str(address)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "Configuration is valid!"), done.stderr


def test_a_changed_configuration_is_rolled_out(made: Manifests) -> None:
    """Pods name the configuration that they read by its content, so that a change starts new ones."""
    for name in (SERVERS, AGENT):
        [config] = [volume["configMap"]["name"] for volume in made.pod(name)["volumes"] if "configMap" in volume]
        assert re.fullmatch(rf"{name}-[a-z0-9]{{10}}", config)
        [file] = made.of("ConfigMap")[config]["data"]
        assert f"-config-file=/consul/config/{file}" in made.container(name)["command"]


def test_the_ingress_leads_to_the_front_door_only(made: Manifests) -> None:
    """Strangers reach the API of orchestrator-api and nothing else; no Service has a port of the nodes."""
    [ingress] = made.of("Ingress").values()
    [rule] = ingress["spec"]["rules"]
    [path] = rule["http"]["paths"]
    assert (path["path"], path["pathType"]) == ("/api", "Prefix")
    service = made.of("Service")[path["backend"]["service"]["name"]]["spec"]
    assert service["selector"].items() <= made.labels("orchestrator-api").items()
    assert [port["name"] for port in service["ports"]] == [path["backend"]["service"]["port"]["name"]]
    assert {each["spec"].get("type", "ClusterIP") for each in made.of("Service").values()} == {"ClusterIP"}


def test_who_may_reach_whom(made: Manifests) -> None:
    """Services reach each other and the agents; only backend-api the database; strangers the front door alone."""
    http = {name: made.port(name) for name in NAMES}
    services = [made.labels(name) for name in NAMES]
    for name, port in http.items():
        assert all(made.may_reach(source, name, port) for source in [*services, made.labels(AGENT)])
        assert made.may_reach(STRANGER, name, port) == (name == "orchestrator-api")
        assert not made.may_reach(services[0], name, 22)
    assert all(made.may_reach(source, AGENT, 8500) for source in services)
    assert not made.may_reach(STRANGER, AGENT, 8500)
    for target in (SERVERS, AGENT):
        for source in (made.labels(SERVERS), made.labels(AGENT)):
            assert all(made.may_reach(source, target, 8301, protocol) for protocol in ("TCP", "UDP"))
        assert not [source for source in [*services, STRANGER] if made.may_reach(source, target, 8301)]
    assert made.may_reach(made.labels(AGENT), SERVERS, 8300)
    assert not made.may_reach(services[0], SERVERS, 8500)
    readers = [name for name in made.workloads() if made.may_reach(made.labels(name), POSTGRES, 5432)]
    assert readers == ["backend-api"]


def test_every_pod_is_closed_by_default(made: Manifests) -> None:
    """One policy selects all pods and lets nobody in."""
    assert made.of("NetworkPolicy")["nobody"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}


def test_the_password_is_in_a_file(made: Manifests) -> None:
    """Who needs the database's password gets it as a file from a Secret, and nobody as a variable."""
    for name, variable in {"backend-api": "DATABASE_PASSWORD_FILE", POSTGRES: "POSTGRES_PASSWORD_FILE"}.items():
        mounts = {each["mountPath"]: each["name"] for each in made.container(name)["volumeMounts"]}
        volume = mounts[str(Path(made.variables(name)[variable]).parent)]
        assert [each for each in made.pod(name)["volumes"] if each["name"] == volume and "secret" in each]
    for name in made.workloads():
        assert not [key for key in made.variables(name) if "PASSWORD" in key and not key.endswith("_FILE")]


def test_plain_has_one_secret() -> None:
    """The database's password, in the pods of the two that need it."""
    plain = Manifests(list(yaml.safe_load_all(render(HERE / "plain"))))
    [secret] = plain.of("Secret")
    for name in plain.workloads():
        found = [each["secret"]["secretName"] for each in plain.pod(name)["volumes"] if "secret" in each]
        assert found == ([secret] if name in {"backend-api", POSTGRES} else [])


@pytest.mark.parametrize("block", [block for block in PAGE if block.language == "yaml"], ids=["images", "postgres"])
def test_an_overlay_of_the_page_works(block: Block, tmp_path: Path) -> None:
    """A reader's own overlay, beside this repository, changes what the page says, and nothing breaks."""
    (tmp_path / "registry").symlink_to(ROOT)
    own = tmp_path / "own"
    own.mkdir()
    (own / block.options.removeprefix("file=")).write_text(block.code)
    (own / "password").write_text("secret")
    made = Manifests(list(yaml.safe_load_all(render(own))))
    assert [problem for each in made.objects for problem in problems(each)] == []
    if images := yaml.safe_load(block.code).get("images"):
        found = {made.container(name)["image"].partition(":")[0] for name in NAMES}
        assert found >= {each["newName"] for each in images}
        assert not found & {each["name"] for each in images}
    else:
        assert made.of("StatefulSet").keys() == {SERVERS}
        assert made.variables("backend-api")["DATABASE_URL"] == "postgresql://cards@postgres.example.com/cards"
        [secret] = made.of("Secret").values()
        assert secret["data"] == {"password": base64.b64encode(b"secret").decode()}
        [volume] = [each["secret"] for each in made.pod("backend-api")["volumes"] if "secret" in each]
        assert volume["secretName"] == secret["metadata"]["name"]
        assert len(made.container("backend-api")["env"]) == len(made.variables("backend-api")), "no variable twice"


def test_the_page_names_what_is_there(made: Manifests) -> None:
    """Every object that a command of the page names exists, in the namespace that it names."""
    lines = [line for block in PAGE if block.options == "cluster" for line in block.code.splitlines()]
    assert lines
    for line in lines:
        assert line.startswith(("kubectl apply -k .", "kubectl --namespace registry ", "token=$(python3 -m deploy."))
        for kind, name in re.findall(r" (deployment|service|pod)/([\w-]+)", line):
            pods = {f"{each}-0" for each in made.of("StatefulSet")}
            assert name in {"deployment": made.of("Deployment"), "service": made.of("Service"), "pod": pods}[kind]
