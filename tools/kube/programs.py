"""The programs of the nodes: Kubernetes, CoreDNS and kube-router from Go modules, the rest from Debian's packages.

All is kept in ``registry-kube`` in the user's cache. Versions: the go.mod of each.
"""

import os
import shutil
import subprocess
from pathlib import Path

from registry.testing.binary import pinned_version
from registry.testing.progress import alone, say
from tools.built import find_built
from tools.kube.place import KubeError

__all__ = ["BESIDE", "HERE", "KUBERNETES", "Programs", "find_programs"]

HERE = Path(__file__).parent
KUBERNETES = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet", "kubectl")
_DEBIAN = ("etcd-server", "containernetworking-plugins", "containerd", "runc", "ipset", "libipset13")
BESIDE = {"coredns": "github.com/coredns/coredns", "kube-router": "github.com/cloudnativelabs/kube-router/v2"}
"""Program, whose recipe is in a folder of its name → module."""
_NEEDED = ("nsenter", "unshare", "ip", "iptables", "apt-get", "dpkg")


class Programs:
    """Paths of all programs, by name; `folders` is what PATH must have in front for those that look for each other."""

    def __init__(self, paths: dict[str, Path], debian: Path) -> None:
        self._paths = paths
        self._debian = debian
        self.plugins = debian / "usr/lib/cni"

    def __getitem__(self, name: str) -> str:
        """The path of a program."""
        return str(self._paths[name])

    @property
    def environment(self) -> dict[str, str]:
        """With what is installed before what was only unpacked."""
        unpacked = [str(self._debian / folder) for folder in ("usr/bin", "usr/sbin")]
        libraries = {str(library.parent) for library in self._debian.glob("usr/lib/*/*.so.*")}
        return {
            "PATH": os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin", *unpacked]),
            "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        }

    def which(self, name: str) -> str:
        """A program of Debian's. Raises: KubeError."""
        if found := shutil.which(name, path=self.environment["PATH"]):
            return found
        raise KubeError(f"there is no program {name!r}")


def find_programs() -> Programs:
    """All of them. Blocks, on a machine that has none of them for some twenty minutes, with progress on stderr.

    Raises: KubeError, registry.testing.progress.UnavailableError.
    """
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise KubeError("Nodes are made of namespaces, by root on Debian or Ubuntu.")
    if missing := [name for name in _NEEDED if not shutil.which(name)]:
        raise KubeError(f"Missing here: {', '.join(missing)}. apt-get install util-linux iproute2 iptables")
    place = _cache()
    kubernetes, module = HERE / "kubernetes", "k8s.io/kubernetes"
    version = f"v{pinned_version(kubernetes, module)}"
    stamps = " ".join(f"-X k8s.io/{part}/version.gitVersion={version}" for part in ("component-base", "client-go/pkg"))
    # Static, as the name server is all that its image has.
    options = ("-tags=netgo,osusergo", f"-ldflags=-s -w {stamps}")
    paths = {name: find_built(name, kubernetes, module, *options, place=place) for name in KUBERNETES}
    paths |= {name: find_built(name, HERE / name, beside, options[0], place=place) for name, beside in BESIDE.items()}
    return Programs(paths, _unpack(place / "debian"))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "registry-kube")


def _unpack(folder: Path) -> Path:
    """Debian's packages, unpacked but not installed, so that none starts a service."""
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder.with_suffix(".lock")):
        done, packages = folder / "done", "\n".join(_DEBIAN)
        if not done.exists() or done.read_text() != packages:
            say(f"Fetching {', '.join(_DEBIAN)} from Debian's packages.\n")
            _apt("update", "-qq", folder=folder)
            _apt("download", "-qq", *_DEBIAN, folder=folder)
            for package in folder.glob("*.deb"):
                subprocess.run(["dpkg", "-x", str(package), str(folder)], check=True)
                package.unlink()
            done.write_text(packages)
    return folder


def _apt(*arguments: str, folder: Path) -> None:
    done = subprocess.run(["apt-get", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise KubeError(f"apt-get {' '.join(arguments)} failed: {done.stderr.strip()}")
