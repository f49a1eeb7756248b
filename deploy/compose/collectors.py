"""Prometheus and Jaeger for machines that can pull no image: built from their Go modules, once, and kept as Consul is.

Debian's package of Prometheus leaves out `consul_sd_configs`; of Jaeger it has none. Neither module holds its pages.
"""

from pathlib import Path

from deploy.compose.stack import HERE, StackError
from registry.testing.progress import UnavailableError
from tools.built import find_built

__all__ = ["COLLECTORS", "RECIPES", "find_collector"]

RECIPES = HERE / "local/collectors"
COLLECTORS = {
    # Of the dozens of ways to find targets, the one that is used: half of the time to build it.
    "prometheus": ("github.com/prometheus/prometheus", ("-tags=remove_all_sd,enable_consul_sd",)),
    "jaeger": ("github.com/jaegertracing/jaeger", ()),
}
"""Name → its module, and options for go. The name is also that of its service, and of its folder in RECIPES."""


def find_collector(name: str) -> Path:
    """Its binary, from the cache or built there: blocks, once per machine and user for about ten minutes, with progress
    on stderr. Raises: StackError.
    """
    module, options = COLLECTORS[name]
    try:
        return find_built(name, RECIPES / name, module, *options)
    except UnavailableError as error:
        raise StackError(f"{name.capitalize()} can't be pulled. {error}") from error
