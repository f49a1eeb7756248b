"""The service under examination, as everybody sees it: what it answers, and what its Consul agent knows of it."""

import ipaddress
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import httpx

from registry.conformance.agent import Agent, HealthCheck
from registry.model import Instance
from registry.settings import ConsulSettings

__all__ = ["SIGNATURE", "Shortfall", "Subject", "UnclearError", "is_loopback", "until"]

SIGNATURE = "X-Service-Instance"
ANSWER_SECONDS = 5.0


class Shortfall(Exception):  # noqa: N818  # a finding, no failure of ours
    """A promise is broken: the message says in a sentence what is wrong, and what to do."""


class UnclearError(Exception):
    """Whether a promise is kept can't be told: the message says why."""


def until(condition: Callable[[], object], seconds: float) -> bool:
    """Blocks until the condition holds, and returns whether it did so in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


class Subject:
    """One instance, met at the address that its examiner knows. Blocks."""

    def __init__(self, url: str, consul: ConsulSettings, patience: float) -> None:
        self.url = url.rstrip("/")
        self.agent = Agent(consul)
        self.patience = patience
        """Seconds to wait for what takes its time."""
        self.instance: Instance | None = None
        """As it is registered."""
        self._has_waited = False
        # A new connection for each request, as a new caller would make one.
        limits = httpx.Limits(max_keepalive_connections=0)
        verify = self.url.startswith("https:")
        self._http = httpx.Client(timeout=ANSWER_SECONDS, trust_env=False, limits=limits, verify=verify)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()
        self.agent.close()

    def ask(
        self,
        path: str = "/health",
        *,
        url: str | None = None,
        method: str = "GET",
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """What it answers, or what ``url`` answers in its place. Raises: httpx.TransportError."""
        return self._http.request(method, f"{url or self.url}{path}", params=params, headers=headers)

    def signature(self, url: str | None = None) -> str | None:
        """Who it says it is; None when it doesn't. Raises: httpx.TransportError."""
        name: str | None = self.ask(url=url).headers.get(SIGNATURE)
        return name

    def answers(self, signature: str | None) -> bool:
        """Whether it answers anything at all, and under this name."""
        with suppress(httpx.TransportError):
            return self.signature() == signature
        return False

    def find(self, url: str | None = None) -> Instance | None:
        """How it, or the service at ``url``, is registered: under the id that it says, else with that address."""
        instances, signature = self.agent.instances(), self.signature(url)
        for instance in instances:
            if instance.id == signature:
                return instance
        target = urlsplit(url or self.url)
        port = target.port or (443 if target.scheme == "https" else 80)
        there = [instance for instance in instances if instance.port == port]
        exact = [instance for instance in there if _same_host(instance.address, target.hostname or "")]
        return exact[0] if len(exact) == 1 else None

    def registered(self) -> Instance:
        """How it is registered. Raises: UnclearError."""
        if self.instance is None:
            raise UnclearError("It is not in Consul.")
        return self.instance

    def checks(self) -> list[HealthCheck]:
        """The checks that Consul runs on it, each run at least once if that takes no longer than it should."""
        instance = self.registered()
        checks = self.agent.checks(instance.id)
        slowest = max((check.interval + check.timeout for check in checks), default=0.0)

        def have_run() -> bool:
            nonlocal checks
            checks = self.agent.checks(instance.id)
            return all(check.url for check in checks if check.kind == "http")

        until(have_run, 0.0 if self._has_waited else slowest + 1)
        self._has_waited = True
        return checks

    def is_passing(self) -> bool:
        """Whether discovery finds it."""
        instance = self.registered()
        return instance.id in self.agent.passing(instance.service)


def is_loopback(host: str) -> bool:
    """Whether it leads every machine to itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _same_host(one: str, other: str) -> bool:
    if one.lower() == other.lower():
        return True
    with suppress(OSError):
        found = [{entry[4][0] for entry in socket.getaddrinfo(host, None)} for host in (one, other)]
        return bool(found[0] & found[1])
    return False
