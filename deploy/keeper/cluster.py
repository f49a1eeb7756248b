"""The keeper on Kubernetes: the vault is a Secret that its own account alone may read; so is what each reader gets."""

import base64
import http.client
import json
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.keeper.api import ConsulError, exchange
from deploy.keeper.vault import Vault

__all__ = ["VAULT", "Cluster", "keep"]

VAULT = "vault"
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


@dataclass(frozen=True)
class Cluster:
    """The Secrets of one namespace. Every method blocks and raises ConsulError."""

    host: str
    port: int
    token: str
    namespace: str
    trust: ssl.SSLContext

    @classmethod
    def around(cls) -> "Cluster":
        """The one that this pod is in, as the account of the pod."""
        return cls(
            os.environ["KUBERNETES_SERVICE_HOST"],
            int(os.environ["KUBERNETES_SERVICE_PORT"]),
            (_ACCOUNT / "token").read_text(),
            (_ACCOUNT / "namespace").read_text(),
            ssl.create_default_context(cafile=str(_ACCOUNT / "ca.crt")),
        )

    def read(self, name: str) -> dict[str, bytes] | None:
        """File → content; None: there is no such Secret."""
        found = self._ask("GET", name)
        return found and {file: base64.b64decode(content) for file, content in found.get("data", {}).items()}

    def write(self, name: str, files: Mapping[str, bytes]) -> bool:
        """Whether it had to be written: then it holds these files and no other."""
        if self.read(name) == files:
            return False
        data = {file: base64.b64encode(content).decode() for file, content in files.items()}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data}
        if self._ask("PUT", name, secret) is None:
            self._ask("POST", "", secret)
        return True

    def _ask(self, method: str, name: str, body: object = None) -> Any:
        """What it answers; None: 404."""
        connection = http.client.HTTPSConnection(self.host, self.port, timeout=20, context=self.trust)
        path = f"/api/v1/namespaces/{self.namespace}/secrets/{name}".rstrip("/")
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        sent = None if body is None else json.dumps(body).encode()
        try:
            status, content = exchange(connection, method, path, sent, headers)
        except (OSError, http.client.HTTPException) as error:
            raise ConsulError(f"{method} {path}: Kubernetes does not answer ({error})") from error
        if status == 404:
            return None
        if status >= 400:
            raise ConsulError(f"{method} {path}: {status} {json.loads(content).get('message')}", status)
        return json.loads(content)


def keep(cluster: Cluster, vault: Vault) -> list[str]:
    """Makes what is missing, keeps it, and then gives each reader its own; returns the Secrets that changed."""
    vault.folder.mkdir(exist_ok=True)
    vault.readers.mkdir(exist_ok=True)
    for name, content in (cluster.read(VAULT) or {}).items():
        vault.write(name, content)
    vault.make()
    vault.deliver()
    # First what nobody else could make again.
    folders = {VAULT: vault.folder, **{f"secrets-{each.name}": each for each in sorted(vault.readers.iterdir())}}
    return [name for name, folder in folders.items() if cluster.write(name, _files(folder))]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
