"""Pytest fixtures with a real Consul agent behind them: `pytest_plugins = ["registry.testing"]`."""
