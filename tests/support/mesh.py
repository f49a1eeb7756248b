"""A real Consul whose certificate authority is ours, so that tests can sign what Consul never would."""

import socket
import ssl
import uuid
from collections.abc import Mapping
from http.client import HTTPResponse
from typing import Self

import httpx
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from registry.testing.agent import ConsulAgent
from tests.support.authority import Authority

__all__ = ["Kept", "admin", "answer_of", "authority_of", "intend", "new_root", "token_for"]


def admin(consul: ConsulAgent) -> httpx.Client:
    """May do everything; close it."""
    headers = {} if consul.token is None else {"X-Consul-Token": consul.token}
    return httpx.Client(base_url=consul.url, headers=headers, trust_env=False, verify=False, timeout=20.0)


def authority_of(consul: ConsulAgent) -> Authority:
    """An authority of this Consul's trust domain, which from now on is Consul's own, too."""
    with admin(consul) as http:
        authority = Authority(http.get("/v1/connect/ca/roots").json()["TrustDomain"])
    new_root(consul, authority)
    return authority


def new_root(consul: ConsulAgent, authority: Authority) -> None:
    """From now on Consul signs as this authority; it trusts the former one for a while."""
    key = authority._key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()).decode()
    ages = {"LeafCertTTL": "72h", "IntermediateCertTTL": "8760h"}
    config = {"Provider": "consul", "Config": ages | {"PrivateKey": key, "RootCert": authority.root}}
    with admin(consul) as http:
        http.put("/v1/connect/ca/configuration", json=config).raise_for_status()


def intend(consul: ConsulAgent, destination: str, sources: Mapping[str, str]) -> None:
    """Writes all intentions of a destination: source → ``allow`` or ``deny``; empty: none."""
    listed = [{"Name": source, "Action": action} for source, action in sources.items()]
    entry = {"Kind": "service-intentions", "Name": destination, "Sources": listed}
    with admin(consul) as http:
        answer = (
            http.put("/v1/config", json=entry)
            if listed
            else http.delete(f"/v1/config/service-intentions/{destination}")
        )
        answer.raise_for_status()


def token_for(consul: ConsulAgent, rules: str) -> str:
    """A token with these rights; the agent is one with ACLs."""
    with admin(consul) as http:
        policy = http.put("/v1/acl/policy", json={"Name": f"policy-{uuid.uuid4().hex[:8]}", "Rules": rules}).json()
        return str(http.put("/v1/acl/token", json={"Policies": [{"ID": policy["ID"]}]}).json()["SecretID"])


def answer_of(port: int, context: ssl.SSLContext | None, request: str = "POST /work") -> str:
    """The whole answer to a request without a body; ``refused: …`` if there is none. Blocks."""
    head = f"{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
            connection = plain if context is None else context.wrap_socket(plain, server_hostname="localhost")
            with connection:
                connection.sendall(head.encode())
                answer = b""
                while part := connection.recv(65_536):
                    answer += part
    except OSError as error:
        return f"refused: {error}"
    return answer.decode("latin-1") or "refused: closed"


class Kept:
    """One connection, on which requests follow each other. Blocks."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        """Connects."""
        self._connection = context.wrap_socket(
            socket.create_connection(("127.0.0.1", port), timeout=10), server_hostname="localhost"
        )

    def status(self, request: str) -> int:
        """The status of the next answer."""
        self._connection.sendall(f"{request} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode())
        answer = HTTPResponse(self._connection, method=request.split()[0])
        answer.begin()
        answer.read()
        return answer.status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
