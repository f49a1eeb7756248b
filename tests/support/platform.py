"""A platform that gives its workloads identities, as Kubernetes or a cloud does: JWTs signed with ES256."""

import base64
import json
import time

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

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
        signed = f"{_encoded({'alg': 'ES256', 'typ': 'JWT'})}.{_encoded(claims)}"
        r, s = utils.decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_base64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def _encoded(part: dict[str, object]) -> str:
    return _base64(json.dumps(part).encode())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
