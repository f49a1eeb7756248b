"""The control plane: etcd in memory, API server, controllers and scheduler, in the fabric's namespace."""

import subprocess
from collections.abc import Mapping
from pathlib import Path

from tools.kube.groups import entered, make_group, remove_group
from tools.kube.pki import PKI
from tools.kube.place import ADDRESS, FABRIC, PLACE, KubeError, end, inside, remove, running, start, wait_until
from tools.kube.programs import Programs

__all__ = ["start_control_plane", "stop_control_plane"]

_DATA = Path("/dev/shm/registry-kube-etcd")  # noqa: S108 - a disk that others use, too, would hold every write up
_ETCD = "http://127.0.0.1:2379"
_GROUP = "control-plane"
_LOST_SECONDS = 20
"""After so long without a word of its kubelet, a node counts as lost; 40 by default."""
_READY_SECONDS = 120.0
_PARTS = ("scheduler", "controller-manager", "apiserver", "etcd")


def start_control_plane(programs: Programs) -> None:
    """Returns when the API server answers, and the rest has been started. Raises: KubeError."""
    remove(_DATA)
    make_group(_GROUP)
    peers = {"listen-peer-urls": "http://127.0.0.1:2380", "listen-client-urls": _ETCD, "advertise-client-urls": _ETCD}
    _start("etcd", programs.which("etcd"), {"data-dir": str(_DATA), "logger": "zap", **peers})
    _start("apiserver", programs["kube-apiserver"], _apiserver())
    ready = inside(FABRIC, programs["kubectl"], f"--kubeconfig={PKI}/admin.kubeconfig", "get", "--raw=/readyz")
    wait_until(lambda: _answers(ready), _READY_SECONDS, "the API server is ready")
    controllers = {
        "service-account-private-key-file": f"{PKI}/accounts.key",
        "root-ca-file": f"{PKI}/ca.crt",
        "use-service-account-credentials": "true",
        "allocate-node-cidrs": "false",
        "node-monitor-grace-period": f"{_LOST_SECONDS}s",
        "node-monitor-period": "2s",
    }
    _start("controller-manager", programs["kube-controller-manager"], _client("controller-manager") | controllers)
    _start("scheduler", programs["kube-scheduler"], _client("scheduler"))


def stop_control_plane() -> None:
    """Ends all of it, as far as it runs; what it knew is gone."""
    for name in _PARTS:
        end(name)
    wait_until(lambda: remove_group(_GROUP), 30.0, "no process of the control plane is left")
    remove(_DATA)


def _answers(command: list[str]) -> bool:
    if ended := [name for name in ("etcd", "apiserver") if running(name) is None]:
        raise KubeError(f"{' and '.join(ended)} ended; see {PLACE / 'log'}")
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _apiserver() -> dict[str, str]:
    return {
        "etcd-servers": _ETCD,
        "advertise-address": ADDRESS,
        "bind-address": ADDRESS,
        "secure-port": "6443",
        "service-cluster-ip-range": "10.96.0.0/16",
        "authorization-mode": "Node,RBAC",
        "enable-admission-plugins": "NodeRestriction",
        "allow-privileged": "true",
        "client-ca-file": f"{PKI}/ca.crt",
        "tls-cert-file": f"{PKI}/apiserver.crt",
        "tls-private-key-file": f"{PKI}/apiserver.key",
        "kubelet-client-certificate": f"{PKI}/kubelet-client.crt",
        "kubelet-client-key": f"{PKI}/kubelet-client.key",
        "kubelet-preferred-address-types": "InternalIP",  # nobody resolves the nodes' names
        "service-account-key-file": f"{PKI}/accounts.key",
        "service-account-signing-key-file": f"{PKI}/accounts.key",
        "service-account-issuer": "https://kubernetes.default.svc",
        "profiling": "false",
    }


def _client(name: str) -> dict[str, str]:
    return {"kubeconfig": f"{PKI}/{name}.kubeconfig", "leader-elect": "false", "profiling": "false"}


def _start(name: str, program: str, options: Mapping[str, str]) -> None:
    command = inside(FABRIC, program, *(f"--{option}={value}" for option, value in options.items()))
    start(name, entered(_GROUP, command))
