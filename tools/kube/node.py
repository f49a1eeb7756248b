"""A node: its own network, mounts, processes and host name, with containerd, kubelet, kube-proxy and kube-router."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from tools.kube import fabric
from tools.kube.groups import entered, group_of, make_group, remove_group
from tools.kube.images import SEED
from tools.kube.pki import PKI
from tools.kube.place import PLACE, KubeError, address, end, inside, remove, running, start, wait_until, zone
from tools.kube.programs import Programs

__all__ = ["kill_node", "remove_node", "runs", "start_node"]

_INIT = Path(__file__).parent / "init.sh"
_DATABASES = ("io.containerd.metadata.v1.bolt/meta.db", "io.containerd.snapshotter.v1.overlayfs/metadata.db")
_CONTAINERD = """\
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "registry-local/pause:latest"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{folder}/network"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
"""
"""``restrict_oom_score_adj``: who is in a namespace may not lower it, and runc would die."""


def start_node(node: int, programs: Programs) -> None:
    """Returns at once; it is Ready some seconds later. What it had on its disk is there again."""
    name, folder = _name(node), _folder(node)
    for part in ("kubelet/volumes-of-node", "cni", "log", "network"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    if not (folder / "containerd").exists():
        _give_images(folder / "containerd")
    (folder / "containerd.toml").write_text(_CONTAINERD.format(plugins=programs.plugins, folder=folder))
    (folder / "network/10-pods.conflist").write_text(json.dumps(_network(node)))
    (folder / "kubelet.json").write_text(json.dumps(_kubelet(node)))
    (folder / "proxy.json").write_text(json.dumps(_proxy(node)))
    make_group(name)
    start(
        name,
        entered(
            name,
            inside(
                fabric.namespace(node),
                *("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("bash", str(_INIT)),
            ),
        ),
        {
            **programs.environment,
            "NODE": name,
            "ITS": str(folder),
            "ADDRESS": address(node),
            "ZONE": zone(node),
            "KUBECONFIG": f"{PKI}/{name}.kubeconfig",
            "CONTAINERD": programs.which("containerd"),
            "KUBELET": programs["kubelet"],
            "PROXY": programs["kube-proxy"],
            "ROUTER": programs["kube-router"],
            "ROUTER_KUBECONFIG": f"{PKI}/router.kubeconfig",
        },
    )


def kill_node(node: int) -> None:
    """As a power cut: its first process is killed, and all others with it; what a restart forgets is forgotten."""
    parent = running(_name(node))
    if parent is None:
        raise KubeError(f"{_name(node)} does not run")
    first = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for pid in first:
        os.kill(int(pid), signal.SIGKILL)
    wait_until(lambda: running(_name(node)) is None, 30.0, f"{_name(node)} ends")
    _forget(node)


def runs(node: int) -> bool:
    """Whether it does."""
    return running(_name(node)) is not None


def remove_node(node: int) -> None:
    """Ends it, if it runs, and removes its disk."""
    end(_name(node))
    _forget(node)
    remove(_folder(node))


def _forget(node: int) -> None:
    wait_until(lambda: remove_group(_name(node)), 30.0, f"no process of {_name(node)} is left")
    fabric.unplug(node)


def _name(node: int) -> str:
    return f"node{node}"


def _folder(node: int) -> Path:
    return PLACE / _name(node)


def _give_images(target: Path) -> None:
    """Files of images are never written to, so all nodes share them; the databases about them are the node's own."""
    subprocess.run(["cp", "--archive", "--link", str(SEED), str(target)], check=True)
    for database in _DATABASES:
        (target / database).unlink()
        shutil.copyfile(SEED / database, target / database)


def _network(node: int) -> dict[str, Any]:
    addresses = {
        "type": "host-local",
        "ranges": [[{"subnet": f"10.244.{node}.0/24"}]],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": "/var/lib/cni/addresses",
    }
    bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "hairpinMode": True, "ipam": addresses}
    ports = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}
    return {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge, ports]}


def _kubelet(node: int) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{PKI}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "address": address(node),
        "clusterDNS": ["10.96.0.10"],
        "clusterDomain": "cluster.local",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": group_of(_name(node)),
        "failSwapOn": False,
        "failCgroupV1": False,
        "localStorageCapacityIsolation": False,
        "imageGCHighThresholdPercent": 100,
        "imageMinimumGCAge": "10h",
        "evictionHard": {"memory.available": "200Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "nodeStatusUpdateFrequency": "4s",
        "nodeLeaseDurationSeconds": 20,
        "maxPods": 50,
    }


def _proxy(node: int) -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": f"{PKI}/proxy.kubeconfig"},
        "mode": "iptables",
        "clusterCIDR": "10.244.0.0/16",
        "hostnameOverride": _name(node),
        # The limits are the machine's, and no namespace may change them.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }
