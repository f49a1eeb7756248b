"""Writes down what capacity.py has measured, and what follows from it for larger systems."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fleet import Cpu
from benchmarks.report import table

__all__ = ["Capacity", "Change", "Idle", "write"]

BEGIN, END = "<!-- measured: nox -s capacity -->\n", "<!-- end of what is measured -->\n"
WATCHED = 3
"""Services that a caller watches."""
DEPLOYMENT = 600
"""Seconds in which a deployment replaces all instances of one service: each leaves once and joins once."""
ANSWERS = 5
"""A second that a watch takes at most, and then those that are newest: see ``registry.consul.watch``."""
SYSTEMS = ((10, 10), (10, 100), (100, 100), (10, 1_000), (100, 1_000), (10, 10_000))
"""Services × instances of each."""


@dataclass(frozen=True)
class Change:
    """One of so many instances falls ill or gets well, and one caller hears of it."""

    instances: int
    answer: int
    """Bytes of the answer that says so."""
    cpu: Cpu
    seconds: float
    """Until the caller picks by it; the median."""
    memory: float
    """MiB of the caller, with the list, beyond one that knows nobody."""


@dataclass(frozen=True)
class Idle:
    """A minute in which nothing changes, of one caller that watches so many services."""

    services: int
    cpu: Cpu
    memory: float
    """As above."""


@dataclass(frozen=True)
class Capacity:
    """One run."""

    environment: dict[str, str]
    changes: list[Change]
    idle: list[Idle]
    registration: Cpu
    registration_seconds: float
    check: Cpu
    """One HTTP check that finds what the last one found."""


def write(found: Capacity, page: Path | None) -> None:
    """Replaces the figures in the page; None: prints them."""
    told = "\n\n".join(_sections(found)) + "\n\n"
    if page is None:
        sys.stdout.write(told)
        return
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{told}{END}{rest.partition(END)[2]}")


def _sections(found: Capacity) -> Iterable[str]:
    yield table(["", ""], found.environment.items())
    yield "One change: a check fails or succeeds, and one caller picks by the new list. CPU in ms, each time."
    head = ["instances", "answer", "server", "agent", "caller", "until it picks, ms", "caller's memory, MiB"]
    yield table(head, (_change(each) for each in found.changes))
    yield (
        "A caller that watches so many services, of ten instances each, while nothing changes. CPU in ms per minute; "
        "what server and agent need of their own accord is in the first line."
    )
    idle = (
        [f"{each.services:,}", *_cpu(each.cpu), f"{each.cpu.caller:.1f}", f"{each.memory:.1f}"] for each in found.idle
    )
    yield table(["services", "server", "agent", "caller", "caller's memory, MiB"], idle)
    check, once = found.check, found.registration
    yield (
        f"A registration takes {once.server:.1f} ms of CPU on the server and {once.agent:.1f} ms on the agent, and is "
        f"done after {1000 * found.registration_seconds:.0f} ms. A check that finds what the last one found takes "
        f"{check.agent:.2f} ms on the agent and {check.server:.2f} ms on the server."
    )
    yield f"While one service is deployed within {DEPLOYMENT // 60} minutes, by these figures:"
    measured = {each.instances: each for each in found.changes}
    base = found.changes[0].memory
    systems = (_system(services, measured[size], base) for services, size in SYSTEMS if size in measured)
    head = ["services × instances", "callers", "answers/s", "each watcher", "a caller's core", "all watchers", "memory"]
    yield table(head, systems)


def _change(each: Change) -> list[str]:
    cells = [f"{each.instances:,}", f"{each.answer / 1000:,.0f} kB", *_cpu(each.cpu), f"{each.cpu.caller:.1f}"]
    return [*cells, f"{1000 * each.seconds:.0f}", f"{each.memory:.1f}"]


def _cpu(cpu: Cpu) -> list[str]:
    return [f"{cpu.server:.1f}", f"{cpu.agent:.1f}"]


def _system(services: int, change: Change, base: float) -> list[str]:
    """A row of the model: what a deployment of one service costs those who watch it; ``base``: MiB without lists."""
    callers = services * change.instances
    watchers = WATCHED * change.instances
    answers = min(2 * change.instances / DEPLOYMENT, ANSWERS)
    received = answers * change.answer
    return [
        f"{services} × {change.instances:,}",
        f"{callers:,}",
        f"{answers:.2f}",
        f"{received / 1e6:,.2f} MB/s",
        f"{answers * change.cpu.caller / 10:.1f} %",
        f"{watchers * received * 8 / 1e9:,.2f} Gbit/s",
        f"{base + WATCHED * (change.memory - base):,.0f} MiB",
    ]
