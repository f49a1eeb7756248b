"""What contributors and the hosting site go by fits what is here: workflows, hooks, forms, the table of sessions."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.services import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
HOOKS = ROOT / ".pre-commit-config.yaml"


def sessions() -> set[str]:
    """What nox can run here."""
    nox = [sys.executable, "-m", "nox", "--list-sessions", "--noxfile", str(ROOT / "noxfile.py")]
    listed = subprocess.run(nox, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^[*-] ([\w-]+)", listed, re.MULTILINE))


def asked_for(text: str) -> set[str]:
    """Every session that a text tells nox to run."""
    found = re.findall(r"nox -s((?: [a-z][\w-]*)+)", text)
    return {name for names in found for name in names.split()}


def document(path: Path) -> dict[str, Any]:
    """A YAML file; its key ``on`` is a truth to YAML."""
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


def name_of(path: Path) -> str:
    """A file as a test id."""
    return path.name


def test_only_sessions_that_exist_are_asked_for() -> None:
    """Workflows, hooks, CI's script and the contributors' pages name no session that nox does not have."""
    pages = [*WORKFLOWS, HOOKS, ROOT / ".ci/run", *ROOT.glob("*.md"), *(ROOT / ".github").glob("*.md")]
    known = sessions()
    assert {path.name: asked_for(path.read_text()) - known for path in pages} == {path.name: set() for path in pages}


def test_every_session_is_explained() -> None:
    """CONTRIBUTING's table has each session of nox, and no other."""
    rows = re.findall(r"^\| `python3 -m nox -s ([\w-]+)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert set(rows) == sessions()


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_workflows_may_do_little_and_end(path: Path) -> None:
    """A workflow reads only, unless a job says what it writes; jobs have a time limit, actions a major version."""
    workflow = document(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 60
        used = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in used)


def test_only_the_release_can_publish_and_only_behind_its_environment() -> None:
    """The one job that can prove who it is to an index runs nothing of the repository, and somebody lets it through."""
    jobs = {(path.name, name): job for path in WORKFLOWS for name, job in document(path)["jobs"].items()}
    publishing = {key for key, job in jobs.items() if "id-token" in job.get("permissions", {})}
    assert publishing == {("release.yml", "publish")}
    publish = jobs["release.yml", "publish"]
    assert (publish["environment"], publish["needs"]) == ("release", "build")
    assert publish["permissions"] == {"id-token": "write"}
    assert not [step for step in publish["steps"] if "checkout" in step.get("uses", "")]


def test_hooks_run_what_is_here() -> None:
    """Every hook is local and runs a program of the system: none is fetched from elsewhere."""
    hooks = document(HOOKS)
    assert {repository["repo"] for repository in hooks["repos"]} == {"local"}
    for hook in hooks["repos"][0]["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].startswith(("git ", "python3 -m nox -s "))
        assert hook["pass_filenames"] is False


def test_updates_watch_what_exists() -> None:
    """Each entry of Dependabot points to a folder that has what it updates."""
    updates = {
        entry["package-ecosystem"]: entry["directory"] for entry in document(ROOT / ".github/dependabot.yml")["updates"]
    }
    assert updates.keys() == {"github-actions", "gomod"}
    assert (ROOT / updates["gomod"].lstrip("/") / "go.mod").is_file()


@pytest.mark.parametrize(
    "path", [ROOT / f".github/ISSUE_TEMPLATE/{name}.yml" for name in ("bug", "feature")], ids=name_of
)
def test_issue_forms_ask_something(path: Path) -> None:
    """A form has a name and fields with ids of their own, at least one of which must be filled in."""
    form = document(path)
    assert form["name"]
    assert form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_modules_are_read_in_one_sitting() -> None:
    """No module of the package or of a service has more than 250 lines."""
    modules = [*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("services/*/src/**/*.py")]
    sizes = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in modules}
    assert {name: lines for name, lines in sizes.items() if lines > 250} == {}
