"""A platform that gives its workloads identities, as Kubernetes or a cloud does: JWTs signed with ES256."""

import time

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["Platform"]


class Platform:
    """Signs with a key of its own."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        public = self._key.public_key()
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        self.public_key = public.public_bytes(serialization.Encoding.PEM, form).decode()
        """What verifies its signatures, as PEM."""

    def identity(self, service: str, seconds: float = 300.0) -> str:
        """A JWT for this workload, valid for so long from now on."""
        now = int(time.time())
        claims = {"iss": "platform", "aud": "consul", "sub": service, "iat": now, "exp": now + seconds}
        return jwt.encode(claims, self._key, "ES256")
