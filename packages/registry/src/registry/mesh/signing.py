"""Certificates that a Consul server signs over gRPC, for a key that never leaves this process.

Source: https://github.com/hashicorp/consul/blob/main/proto-public/pbconnectca/ca.proto
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from consul.callback import CB

from registry.consul.connection import AsyncConsul, consul_errors
from registry.errors import InvalidInputError, RegistryError, RegistryUnavailableError
from registry.extras import extra
from registry.mesh.protobuf import chunks, encode
from registry.mesh.settings import MeshSettings
from registry.mesh.source import Leaf, Roots
from registry.settings import ConsulSettings

with extra("mesh"):
    import grpc
    import grpc.aio
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["SigningSource"]

_SERVICE = "/hashicorp.consul.connectca.ConnectCAService"
RENEW = 0.6, 0.9
"""When a certificate is renewed, as parts of its life: from and to, as the agent does it."""
SPREAD = 10.0
"""Seconds over which services renew theirs when the root has changed; the former root is trusted for days."""
_OPTIONS = (
    # A server that is gone without a word is noticed after 40 s; more often, and Consul would hang up.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


@dataclass(frozen=True, slots=True)
class _Authority:
    trust_domain: str
    root: str
    """The id of the active root."""


class SigningSource:
    """``ConnectCAService`` of a Consul server. Belongs to one event loop; ``roots`` must run beside ``leaves``.

    The key is made here, anew for each certificate. Needs the extra ``registry[mesh]``, and ``service:write`` on the
    own name. Raises: InvalidInputError, if a file of the settings can't be read.
    """

    def __init__(self, mesh: MeshSettings, settings: ConsulSettings | None = None) -> None:
        self._settings = settings or ConsulSettings()
        self._consul = AsyncConsul(self._settings)
        self._address = str(mesh.grpc_address)
        self._mesh = mesh
        self._files = _files(mesh, self._settings)
        self._channels = [_open(mesh, self._settings, self._files)]
        self._authority: _Authority | None = None
        self._changed = asyncio.Event()
        self._datacenters: list[str] = []

    async def leaves(self, service: str) -> AsyncGenerator[Leaf, None]:
        """A new certificate at 60 to 90 % of the life of the one before, or when the root has changed."""
        while True:
            while self._authority is None:
                await self._changed.wait()
            self._changed.clear()
            leaf = await self._leaf(service, self._authority)
            yield leaf
            life = (leaf.expires - datetime.now(UTC)).total_seconds()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(1.0, life * random.uniform(*RENEW))):
                    await self._changed.wait()
                    await asyncio.sleep(random.uniform(0, SPREAD))

    async def roots(self) -> AsyncGenerator[Roots, None]:
        """The active root, and those before it as long as they may be in use."""
        call = self._channel().unary_stream(f"{_SERVICE}/WatchRoots")
        with self._errors("its roots"):
            async for told in call(b"", metadata=await self._metadata()):
                authority = _Authority(_only(told, 2), _only(told, 1))
                if authority != self._authority:
                    self._authority = authority
                    self._changed.set()
                yield Roots(authority.trust_domain, tuple(_only(root, 5) for root in chunks(told, 3)))

    async def aclose(self) -> None:
        """Closes connections."""
        for channel in self._channels:
            await channel.close()
        await self._consul.http.close()

    async def _leaf(self, service: str, authority: _Authority) -> Leaf:
        if not self._datacenters:
            with consul_errors(self._settings):
                # The nearest first: its own.
                self._datacenters = await self._consul.http.get(CB.json(), "/v1/catalog/datacenters")
        for datacenter in tuple(self._datacenters):
            uri = f"spiffe://{authority.trust_domain}/ns/default/dc/{datacenter}/svc/{service}"
            with suppress(_OtherDatacenterError):
                leaf = await self._signed(uri)
                self._datacenters = [datacenter]
                return leaf
        raise RegistryError(f"Consul at {self._address} is in none of the datacenters {', '.join(self._datacenters)}")

    async def _signed(self, uri: str) -> Leaf:
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
        request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, False)
        pem = request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()
        sign = self._channel().unary_unary(f"{_SERVICE}/Sign")
        with self._errors(f"a certificate for {uri}"):
            told = await sign(encode(1, pem), metadata=await self._metadata(), timeout=self._settings.timeout)
            certificate = _only(told, 2)
            expires = x509.load_pem_x509_certificate(certificate.encode()).not_valid_after_utc
        kind, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        secret = key.private_bytes(kind, form, serialization.NoEncryption()).decode()
        return Leaf(certificate, secret, uri, expires)

    def _channel(self) -> Any:
        """Another one, once a file has changed: who signs for the servers may have. What runs on the former runs on."""
        if (files := _files(self._mesh, self._settings)) != self._files:
            self._files = files
            self._channels.append(_open(self._mesh, self._settings, files))
        return self._channels[-1]

    async def _metadata(self) -> tuple[tuple[str, str], ...]:
        token = await self._consul.http.current_token()
        return (("x-consul-token", token),) if token else ()

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        where = f"Consul's gRPC at {self._address} did not give {what}"
        try:
            yield
        except grpc.aio.AioRpcError as error:
            if "different datacenter" in str(error.details()):
                raise _OtherDatacenterError(str(error.details())) from None
            refused = error.code() in {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED}
            kind = RegistryError if refused else RegistryUnavailableError
            raise kind(f"{where}: {error.code().name}, {str(error.details())[:300]}") from None
        except ValueError as error:
            raise RegistryUnavailableError(f"{where}, but a broken answer: {error}") from None


class _OtherDatacenterError(RegistryError):
    pass


def _only(message: bytes, number: int) -> str:
    found = chunks(message, number)
    if len(found) != 1:
        raise ValueError(f"{len(found)} values by the number {number}")
    return found[0].decode()


def _files(mesh: MeshSettings, settings: ConsulSettings) -> tuple[bytes | None, ...]:
    """Authority, key and certificate."""
    files = {
        "CONSUL_GRPC_CACERT": mesh.grpc_ca_file,
        "CONSUL_CLIENT_KEY": settings.client_key,
        "CONSUL_CLIENT_CERT": settings.client_cert,
    }
    return tuple(_content(*each) for each in files.items())


def _open(mesh: MeshSettings, settings: ConsulSettings, files: tuple[bytes | None, ...]) -> Any:
    scheme, _, address = str(mesh.grpc_address).rpartition("://")
    if scheme == "http" or (not scheme and mesh.grpc_ca_file is None):
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    credentials = grpc.ssl_channel_credentials(*files)
    name = settings.tls_server_name
    options = [("grpc.ssl_target_name_override", name)] if name else []
    return grpc.aio.secure_channel(address, credentials, options=[*_OPTIONS, *options])


def _content(variable: str, file: Path | None) -> bytes | None:
    try:
        return None if file is None else file.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"{variable} {file} can't be read ({error.strerror})") from None
