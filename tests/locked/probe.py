"""What somebody at the agent notices of Consul meanwhile: gaps between good answers to reads and writes."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.e2e.system import BACKEND
from tests.locked.system import LockedSystem

_EVERY = 0.05
_PATIENCE = 1.0
"""Seconds; a question that hangs at a leader that is gone must not hide that the next one is answered."""
_KINDS = {
    "reads": ("GET", f"/v1/health/service/{BACKEND.name}"),
    "stale reads": ("GET", f"/v1/health/service/{BACKEND.name}?stale"),
    "writes": ("PUT", "/v1/kv/probe"),
}


class Probe:
    """Three threads, each asking one thing again and again."""

    def __init__(self, system: LockedSystem) -> None:
        self._system = system
        self._token = system.token("management")
        self._ended = threading.Event()
        self._gaps = dict.fromkeys(_KINDS, 0.0)
        self._failed = dict.fromkeys(_KINDS, 0)
        self._threads = [threading.Thread(target=self._ask, args=(kind,), daemon=True) for kind in _KINDS]

    def start(self) -> None:
        """Asks from now on."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Asks no more."""
        self._ended.set()
        for thread in self._threads:
            thread.join(15)

    def told(self) -> str:
        """The longest gap between good answers, and how many were no good, of each kind."""
        return ", ".join(f"{kind}: gap {self._gaps[kind]:.1f} s, {self._failed[kind]} refused" for kind in _KINDS)

    def _ask(self, kind: str) -> None:
        method, path = _KINDS[kind]
        last = time.monotonic()
        headers = {"X-Consul-Token": self._token}
        with httpx.Client(
            base_url=self._system.consul,
            headers=headers,
            verify=self._system.trust,
            timeout=_PATIENCE,
            trust_env=False,
        ) as client:
            while not self._ended.is_set():
                begun = time.monotonic()
                try:
                    good = client.request(method, path).is_success
                except httpx.TransportError:
                    good = False
                now = time.monotonic()
                if good:
                    self._gaps[kind], last = max(self._gaps[kind], now - last), now
                else:
                    self._failed[kind] += 1
                self._ended.wait(max(0.0, _EVERY - (now - begun)))


@contextmanager
def probing(system: LockedSystem) -> Iterator[Probe]:
    """Asks while the context is open; what it noticed can be read after that."""
    probe = Probe(system)
    probe.start()
    try:
        yield probe
    finally:
        probe.stop()
