"""Policies without chance, so that a test knows whom a call goes to."""

from registry.discovery.balancing import Candidates
from registry.discovery.endpoint import Endpoint

__all__ = ["in_order"]


def in_order(candidates: Candidates, now: float) -> Endpoint:
    """The first by id."""
    return min(candidates, key=lambda endpoint: endpoint.instance.id)
