"""Programs that no package here has: built from their Go modules, once for each machine and user, and kept."""

from collections.abc import Callable
from pathlib import Path

from registry.testing.binary import cached, pinned_version
from registry.testing.golang import build_with_go_from_index, build_with_installed_go
from registry.testing.progress import UnavailableError, alone, say

__all__ = ["find_built"]


def find_built(name: str, recipe: Path, module: str, *options: str) -> Path:
    """The program, from the cache or built there with the Go on PATH, else with one from the Python package index.

    ``recipe``: a folder that requires one version of ``module``; ``options``: of go. Blocks for minutes, with progress
    on stderr, when it must be built. Raises: UnavailableError.
    """
    version = pinned_version(recipe, module)
    target = cached(version, name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with alone(target.with_suffix(".lock")):
            if not target.exists():
                say(f"{name.capitalize()} {version} is not in {target.parent}: getting it, once.\n")
                _build(recipe, target, options)
    except OSError as error:
        raise UnavailableError(f"The cache, which XDG_CACHE_HOME can move, can't be used: {error}") from error
    return target


def _build(recipe: Path, target: Path, options: tuple[str, ...]) -> None:
    ways: tuple[Callable[..., None], ...] = (build_with_installed_go, build_with_go_from_index)
    failures = []
    for build in ways:
        try:
            build(recipe, target, *options)
        except UnavailableError as error:
            failures.append(str(error))
            say(f"{error}\n")
        else:
            return
    raise UnavailableError(f"{target.name.capitalize()} can't be built here: {'; '.join(failures)}")
