"""From a template and a request to files, with copier."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import copier

from tools.new_service.request import Request
from tools.services import ROOT

__all__ = ["answers", "format_code", "render"]

_TEMPLATES = ROOT / "templates"


def answers(request: Request, **more: Any) -> dict[str, Any]:
    """What the templates ask for."""
    return {
        "name": request.name,
        "package": request.package,
        "port": request.port,
        "description": f"One route that calls {request.calls} by name",
        "calls": request.calls,
        **more,
    }


def render(template: str, into: Path, data: dict[str, Any]) -> None:
    """Renders templates/<template>; files that are there already are replaced. Raises: copier.errors.CopierError."""
    copier.run_copy(str(_TEMPLATES / template), into, data, defaults=True, overwrite=True, quiet=True)


def format_code(folder: Path) -> None:
    """Imports and lines in the order and length that the tools of its repository want: both depend on the name."""
    ruff = [sys.executable, "-m", "ruff"]
    subprocess.run([*ruff, "check", "--quiet", "--fix", "--select", "I", str(folder)], check=True)
    subprocess.run([*ruff, "format", "--quiet", str(folder)], check=True)
