"""Consul's API for the keeper's jobs: HTTPS with the management token, to whichever server answers."""

import http.client
import json
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deploy.keeper.vault import MANAGEMENT, Vault

__all__ = ["Consul", "ConsulError", "exchange"]

_PORT = 8500
_SECONDS = 60.0
"""How long a job waits for a condition."""
_PAUSE = 0.2


class ConsulError(Exception):
    """Consul said no, or nothing; the message says what was asked and holds no secret."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


def exchange(
    connection: http.client.HTTPSConnection, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
) -> tuple[int, bytes]:
    """Status and content of the answer, after which the connection is closed. Raises: OSError, HTTPException."""
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


class Consul:
    """The servers, asked with the token that may do everything. Every method blocks and raises ConsulError."""

    def __init__(self, vault: Vault, hosts: Sequence[str] | None = None, port: int = _PORT) -> None:
        self._place = vault.place
        self._hosts = hosts or self._place.hosts
        self._port = port
        self._trust = ssl.create_default_context(cafile=str(vault.trusted))
        self._token = vault.token(MANAGEMENT).secret

    def get(self, path: str) -> Any:
        """What is there; None when nothing is."""
        try:
            return json.loads(self.ask("GET", path))
        except ConsulError as error:
            # A token that does not exist is "ACL not found".
            if error.status == 404 or (error.status == 403 and "not found" in str(error).lower()):
                return None
            raise

    def put(self, path: str, body: object) -> Any:
        """Writes it."""
        return json.loads(self.ask("PUT", path, json.dumps(body).encode()) or b"null")

    def ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """The answer's body, of the first server that can be reached."""
        return self._ask(self._hosts, method, path, body)

    def reload(self) -> None:
        """Every agent reads its files anew; returns when all have."""
        for host in (*self._place.hosts, self._place.agent_host):
            self._ask([host], "PUT", "/v1/agent/reload")

    def _ask(self, hosts: Sequence[str], method: str, path: str, body: bytes | None = None) -> bytes:
        silent = ""
        for host in hosts:
            connection = http.client.HTTPSConnection(host, self._port, timeout=20, context=self._trust)
            try:
                status, content = exchange(connection, method, path, body, {"X-Consul-Token": self._token})
            except (OSError, http.client.HTTPException) as error:
                silent = f"{host}: {error}"
                continue
            if status >= 400:
                said = content.decode(errors="replace")[:300]
                raise ConsulError(f"{method} {path.partition('?')[0]}: {status} {said}", status)
            return content
        raise ConsulError(f"{method} {path}: no agent of Consul answers ({silent})")

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Returns when it holds. A server that can't say is asked again."""
        deadline = time.monotonic() + _SECONDS
        said = ""
        while True:
            try:
                if condition():
                    return
            except ConsulError as error:
                said = f" ({error})"
            if time.monotonic() > deadline:
                raise ConsulError(f"not within {_SECONDS:.0f} s: {what}{said}")
            time.sleep(_PAUSE)

    def wait_until_led(self) -> None:
        """Returns when there is a leader that knows the management token."""
        self.wait_until(lambda: json.loads(self.ask("GET", "/v1/acl/token/self")), "a leader knows the token")

    def wait_until_whole(self) -> None:
        """Returns when as many servers as there should be are healthy and vote."""

        def whole() -> bool:
            health = json.loads(self.ask("GET", "/v1/operator/autopilot/health"))
            voters = {server["Name"] for server in health["Servers"] if server["Voter"] and server["Healthy"]}
            return bool(health["Healthy"]) and voters == set(self._place.nodes)

        self.wait_until(whole, f"{len(self._place.nodes)} healthy servers vote")
