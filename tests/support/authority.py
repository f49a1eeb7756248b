"""A mesh's certificate authority of our own, which also signs what Consul's never would."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from registry.mesh.source import Leaf, Roots

__all__ = ["DATACENTER", "Authority", "FixedSource", "Signed"]

DATACENTER = "dc1"
BOTH_USES = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


@dataclass(frozen=True)
class Signed:
    """A certificate, followed by those that lead to its root, and its key; all PEM."""

    certificate: str
    key: str
    expires: datetime
    uris: tuple[str, ...]

    def leaf(self) -> Leaf:
        """As a source of certificates tells it."""
        return Leaf(self.certificate, self.key, self.uris[0], self.expires)


class Authority:
    """Signs with whatever is asked for in the certificate; by default what Consul would put there."""

    def __init__(self, trust_domain: str = "11111111-2222-3333-4444-555555555555.consul") -> None:
        self.trust_domain = trust_domain
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"pri-{id(self)}.consul.ca")])
        builder = _builder(self._name, self._name, self._key, -1, 24)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        usage = dict.fromkeys(_USAGES, False) | {"key_cert_sign": True, "crl_sign": True, "digital_signature": True}
        builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
        identifier = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        builder = builder.add_extension(identifier, critical=False)
        self.root = _pem(builder.sign(self._key, hashes.SHA256()))

    def uri(self, service: str) -> str:
        """What a service's certificate names."""
        return f"spiffe://{self.trust_domain}/ns/default/dc/{DATACENTER}/svc/{service}"

    def roots(self, *others: "Authority") -> Roots:
        """As a source of certificates tells them."""
        return Roots(self.trust_domain, tuple(each.root for each in (self, *others)))

    def sign(
        self,
        *uris: str,
        dns: Sequence[str] = (),
        hours: tuple[float, float] = (-1.0, 72.0),
        uses: Sequence[x509.ObjectIdentifier] = BOTH_USES,
        by_itself: bool = False,
    ) -> Signed:
        """A certificate with these names, valid from and until so many hours from now; ``by_itself``: self-signed."""
        key = ec.generate_private_key(ec.SECP256R1())
        signer, issuer = (key, x509.Name([])) if by_itself else (self._key, self._name)
        builder = _builder(x509.Name([]), issuer, key, *hours)
        names = [*map(x509.UniformResourceIdentifier, uris), *map(x509.DNSName, dns)]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage(list(uses)), critical=False)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        builder = builder.add_extension(authority, critical=False)
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        expires = datetime.now(UTC) + timedelta(hours=hours[1])
        return Signed(_pem(builder.sign(signer, hashes.SHA256())), pem.decode(), expires, uris)

    def service(self, name: str) -> Signed:
        """What Consul would give that service."""
        return self.sign(self.uri(name))


class FixedSource:
    """Tells what it is given with ``tell``, and nothing before."""

    def __init__(self, leaf: Leaf | None = None, roots: Roots | None = None) -> None:
        self._leaf, self._roots = leaf, roots
        self._news = asyncio.Condition()

    async def tell(self, leaf: Leaf | None = None, roots: Roots | None = None) -> None:
        """There is a newer one."""
        async with self._news:
            self._leaf, self._roots = leaf or self._leaf, roots or self._roots
            self._news.notify_all()

    async def leaves(self, service: str) -> AsyncGenerator[Leaf, None]:
        told: list[Leaf] = []
        while True:
            async with self._news:
                await self._news.wait_for(lambda: self._leaf not in [None, *told])
                assert self._leaf is not None
                told[:] = [self._leaf]
            yield told[0]

    async def roots(self) -> AsyncGenerator[Roots, None]:
        told: list[Roots] = []
        while True:
            async with self._news:
                await self._news.wait_for(lambda: self._roots not in [None, *told])
                assert self._roots is not None
                told[:] = [self._roots]
            yield told[0]

    async def aclose(self) -> None: ...


_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, since: float, until: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(hours=since))
        .not_valid_after(now + timedelta(hours=until))
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
