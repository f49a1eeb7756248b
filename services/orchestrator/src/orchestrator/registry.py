"""The public names of the ``registry`` package, under the path that the quick start shows."""

import registry
from registry import *  # noqa: F403

__all__: list[str] = []
__all__ += registry.__all__
