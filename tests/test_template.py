"""The services here are instances of the template that the next one is rendered from, so the template can't rot."""

import ast
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tools.new_service.render import render
from tools.new_service.wiring import MARKS
from tools.services import ROOT, SERVICES, Service


def rendered(service: Service, folder: Path) -> Path:
    """The service, rendered again with its answers."""
    project = tomllib.loads((ROOT / "services" / service.folder / "pyproject.toml").read_text())["project"]
    data = {
        "name": project["name"].removesuffix("-api"),
        "port": service.port,
        "description": project["description"],
        "package": service.folder,
    }
    render("service", folder / "service", data)
    render("wiring", folder / "wiring", {"calls": "", **data})
    return folder


def lacks(have: Sequence[str], want: Sequence[str]) -> list[str]:
    """What of ``want`` is not in ``have`` in the same order."""
    rest = iter(have)
    return [line for line in want if line not in rest]


def frame_of_program(source: str) -> list[str]:
    """A main.py without its imports, components, own client and lifespan: statement by statement, however laid out."""
    module = ast.parse(source)
    [create_app] = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "create_app"]
    for call in [node for node in ast.walk(create_app) if isinstance(node, ast.Call)]:
        own = isinstance(call.func, ast.Name) and call.func.id == "health_router"
        call.keywords = [
            keyword for keyword in call.keywords if not own and keyword.arg not in {"client", "inner", "trust_caller"}
        ]
    body = [ast.unparse(statement) for statement in create_app.body]
    return [ast.get_docstring(module) or "", ast.unparse(create_app.args), *body, ast.unparse(module.body[-1])]


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.folder)
def test_a_service_is_an_instance_of_the_template(service: Service, tmp_path: Path) -> None:
    """Rendered again, a service of this repository differs in its domain only (templates/service/copier.yml)."""
    new = rendered(service, tmp_path) / "service"
    old = ROOT / "services" / service.folder
    package = Path("src", service.folder)

    projects: list[dict[str, Any]] = [tomllib.loads((folder / "pyproject.toml").read_text()) for folder in (old, new)]
    assert lacks(*(project["project"].pop("dependencies") for project in projects)) == []
    assert projects[0] == projects[1]

    assert (old / package / "__init__.py").read_text() == (new / package / "__init__.py").read_text()

    now, then = (frame_of_program((folder / package / "main.py").read_text()) for folder in (old, new))
    assert lacks(now, then) == []
    assert (now[:2], now[-2:]) == (then[:2], then[-2:])

    settings = (new / package / "settings.py").read_text()
    head = settings[: settings.index(f"port: int = {service.port}\n")]
    assert (old / package / "settings.py").read_text().startswith(head)

    readmes = [(folder / "README.md").read_text() for folder in (old, new)]
    assert readmes[0].splitlines()[:3] == readmes[1].splitlines()[:3]
    [command] = re.findall(r"```bash background\n(.*\n)```", readmes[1])
    assert f"```bash background\n{command}```" in readmes[0]


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.folder)
def test_a_service_is_wired_in_as_the_template_does_it(service: Service, tmp_path: Path) -> None:
    """Every line that wiring a service in would add is there; backend-api also waits for its database."""
    blocks = rendered(service, tmp_path) / "wiring"
    for name, marks in MARKS.items():
        lines = (ROOT / name).read_text().splitlines()
        for mark in set(marks) - {"readme", "calls"}:  # where the words are its own
            missing = set((blocks / mark).read_text().splitlines()) - set(lines)
            assert all("depends_on" in line and service.folder == "backend" for line in missing), missing


def test_every_mark_has_its_block() -> None:
    """Each block of templates/wiring has one place, and each place a block."""
    blocks = sorted(path.stem for path in (ROOT / "templates/wiring").glob("*.jinja"))
    assert blocks == sorted(mark for marks in MARKS.values() for mark in marks)
