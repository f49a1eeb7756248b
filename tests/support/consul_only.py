"""A pytest plugin that runs only what talks to a Consul of the fixtures."""

import pytest

_AGENTS = {"consul_agent", "consul_binary", "private_consul_agent"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect each test that none of the fixtures with an agent serves."""
    others = [item for item in items if _AGENTS.isdisjoint(getattr(item, "fixturenames", ()))]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]
