"""Where test tools keep what lasts longer than one run."""

import os
from pathlib import Path

__all__ = ["cache"]


def cache() -> Path:
    """``registry-testing`` in ``$XDG_CACHE_HOME``, by default in ``~/.cache``; may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "registry-testing")
