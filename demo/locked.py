"""`nox -s demo -- --locked`: Consul denies what no token allows, speaks TLS, and each service has a token in a file."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from demo.processes import DemoError
from deploy.keeper.access import grant
from deploy.keeper.api import Consul
from deploy.keeper.grants import SERVERS
from deploy.keeper.vault import MANAGEMENT, Token, Vault
from registry import ServiceRegistry
from registry.testing.agent import ConsulAgent

__all__ = ["Lock", "locked"]


class _Agent(ConsulAgent):
    """An agent that answers with TLS where everybody asks. Its plain port, on loopback, is told to nobody."""

    def __init__(self, binary: Path, port: int, certificate: Path, key: Path) -> None:
        self._port = port
        self._files = {"cert_file": str(certificate), "key_file": str(key)}
        super().__init__(binary, Path(tempfile.mkdtemp(prefix="consul-agent-")), None, acl=True, in_memory=True)

    def _settings(self, serf_port: int, server_port: int) -> dict[str, object]:
        settings = super()._settings(serf_port, server_port)
        ports = settings["ports"]
        assert isinstance(ports, dict)
        return settings | {"ports": {**ports, "https": self._port}, "tls": {"https": self._files}}


@dataclass(frozen=True)
class Lock:
    """What is secret in one demo: a folder with the authority and a token for each service. ``open`` starts Consul."""

    port: int
    folder: Path
    binary: Path

    @property
    def vault(self) -> Vault:
        """Where the secrets are."""
        return Vault(self.folder / "vault", self.folder / "readers", users=False)

    @property
    def registry(self) -> ServiceRegistry:
        """The way to Consul of the demo itself, which reads only."""
        token = self.vault.token("ui").secret
        return ServiceRegistry("localhost", self.port, token, "https", ca_file=self.vault.trusted)

    def environment(self, service: str) -> dict[str, str]:
        """The way to Consul of a service."""
        reader = self.folder / "readers" / service
        return {
            "CONSUL_HTTP_ADDR": f"https://localhost:{self.port}",
            "CONSUL_CACERT": str(reader / "ca.pem"),
            "CONSUL_HTTP_TOKEN_FILE": str(reader / "token"),
        }

    @contextmanager
    def open(self) -> Iterator[None]:
        """Consul runs within, with everybody's rights. Raises: ConsulStartError, ConsulError."""
        vault, node = self.vault, SERVERS[0]
        agent = _Agent(self.binary, self.port, vault.folder / f"{node}.pem", vault.folder / f"{node}-key.pem")
        assert agent.token is not None
        vault.keep(MANAGEMENT, Token("", agent.token))
        try:
            agent.start()
            grant(Consul(vault, ["localhost"], self.port), vault)
            yield
        finally:
            agent.close()


@contextmanager
def locked(port: int, binary: Path) -> Iterator[Lock]:
    """The secrets of one demo, made before anything starts; nothing of them is left afterwards. Raises: DemoError."""
    if shutil.which("openssl") is None:
        raise DemoError("--locked makes keys with the program openssl, which is not there: install it.")
    folder = Path(tempfile.mkdtemp(prefix="registry-lock-"))
    path = os.environ.get("PATH", "")
    try:
        (folder / "bin").mkdir()
        (folder / "bin" / "consul").symlink_to(binary.resolve())
        (folder / "readers").mkdir()
        os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{path}"
        lock = Lock(port, folder, binary)
        lock.vault.make()
        lock.vault.deliver()
        yield lock
    finally:
        os.environ["PATH"] = path
        shutil.rmtree(folder, ignore_errors=True)
