"""The system on three nodes, as its scenes see it: who runs where, whom Consul lists, and everything whole again."""

import json
import subprocess
from contextlib import suppress
from functools import partial
from typing import Any

from tests.e2e.system import wait_until
from tools.kube.cluster import Cluster
from tools.kube.place import NODES, KubeError
from tools.services import SERVICES, Service

BACKEND = next(service for service in SERVICES if service.folder == "backend")
BACKENDS = 3
"""So many stand before every scene, one on each node."""
SERVERS = 3
"""Of Consul."""
_SECONDS = 180.0


class System:
    """What scenes ask, and do."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def passing(self, service: Service = BACKEND) -> set[str]:
        """The ids that Consul says are passing; none while it can't be asked."""
        with suppress(KubeError):
            return set(self.zones(service))
        return set()

    def zones(self, service: Service = BACKEND) -> dict[str, str | None]:
        """The instances that are passing, each with the zone that it is registered with. Raises: KubeError."""
        entries = self._consul(f"/v1/health/service/{service.name}?passing")
        return {str(entry["Service"]["ID"]): entry["Service"]["Meta"].get("zone") for entry in entries}

    def leader(self) -> dict[str, Any]:
        """The pod of the server that leads. Raises: KubeError; StopIteration while none does."""
        address = str(self._consul("/v1/status/leader")).partition(":")[0]
        return next(pod for pod in self.cluster.pods("consul-server") if address_of(pod) == address)

    def led_again(self, address: str) -> bool:
        """Whether a server leads that is not at this address: another one, or the same one in a new pod."""
        with suppress(KubeError, StopIteration):
            return address_of(self.leader()) != address
        return False

    def instances(self, service: Service = BACKEND) -> set[str]:
        """The ids under which the pods must be registered: their own addresses, nothing else."""
        return {instance_of(pod, service) for pod in self.cluster.pods(service.name)}

    def everyone_passes(self, service: Service = BACKEND, count: int | None = None) -> bool:
        """Whether every pod passes in Consul and nobody else does, and there are so many."""
        passing = self.passing(service)
        return bool(passing) and passing == self.instances(service) and count in (None, len(passing))

    def wait_until_everyone_passes(self, count: int) -> float:
        """Of backend-api; returns how many seconds that took."""
        return wait_until(
            lambda: self.everyone_passes(count=count),
            _SECONDS,
            f"{count} backends pass, and nobody else",
            lambda: f"pods: {self.instances()}, passing: {self.passing()}",
        )

    def agents_are_ready(self) -> bool:
        """Whether every node has an agent of Consul that is."""
        status = self.cluster.get("daemonset/consul-agent")["status"]
        return bool(status["numberReady"] == len(NODES))

    def wait_for_servers(self) -> float:
        """Returns when all servers of Consul are ready, with the seconds that took."""

        def ready() -> bool:
            with suppress(KubeError):
                status = self.cluster.get("statefulset/consul-server")["status"]
                return bool(status.get("readyReplicas") == SERVERS)
            return False

        return wait_until(ready, _SECONDS, "all servers are ready")

    def backend_on(self, node: int) -> dict[str, Any]:
        """One that runs on this node. Raises: StopIteration."""
        return next(pod for pod in self.cluster.pods(BACKEND.name) if pod["spec"]["nodeName"] == f"node{node}")

    def settle(self) -> None:
        """Undoes what a scene left: everything runs, one backend on each node, and no card is kept."""
        cluster = self.cluster
        for node in set(NODES) - cluster.running_nodes():
            cluster.start(node)
        wait_until(lambda: cluster.ready_nodes() == set(NODES), _SECONDS, "all nodes are ready")
        cluster.kubectl("uncordon", *(f"node{node}" for node in NODES))
        cluster.kubectl("scale", f"deployment/{BACKEND.name}", f"--replicas={BACKENDS}")
        cluster.wait_until_rolled_out()
        if {pod["spec"]["nodeName"] for pod in cluster.pods(BACKEND.name)} != {f"node{node}" for node in NODES}:
            self.roll()
        self.wait_until_everyone_passes(BACKENDS)
        for service in SERVICES:
            wait_until(partial(self.everyone_passes, service), _SECONDS, f"{service.name} passes")
        self.query("truncate cards")

    def roll(self) -> None:
        """Restarts the backends, and returns when all of them are new. Raises: KubeError."""
        deployment = f"deployment/{BACKEND.name}"
        self.cluster.kubectl("rollout", "restart", deployment)
        self.cluster.kubectl("rollout", "status", deployment, f"--timeout={_SECONDS:.0f}s")

    def cards(self) -> dict[str, int]:
        """Title, without its spaces → how many cards in the database carry it."""
        said = self.query("select replace(title, ' ', '') || E'\\t' || count(*) from cards group by title")
        rows = (line.split("\t") for line in said.splitlines())
        return {title: int(count) for title, count in rows}

    def query(self, statement: str) -> str:
        """What Postgres says to this. Raises: KubeError."""
        psql = ["psql", "-h", "127.0.0.1", "-U", "registry", "-At", "-c", statement]
        password = 'export PGPASSWORD=$(cat "$POSTGRES_PASSWORD_FILE"); exec "$@"'
        return self.cluster.kubectl("exec", "postgres-0", "--", "sh", "-c", password, "sh", *psql)

    def calling(self, rate: float, zone: str | None) -> list[str]:
        """The command that runs the load in the pod that calls by name."""
        caller = ["python", "-m", "tests.e2e.caller", "--rate", f"{rate}", *(["--zone", zone] if zone else [])]
        return self.cluster.command("exec", "-i", "deployment/client", "--", *caller)

    def connects(self, address: str, port: int) -> bool:
        """Whether the pod that calls gets a connection to there."""
        knock = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)"
        command = self.cluster.command("exec", "deployment/client", "--", "python", "-c", knock, address, f"{port}")
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def label_client(self, label: str) -> None:
        """Changes a label of the pod that calls, as ``kubectl label`` writes it. Raises: KubeError."""
        self.cluster.kubectl("label", "--overwrite", "pod", "--selector=app=client", label)

    def _consul(self, path: str) -> Any:
        """What the agent of the client's node says to the client. Raises: KubeError."""
        said = self.cluster.kubectl("exec", "deployment/client", "--", "python", "-m", "tests.k8s.ask", path)
        return json.loads(said)


def address_of(pod: dict[str, Any]) -> str:
    """Of a pod; empty while it has none."""
    return str(pod["status"].get("podIP", ""))


def instance_of(pod: dict[str, Any], service: Service = BACKEND) -> str:
    """The id under which it must be registered."""
    return f"{service.name}-{address_of(pod)}-{service.port}"


def drain(system: System, node: int) -> None:
    """As `kubectl drain` does it. Raises: subprocess.CalledProcessError."""
    options = ["--ignore-daemonsets", "--delete-emptydir-data", "--timeout=150s"]
    subprocess.run(system.cluster.command("drain", f"node{node}", *options), check=True, capture_output=True)
