"""Kubernetes' API server over etcd on loopback, without nodes: it judges manifests as a cluster would.

Nothing is built or fetched for it: it is there where `nox -s k8s` has been, or where the programs are installed.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from registry.testing.cache import cache
from registry.testing.ports import free_ports

__all__ = ["ApiServer", "ApiServerNotFoundError", "running_api_server"]

_PROGRAMS = ("etcd", "kube-apiserver", "kubectl")
_TOKEN = "administrator"
_START_SECONDS = 60.0


class ApiServerNotFoundError(RuntimeError):
    """A program of it is not on this machine; the message says which."""


@dataclass(frozen=True)
class ApiServer:
    """One that answers; kubectl is its administrator, everybody else has the rights that roles give."""

    kubectl: Path
    port: int
    home: Path

    def ask(self, *arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
        """What kubectl says of it, whether or not it succeeds. Blocks."""
        server = (f"--server=https://127.0.0.1:{self.port}", "--insecure-skip-tls-verify", f"--token={_TOKEN}")
        return subprocess.run(
            [self.kubectl, *server, *arguments],
            input=given,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=os.environ | {"HOME": str(self.home), "KUBECONFIG": ""},
        )


@contextmanager
def running_api_server(folder: Path) -> Iterator[ApiServer]:
    """It runs within. Raises: ApiServerNotFoundError."""
    etcd, server, kubectl = map(_find, _PROGRAMS)
    client, peer, port = free_ports(3)
    key = folder / "accounts.key"
    made = ec.generate_private_key(ec.SECP256R1())
    key.write_bytes(made.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()))
    tokens = folder / "tokens.csv"
    tokens.write_text(f"{_TOKEN},{_TOKEN},{_TOKEN},system:masters\n")
    with ExitStack() as stack:
        _start(stack, folder, etcd, {
            "data-dir": str(folder / "etcd"),
            "listen-client-urls": f"http://127.0.0.1:{client}",
            "advertise-client-urls": f"http://127.0.0.1:{client}",
            "listen-peer-urls": f"http://127.0.0.1:{peer}",
            "logger": "zap",
            "unsafe-no-fsync": "true",
        })  # fmt: skip
        process = _start(stack, folder, server, {
            "etcd-servers": f"http://127.0.0.1:{client}",
            "bind-address": "127.0.0.1",
            "advertise-address": "127.0.0.1",
            "secure-port": str(port),
            "cert-dir": str(folder / "certificates"),
            "service-account-key-file": str(key),
            "service-account-signing-key-file": str(key),
            "service-account-issuer": "https://kubernetes.default.svc",
            "token-auth-file": str(tokens),
            "authorization-mode": "RBAC",
            "service-cluster-ip-range": "10.0.0.0/16",
        })  # fmt: skip
        started = ApiServer(kubectl, port, folder)
        deadline = time.monotonic() + _START_SECONDS
        while started.ask("get", "--raw=/readyz").returncode != 0:
            said = (folder / "kube-apiserver.log").read_text()[-2000:]
            assert process.poll() is None, f"the API server ended: {said}"
            assert time.monotonic() < deadline, f"the API server is not ready: {said}"
            time.sleep(0.2)
        yield started


def _find(name: str) -> Path:
    if installed := shutil.which(name):
        return Path(installed)
    kept = cache().with_name("registry-kube")
    for found in (kept / "debian/usr/bin" / name, *sorted(kept.glob(f"{name}-*/{name}"), reverse=True)):
        if found.is_file():
            return found
    raise ApiServerNotFoundError(f"there is no {name}")


def _start(stack: ExitStack, folder: Path, program: Path, options: dict[str, str]) -> subprocess.Popen[bytes]:
    log = stack.enter_context((folder / f"{program.name}.log").open("wb"))
    command = [str(program), *(f"--{name}={value}" for name, value in options.items())]
    process = stack.enter_context(subprocess.Popen(command, cwd=folder, stdout=log, stderr=log))
    stack.callback(process.kill)
    return process
