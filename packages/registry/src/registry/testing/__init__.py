"""Public test tools: real Consul agents, real instances that fail on command, load, and pytest fixtures of them."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["extra"]


@contextmanager
def extra() -> Iterator[None]:
    """Around imports of what only the extra brings. Raises: ModuleNotFoundError, which says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}: registry.testing needs what its extra brings; install registry[testing]", name=error.name
        ) from error
