"""The locked system under test: three servers of Consul, and secrets that the keeper has made."""

import json
import ssl
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from docker.models.containers import Container

from deploy.compose.locked.roll import leader_of
from deploy.compose.stack import HERE
from deploy.keeper.grants import SERVERS
from registry import ServiceRegistry
from tests.e2e.system import System, run_in, wait_until
from tools.services import ROOT

JOBS = {"keeper", "access"}
"""Containers that end at once."""
_VAULT = """
import json, pathlib
print(json.dumps({path.name: path.read_text() for path in pathlib.Path("/vault").iterdir()}))
"""


class LockedSystem(System):
    """One Compose project with the locked overlay and, over it, that of the faults."""

    project = "registry-locked"
    files = (
        HERE / "docker-compose.yml",
        HERE / "docker-compose.locked.yml",
        HERE / "docker-compose.e2e.yml",
        ROOT / "tests/locked/docker-compose.yml",
    )

    def __init__(self, images: Mapping[str, str], folder: Path) -> None:
        super().__init__(images, folder)
        self.consul = f"https://127.0.0.1:{self.consul_port}"
        self.started = 0.0
        """Seconds from nothing, images apart, to everything works."""
        self.authority = folder / "ca.pem"
        self._opened: list[ServiceRegistry] = []

    def up(self) -> None:
        """Builds and starts everything, and returns when all of it works."""
        self.down()
        self.stack.compose("build")
        begun = time.monotonic()
        self.stack.compose("up", "-d", "--remove-orphans", "--scale", "backend=3")
        self.connect()
        self.settle()
        self.started = time.monotonic() - begun

    def connect(self) -> None:
        """Finds the way to Consul, as somebody who may do everything, and learns the password of Postgres."""
        self.authority.write_text(run_in(self.container("consul"), "cat", "/secrets/ca.pem"))
        self.registry = self.registry_of(self.token("management"))
        self.password = run_in(self.container("postgres"), "cat", "/secrets/database-password")

    def close(self) -> None:
        """Leaves nothing of it."""
        for each in self._opened:
            each.close()
        super().close()

    def containers(self, name: str | None = None) -> list[Container]:
        """As ever, but for jobs that are done."""
        return [each for each in super().containers(name) if each.labels["com.docker.compose.service"] not in JOBS]

    @property
    def trust(self) -> ssl.SSLContext:
        """Of the authority that signed Consul's certificates when `connect` looked."""
        return ssl.create_default_context(cafile=self.authority)

    def registry_of(self, token: str | None) -> ServiceRegistry:
        """Somebody who asks Consul with this token."""
        found = ServiceRegistry("127.0.0.1", self.consul_port, token, "https", ca_file=self.authority)
        self._opened.append(found)
        return found

    def ask(self, method: str, path: str, token: str | None, body: object = None) -> httpx.Response:
        """Consul's answer to anybody's raw request."""
        headers = {"X-Consul-Token": token} if token else {}
        url = f"{self.consul}{path}"
        return httpx.request(method, url, headers=headers, json=body, verify=self.trust, timeout=10, trust_env=False)

    def vault(self) -> dict[str, str]:
        """File → content, of the keeper's vault."""
        command = ["docker", "run", "--rm", "--entrypoint", "python3", "-v", f"{self.project}_vault:/vault:ro"]
        done = subprocess.run([*command, "registry/keeper", "-c", _VAULT], capture_output=True, text=True, check=True)
        found: dict[str, str] = json.loads(done.stdout)
        return found

    def token(self, name: str) -> str:
        """The secret of this token."""
        return str(json.loads(self.vault()[f"{name}.token"])["secret"])

    def get(self, path: str) -> Any:
        """What Consul says to one who may do everything."""
        answer = self.ask("GET", path, self.token("management"))
        answer.raise_for_status()
        return answer.json()

    def job(self, name: str) -> str:
        """Runs a job of the keeper, and returns what it said."""
        done = subprocess.run(
            self.stack.keeper(name), cwd=ROOT, env=self.stack.environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    def pass_of(self, subject: str) -> dict[str, str]:
        """The header of somebody who calls the front door."""
        return {"Authorization": f"Bearer {self.stack.pass_of(subject)}"}

    def leader(self) -> str:
        """The server that leads."""
        return leader_of(self.stack)

    def wait_until_whole(self, seconds: float = 90.0) -> float:
        """Returns when three healthy servers vote, with the seconds that took."""
        management = self.token("management")

        def whole() -> bool:
            try:
                health = self.ask("GET", "/v1/operator/autopilot/health", management).json()
            except (httpx.TransportError, ValueError):
                return False
            voters = {server["Name"] for server in health["Servers"] if server["Voter"] and server["Healthy"]}
            return bool(health["Healthy"]) and voters == set(SERVERS)

        return wait_until(whole, seconds, "three healthy servers vote")
