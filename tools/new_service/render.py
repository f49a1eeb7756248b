"""From a template and a request to files, with copier."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import copier

from tools.new_service.request import Request
from tools.services import ROOT

__all__ = ["add_lock", "answers", "format_code", "render"]

_TEMPLATES = ROOT / "templates"
_LOCKED = "orchestrator"
_LOCK = ("auth.py", "keys.py")


def answers(request: Request, **more: Any) -> dict[str, Any]:
    """What the templates ask for."""
    return {
        "name": request.name,
        "package": request.package,
        "port": request.port,
        "description": f"One route that calls {request.calls} by name",
        "calls": request.calls,
        "auth": request.auth,
        **more,
    }


def render(template: str, into: Path, data: dict[str, Any]) -> None:
    """Renders templates/<template>; files that are there already are replaced. Raises: copier.errors.CopierError."""
    copier.run_copy(str(_TEMPLATES / template), into, data, defaults=True, overwrite=True, quiet=True)


def add_lock(folder: Path, package: str) -> None:
    """Gives a rendered service the modules by which orchestrator-api asks callers for a token."""
    for name in _LOCK:
        text = (ROOT / "services" / _LOCKED / "src" / _LOCKED / name).read_text()
        (folder / "src" / package / name).write_text(text.replace(_LOCKED, package))


def format_code(folder: Path) -> None:
    """Imports and lines in the order and length that the tools of its repository want: both depend on the name."""
    ruff = [sys.executable, "-m", "ruff"]
    subprocess.run([*ruff, "check", "--quiet", "--fix", "--select", "I", str(folder)], check=True)
    subprocess.run([*ruff, "format", "--quiet", str(folder)], check=True)
