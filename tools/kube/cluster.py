"""Three nodes with the system on them: up, asked, broken, and down again with nothing left. Everything blocks."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.kubernetes.render import HERE as MANIFESTS
from tools.kube import fabric
from tools.kube.control import start_control_plane, stop_control_plane
from tools.kube.images import chosen
from tools.kube.node import kill_node, remove_node, runs, start_node
from tools.kube.pki import PKI, make_certificates
from tools.kube.place import FABRIC, NODES, PLACE, KubeError, inside, remove, wait_until
from tools.kube.programs import Programs, find_programs
from tools.services import ROOT

__all__ = ["NAMESPACE", "VOLUMES", "Cluster", "running_cluster"]

NAMESPACE = "registry"
_OWN = Path(__file__).parent / "manifests"
_OVERLAY = PLACE / "overlay"
VOLUMES = {"data-postgres-0": 1, "data-consul-server-0": 1, "data-consul-server-1": 2, "data-consul-server-2": 3}
"""Claim → the node whose disk it is on. No scene kills the first, which has the only database."""
_READY_SECONDS = 240.0
_UNSYNCED = ["postgres", "-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "full_page_writes=off"]
"""What is written survives its process, as every scene asks, but waits for no slow disk: that is not their subject."""
_POSTGRES = [{"op": "add", "path": "/spec/template/spec/containers/0/args", "value": _UNSYNCED}]


class Cluster:
    """The nodes of this machine; there can be one such cluster only."""

    def __init__(self, programs: Programs, overlay: str = "plain") -> None:
        """``overlay``: which one of deploy/kubernetes the system is."""
        self._programs = programs
        self.overlay = overlay

    def up(self, say: Callable[[str], Any]) -> None:
        """Returns when every pod of the system is ready. Raises: KubeError."""
        chosen()
        self.down()  # what a run left that was killed
        PLACE.mkdir(parents=True, exist_ok=True)
        make_certificates()
        fabric.lay()
        start_control_plane(self._programs)
        self.apply("-f", str(_OWN / "router.yaml"))
        say("the control plane is ready")
        for node in NODES:
            start_node(node, self._programs)
        wait_until(lambda: self.ready_nodes() == set(NODES), _READY_SECONDS, "all nodes are ready")
        say(f"{len(NODES)} nodes are ready")
        self.apply("-f", str(_OWN / "coredns.yaml"))
        self.apply("-f", "-", given=json.dumps({"apiVersion": "v1", "kind": "List", "items": _volumes()}))
        self._write_overlay()
        self.apply("-k", str(_OVERLAY))
        say("applied")
        self.wait_until_rolled_out()
        say("every pod is ready")

    def down(self) -> None:
        """Removes everything but images and programs, as far as it is there."""
        for node in NODES:
            remove_node(node)
        stop_control_plane()
        fabric.take_away()
        for folder in (PKI, PLACE / "run", _OVERLAY):
            remove(folder)

    def kubectl(self, *arguments: str, given: str | None = None, check: bool = True) -> str:
        """What kubectl says. Raises: KubeError, when it failed, unless that is not to be checked."""
        done = subprocess.run(
            self.command(*arguments), input=given, capture_output=True, text=True, check=False, cwd=ROOT
        )
        if done.returncode != 0 and check:
            raise KubeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def command(self, *arguments: str) -> list[str]:
        """How kubectl is run for this cluster, as its administrator."""
        return inside(FABRIC, self._programs["kubectl"], f"--kubeconfig={PKI}/admin.kubeconfig", *arguments)

    def apply(self, *arguments: str, given: str | None = None) -> None:
        """Gives the cluster manifests. Raises: KubeError."""
        self.kubectl("apply", *arguments, given=given)

    def get(self, *arguments: str) -> dict[str, Any]:
        """One object, or a list of them."""
        found: dict[str, Any] = json.loads(self.kubectl("get", *arguments, "--output=json"))
        return found

    def pods(self, name: str) -> list[dict[str, Any]]:
        """Those of this name that are not being ended, by their names."""
        found = self.get("pods", f"--selector=app.kubernetes.io/name={name}")["items"]
        alive = [
            pod for pod in found if "deletionTimestamp" not in pod["metadata"] and pod["status"]["phase"] == "Running"
        ]
        return sorted(alive, key=lambda pod: str(pod["metadata"]["name"]))

    def running_nodes(self) -> set[int]:
        """The numbers of those that have not been killed."""
        return {node for node in NODES if runs(node)}

    def ready_nodes(self) -> set[int]:
        """The numbers of those that say so."""
        ready = set()
        for node in self.get("nodes")["items"]:
            conditions = {condition["type"]: condition["status"] for condition in node["status"]["conditions"]}
            if conditions.get("Ready") == "True":
                ready.add(int(node["metadata"]["name"].removeprefix("node")))
        return ready

    def wait_until_rolled_out(self) -> None:
        """Returns when every workload of the system has what it wants. Raises: KubeError."""
        workloads = self.kubectl("get", "statefulsets,daemonsets,deployments", "--output=name").split()
        for workload in workloads:
            self.kubectl("rollout", "status", workload, f"--timeout={_READY_SECONDS:.0f}s")

    def kill(self, node: int) -> None:
        """As a power cut."""
        kill_node(node)

    def start(self, node: int) -> None:
        """A node that was killed; returns before it is ready."""
        start_node(node, self._programs)

    def keep_logs(self, folder: Path) -> None:
        """Writes what pods, events and nodes say now into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for what in ("pods", "nodes", "events"):
            said = self.kubectl("get", what, "--output=wide", "--sort-by=.metadata.creationTimestamp", check=False)
            (folder / f"{what}.txt").write_text(said)
        for pod in self.kubectl("get", "pods", "--output=name", check=False).split():
            said = self.kubectl("logs", pod, "--timestamps", "--all-containers", check=False)
            (folder / f"{pod.rpartition('/')[2]}.log").write_text(said)

    def _write_overlay(self) -> None:
        """The system's overlay with images that are here, and the client."""
        _OVERLAY.mkdir(parents=True, exist_ok=True)
        for file in _OWN.glob("client*.yaml"):
            (_OVERLAY / file.name).write_text(file.read_text().replace("/nowhere", str(ROOT / "tests")))
        patches: list[dict[str, Any]] = [
            {"target": {"kind": "StatefulSet", "name": "postgres"}, "patch": json.dumps(_POSTGRES)}
        ]
        if self.overlay == "locked":
            patches.append({"path": "client-locked.yaml"})
        overlay = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": NAMESPACE,
            "resources": [os.path.relpath(MANIFESTS / self.overlay, _OVERLAY), "client.yaml"],
            "patches": patches,
            "images": [_image(name, given) for name, given in chosen().items()],
        }
        (_OVERLAY / "kustomization.yaml").write_text(json.dumps(overlay))


def _image(name: str, given: str) -> dict[str, str]:
    new, _, tag = given.partition(":")
    return {"name": name, "newName": new, "newTag": tag}


def _volumes() -> list[dict[str, Any]]:
    """Folders of the nodes, each for one claim."""
    found = []
    for claim, node in VOLUMES.items():
        folder = PLACE / f"node{node}/kubelet/volumes-of-node/{claim}"
        folder.mkdir(parents=True)
        here = {"key": "kubernetes.io/hostname", "operator": "In", "values": [f"node{node}"]}
        found.append(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": claim},
                "spec": {
                    "capacity": {"storage": "1Gi"},
                    "accessModes": ["ReadWriteOnce"],
                    "persistentVolumeReclaimPolicy": "Retain",
                    "claimRef": {"namespace": NAMESPACE, "name": claim},
                    "local": {"path": f"/var/lib/kubelet/volumes-of-node/{claim}"},
                    "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
                },
            }
        )
    return found


@contextmanager
def running_cluster(say: Callable[[str], Any], overlay: str) -> Iterator[Cluster]:
    """The nodes with the system on them; nothing is left when the context ends, whatever happened."""
    cluster = Cluster(find_programs(), overlay)
    try:
        cluster.up(say)
        yield cluster
    finally:
        cluster.down()
