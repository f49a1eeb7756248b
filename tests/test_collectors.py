"""Where Prometheus and Jaeger come from when no image can be pulled: the cache, or a build that fills it."""

from pathlib import Path

import pytest

from deploy.compose import collectors
from deploy.compose.collectors import COLLECTORS, find_collector
from deploy.compose.stack import StackError
from registry.testing.progress import UnavailableError
from tools import built


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "registry-testing"


def build_nothing(recipe: Path, target: Path, *options: str) -> None:
    """No way."""
    raise UnavailableError("there is no `go` on PATH")


@pytest.mark.parametrize("name", COLLECTORS)
def test_it_is_built_once(name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build gets the module's main package and the options; the next who asks gets what it left."""
    go = tmp_path / "bin" / "go"
    go.parent.mkdir()
    go.write_text(
        f'#!/bin/sh\necho "$PWD $@" >>{tmp_path}/built\nwhile [ "$1" != -o ]; do shift; done\necho it >"$2"\n'
    )
    go.chmod(0o755)
    monkeypatch.setenv("PATH", f"{go.parent}:/usr/bin:/bin")
    found = find_collector(name)
    assert find_collector(name) == found
    assert found.read_text() == "it\n"
    assert found.is_relative_to(cache)
    module, options = COLLECTORS[name]
    [built] = (tmp_path / "built").read_text().splitlines()
    folder, *words = built.split()
    assert folder == str(collectors.RECIPES / name)
    assert words[-1] == f"{module}/cmd/{name}"
    assert {*options, "-mod=readonly"} <= set(words)


def test_no_way_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way that failed is named, in one error that the commands show."""
    for way in ("build_with_installed_go", "build_with_go_from_index"):
        monkeypatch.setattr(built, way, build_nothing)
    with pytest.raises(StackError, match=r"Jaeger can't be pulled\. Jaeger can't be built here: there is no `go`"):
        find_collector("jaeger")


def test_a_cache_that_is_no_folder_is_told(cache: Path) -> None:
    """Not a traceback, but what can be done about it."""
    cache.write_text("a file")
    with pytest.raises(StackError, match="XDG_CACHE_HOME"):
        find_collector("prometheus")
