"""What a caller of many instances pays for a change: how long its event loop is held, and memory that stays."""

import asyncio
import gc
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import psutil

from benchmarks.fleet import Site, health, joins, leaves, running_site
from registry import ConnectionOptions, ConsulResolver, ConsulSettings
from registry.discovery.pool import Pool
from registry.discovery.roster import Roster
from registry.discovery.upstream import Upstream
from registry.telemetry import Event, Observer

__all__ = ["HELD", "LEFT", "MEMORY", "Churn", "Held", "many"]

HELD = {1_000: 5.0, 10_000: 30.0}
"""Instances → ms that one change may hold the loop."""
MEMORY = 120.0
"""MB that the whole process of a caller of 10,000 may take."""
LEFT = 1.02
"""How many objects there may be at the end of the churn, by those after its first minutes."""
TICK = 0.002
"""Seconds between two looks at the clock: what is late by more held the loop."""
PER_MINUTE = 1_000
"""Changes."""
CHURNED = 1_000
"""Instances while they come and go."""


@dataclass(frozen=True)
class Hold:
    """The longest that something held an event loop, in ms."""

    late: float
    """That others on it had to wait."""
    busy: float
    """Of CPU."""


@dataclass(frozen=True)
class Held:
    """A caller of so many instances."""

    instances: int
    first: Hold
    """The first list, from the beginning."""
    changes: list[Hold]
    """Each change of one instance."""
    idle: list[Hold]
    """As long without one: what the machine does of its own accord."""
    memory: float
    """MB of the whole process, at the end."""

    @property
    def late(self) -> float:
        """The median of the changes."""
        return median(each.late for each in self.changes)

    @property
    def busy(self) -> float:
        """Likewise, of CPU."""
        return median(each.busy for each in self.changes)

    @property
    def undisturbed(self) -> float:
        """The median lateness without a change."""
        return median(each.late for each in self.idle)


@dataclass(frozen=True)
class Churn:
    """One joins, one leaves, over and over."""

    changes: int
    seconds: float
    objects: tuple[int, int]
    """That the collector knows: after the first minutes, and at the end."""
    memory: tuple[float, float]
    """MB of the process, then."""

    @property
    def left(self) -> float:
        """Objects at the end, by those before."""
        return self.objects[1] / self.objects[0]


class _Ticker(Observer):
    """Looks at the clock every 2 ms, and remembers the longest that it came late, and the most CPU between two looks.

    The one is what others on the loop have to wait; the other what it would be if nobody else used the machine.
    """

    def __init__(self) -> None:
        self.late = self.busy = 0.0
        self.heard = 0
        """How many changes the watch brought."""
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        last, worked = time.perf_counter(), time.thread_time()
        while True:
            await asyncio.sleep(TICK)
            now, work = time.perf_counter(), time.thread_time()
            self.late, self.busy = max(self.late, now - last - TICK), max(self.busy, work - worked)
            last, worked = now, work

    def happened(self, event: Event) -> None:
        self.heard += event.kind == "watch_changed"

    def take(self) -> Hold:
        """Since this was asked before."""
        hold = Hold(1000 * self.late, 1000 * self.busy)
        self.late = self.busy = 0.0
        return hold


def _caller(port: int, service: str, pipe: Connection) -> None:
    """A process of its own, that picks every 5 ms, and answers "held", "heard" and "left"."""

    async def run() -> None:
        ticker = _Ticker()
        consul = ConsulSettings(host="127.0.0.1", port=port)
        resolver = ConsulResolver(consul, first_answer_timeout=60, observer=ticker)
        await resolver.ready("consul")  # what a connection costs is not of interest here
        ticker.take()
        roster = Roster(size=ConnectionOptions().max_instances)
        upstream = Upstream(resolver, Pool(service, roster=roster), None)
        asked = asyncio.create_task(asyncio.to_thread(pipe.recv))
        explained = time.monotonic()
        while True:
            endpoint = await upstream.pick((), safe=True)
            assert endpoint is not None
            upstream.pool.succeeded(endpoint, 0.001)
            await asyncio.sleep(0.005)
            if time.monotonic() - explained > 1.0:
                upstream.explain()  # as a scrape does
                explained = time.monotonic()
            if asked.done():
                pipe.send(_answer(asked.result(), ticker))
                asked = asyncio.create_task(asyncio.to_thread(pipe.recv))

    asyncio.run(run())


def _answer(question: str, ticker: _Ticker) -> Any:
    if question == "held":
        return ticker.take()
    if question == "heard":
        return ticker.heard
    gc.collect()
    ticker.take()
    return len(gc.get_objects()), psutil.Process().memory_info().rss / 1e6


@contextmanager
def _calling(port: int, service: str) -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_caller, args=(port, service, theirs), daemon=True)
    process.start()
    try:
        yield ours
    finally:
        process.terminate()
        process.join()


def _ask(pipe: Connection, question: str) -> Any:
    pipe.send(question)
    if not pipe.poll(90):
        raise TimeoutError("the caller answered nothing for 90 s")
    return pipe.recv()


def held(site: Site, instances: int, changes: int) -> Held:
    """One instance of so many changes its state, so many times."""
    service = f"many-{instances}"
    site.fill(service, instances)
    victim = f"{service}-10.0.0.0-8002"
    idle: list[Hold] = []
    taken: list[Hold] = []
    with _calling(site.port, service) as pipe:
        first = _ask(pipe, "held")
        _ask(pipe, "left")
        for number in range(changes):
            _ask(pipe, "held")
            time.sleep(0.4)
            idle.append(_ask(pipe, "held"))
            heard = _ask(pipe, "heard")
            site.transact([health("host-0", victim, "passing" if number % 2 else "critical")])
            while _ask(pipe, "heard") == heard:
                time.sleep(0.02)
            time.sleep(0.1)
            taken.append(_ask(pipe, "held"))
        _, memory = _ask(pipe, "left")
    return Held(instances, first, taken, idle, memory)


def churn(site: Site, settle: float, seconds: float) -> Churn:
    """So many changes a minute, for so many seconds after those in which it fills what remembers."""
    service, number = "churned", CHURNED
    site.fill(service, CHURNED)
    with _calling(site.port, service) as pipe:
        found = []
        begun = time.monotonic()
        for until in (settle, settle + seconds):
            while time.monotonic() - begun < until:
                site.transact(joins(service, number))
                site.transact([leaves(service, number - CHURNED)])
                number += 1
                time.sleep(max(0.0, begun + 2 * (number - CHURNED) * 60 / PER_MINUTE - time.monotonic()))
            found.append(_ask(pipe, "left"))
        taken = time.monotonic() - begun
    (objects, memory), (objects_after, memory_after) = found
    return Churn(2 * (number - CHURNED), taken, (objects, objects_after), (memory, memory_after))


def many(quick: bool) -> tuple[list[Held], Churn]:
    """Everything, in eleven minutes; ``quick``: a little of everything, to see that it runs."""
    with running_site() as site:
        found = [held(site, size, 2 if quick else 30) for size in ((10, 300) if quick else (1_000, 10_000))]
        return found, churn(site, *((1.0, 2.0) if quick else (150.0, 450.0)))
