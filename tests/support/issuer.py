"""An issuer of tokens, and what others make who would like to be it."""

import base64
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

ISSUER = "https://issuer.example"
AUDIENCE = "cards"
EC_KEY = "ec/1"
RSA_KEY = "rsa-1"


def encode(part: bytes) -> str:
    """Base64 as tokens have it."""
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


def sign(header: dict[str, Any] | str, claims: dict[str, Any] | str, make: Callable[[bytes], bytes]) -> str:
    """A token of these two parts, however odd, and of what ``make`` takes for a signature."""
    parts = [part if isinstance(part, str) else json.dumps(part) for part in (header, claims)]
    signed = ".".join(encode(part.encode("utf-8", "surrogatepass")) for part in parts)
    return f"{signed}.{encode(make(signed.encode()))}"


@dataclass
class Issuer:
    """Two keys, an RSA one and one on an elliptic curve."""

    rsa_key: rsa.RSAPrivateKey = field(default_factory=lambda: rsa.generate_private_key(65537, 2048))
    ec_key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def jwks(self, *kids: str) -> dict[str, Any]:
        """The public keys; ``kids``: of these only."""
        made = {
            RSA_KEY: RSAAlgorithm.to_jwk(self.rsa_key.public_key(), as_dict=True) | {"alg": "RS256", "use": "sig"},
            EC_KEY: ECAlgorithm.to_jwk(self.ec_key.public_key(), as_dict=True),
        }
        return {"keys": [jwk | {"kid": kid} for kid, jwk in made.items() if not kids or kid in kids]}

    def claims(self, **changed: Any) -> dict[str, Any]:
        """Of a good token; None leaves one out."""
        now = int(time.time())
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "iat": now, "nbf": now, "exp": now + 60} | changed
        return {name: value for name, value in claims.items() if value is not None}

    def token(
        self, kid: str | None = RSA_KEY, alg: str = "RS256", header: dict[str, Any] | None = None, **changed: Any
    ) -> str:
        """A token of its own, good unless something is changed."""
        head = ({"kid": kid} if kid else {}) | (header or {})
        return jwt.encode(self.claims(**changed), self.ec_key if alg.startswith("ES") else self.rsa_key, alg, head)

    def sign(self, header: dict[str, Any] | str, claims: dict[str, Any] | str) -> str:
        """These two parts, truly signed with the RSA key."""
        algorithm = RSAAlgorithm(RSAAlgorithm.SHA256)
        return sign(header, claims, lambda signed: algorithm.sign(signed, self.rsa_key))
