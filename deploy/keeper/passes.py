"""Who may call the front door: an issuer of tokens for people and programs that have no other one.

A token is a JWT (RFC 7519) signed with Ed25519 (RFC 8037). orchestrator-api gets the public key, as a JWK set.
"""

import json
import subprocess
import tempfile
import time
from pathlib import Path

from deploy.keeper.vault import Vault, encode

__all__ = ["AUDIENCE", "ISSUER", "sign_pass"]

ISSUER, AUDIENCE = "keeper", "orchestrator-api"
"""As docker-compose.locked.yml tells orchestrator-api."""
_SECONDS = 3600


def sign_pass(vault: Vault, subject: str) -> str:
    """A token that lets in ``subject`` for an hour."""
    now = int(time.time())
    [key] = json.loads(vault.callers())["keys"]
    head = {"alg": "EdDSA", "typ": "JWT", "kid": key["kid"]}
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": subject, "iat": now, "exp": now + _SECONDS}
    signed = ".".join(encode(json.dumps(part).encode()) for part in (head, claims))
    with tempfile.TemporaryDirectory() as folder:
        message = Path(folder, "message")
        message.write_text(signed)
        command = ["openssl", "pkeyutl", "-sign", "-rawin", "-inkey", str(vault.callers_key), "-in", str(message)]
        signature = subprocess.run(command, check=True, capture_output=True).stdout
    return f"{signed}.{encode(signature)}"
