"""What says so when a module is imported whose extra is not installed."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["extra"]


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports of what only this extra brings. Raises: ModuleNotFoundError, which says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}: registry.{name} needs what its extra brings; install registry[{name}]", name=error.name
        ) from error
