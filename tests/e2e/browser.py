"""The browser that looks at pages: the Chromium or Chrome that is installed, else Debian's, if root may install it."""

import os
import shutil
import subprocess
from pathlib import Path

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_PLACES = ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",)
_INSTALL = ("apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium")
_MISSING = (
    "To look at pages, a browser is needed: install Chromium or Chrome (Debian: `apt-get install chromium`), "
    "or name one in CHROMIUM_BIN."
)


def find_browser() -> Path:
    """The executable. Blocks while it is installed, about half a minute. Raises: AssertionError, saying what to do."""
    if found := _installed():
        return found
    if hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (("apt-get", "update", "-qq"), _INSTALL):
            subprocess.run(command, env=environment, capture_output=True, check=False)
    found = _installed()
    assert found, _MISSING
    return found


def _installed() -> Path | None:
    candidates = [os.environ.get("CHROMIUM_BIN"), *map(shutil.which, _NAMES), *_PLACES]
    return next((Path(path) for path in candidates if path and Path(path).exists()), None)
