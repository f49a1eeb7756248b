"""A program built from its Go module: with the Go that is installed, or with one from the Python package index."""

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from registry.testing.progress import UnavailableError, run, say

__all__ = ["build", "build_with_go_from_index", "build_with_installed_go"]

_GO = Path(__file__).parent / "build" / "go.txt"
# The longest step is one large package, or the linker; or one package of Python's index, of 75 MB.
_SILENT_SECONDS = 300.0


def build_with_installed_go(recipe: Path, target: Path, *options: str) -> None:
    """Build `target` with the `go` on PATH and these options of its. Blocks for minutes.

    Raises: UnavailableError, OSError.
    """
    go = shutil.which("go")
    if go is None:
        raise UnavailableError("there is no `go` on PATH")
    build(go, recipe, target, os.environ, *options)


def build_with_go_from_index(recipe: Path, target: Path, *options: str) -> None:
    """Build `target` with a Go that uv or pip installs beside it, and that is removed again with all it fetched.

    Blocks for minutes. Raises: UnavailableError, OSError.
    """
    folder = target.with_name("go")
    _remove(folder)
    go = folder / "site" / "go" / "bin" / "go"
    run(
        [
            *_installer(),
            *("--target", str(folder / "site"), "--no-deps", "--only-binary", ":all:"),
            *("--require-hashes", "-r", str(_GO)),
        ],
        folder=target.parent,
        log=target.with_name("go.log"),
        environment={**os.environ, "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        silence=_SILENT_SECONDS,
        state=lambda _: "installing Go",
    )
    try:
        # Whoever has no Go would not look for what it leaves in other folders: a gigabyte and a half.
        build(
            str(go),
            recipe,
            target,
            {
                **os.environ,
                "GOROOT": "",
                "GOTOOLCHAIN": "local",
                # Modules are read-only otherwise, and could not be removed.
                "GOFLAGS": f"{os.environ.get('GOFLAGS', '')} -modcacherw",
                "GOPATH": str(folder / "path"),
                "GOMODCACHE": str(folder / "path" / "pkg" / "mod"),
                "GOCACHE": str(folder / "cache"),
            },
            *options,
        )
    finally:
        _remove(folder)


def build(go: str, recipe: Path, target: Path, environment: Mapping[str, str], *options: str) -> None:
    """Build `target` from the Go module in the folder `recipe`: what its tools.go imports, of several what is named so.

    Blocks for minutes. Raises: UnavailableError, OSError.
    """
    half_done = target.with_suffix(".new")
    say(f"  compiling {target.stem.capitalize()} takes some minutes, once\n")
    run(
        [
            *(go, "build", "-v", "-mod=readonly", "-trimpath", "-gcflags=all=-dwarf=false", "-ldflags=-s -w"),
            *options,
            *("-o", str(half_done), _package(recipe, target.name)),
        ],
        folder=recipe,
        log=target.with_suffix(".log"),
        # A compiler that collects its garbage less often takes less CPU for these packages; much less often, gigabytes.
        environment={"GOGC": "200", **environment},
        silence=_SILENT_SECONDS,
        state=_steps,
    )
    # A rename is atomic: whoever looks in the cache meanwhile sees a whole binary or none.
    half_done.replace(target)


def _package(recipe: Path, name: str) -> str:
    found: list[str] = re.findall(r'^import _ "(.+)"$', (recipe / "tools.go").read_text(), re.MULTILINE)
    named = found if len(found) == 1 else [package for package in found if package.endswith(f"/{name}")]
    assert len(named) == 1, f"{recipe / 'tools.go'} imports what is to be built"
    return named[0]


def _steps(lines: list[str]) -> str:
    """How far a build is: go writes one line per step."""
    downloads = sum(line.startswith("go: downloading") for line in lines)
    return f"{downloads} modules fetched, {len(lines) - downloads} packages compiled"


def _installer() -> list[str]:
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable]
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install"]
    if pip := shutil.which("pip3") or shutil.which("pip"):
        return [pip, "install"]
    raise UnavailableError("there is neither uv nor pip to install it with")


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
