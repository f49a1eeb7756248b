"""A token that lets somebody in at the locked front door for an hour: `python -m deploy.kubernetes.passes alice`.

Takes kubectl, as somebody who may read the Secret with the vault, and openssl.
"""

import base64
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from deploy.keeper.cluster import VAULT
from deploy.keeper.passes import sign_pass
from deploy.keeper.vault import Vault

__all__ = ["sign"]


def sign(secret: str, subject: str) -> str:
    """The token. ``secret``: the vault's Secret, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        vault = Vault(Path(folder))
        vault.callers_key.write_bytes(base64.b64decode(json.loads(secret)["data"][vault.callers_key.name]))
        return sign_pass(vault, subject)


if __name__ == "__main__":
    command = ["kubectl", "--namespace", "registry", "get", "secret", VAULT, "--output=json"]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    sys.stdout.write(f"{sign(found, sys.argv[1])}\n")
