"""The way to the Consul of a stack in containers, from this machine: plain, or as the locked one asks for it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.compose.stack import Stack
from registry import ServiceRegistry

__all__ = ["consul_of"]


@contextmanager
def consul_of(stack: Stack, *, locked: bool) -> Iterator[ServiceRegistry]:
    """The agent, asked with the token of Consul's UI, which may only read. Raises: StackError, when it does not run."""
    host, port = stack.address("consul", 8500).rsplit(":", 1)
    if not locked:
        with ServiceRegistry(host, int(port)) as registry:
            yield registry
        return
    with tempfile.TemporaryDirectory() as folder:
        trusted = Path(folder, "ca.pem")
        trusted.write_text(stack.ask("exec", "-T", "consul", "cat", "/secrets/ca.pem"))
        token = stack.ask("exec", "-T", "consul", "cat", "/secrets/token").strip()
        with ServiceRegistry(host, int(port), token, "https", ca_file=trusted) as registry:
            yield registry
