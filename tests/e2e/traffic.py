"""Load from both sides while a scene plays, and what each call came to: told by callers, journals and the database."""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.system import BACKEND, System, wait_until
from tests.support.load import Outcome, Report

CALLS = 1_000
"""At least so many of each kind in every scene."""
RATE = 45.0
"""GETs, and POSTs, per second from each side."""
_LONGEST = 150.0
BY_NAME, EDGE = "by name", "edge"


@dataclass
class Column:
    """The calls of one method from one side. Times are seconds since the epoch."""

    report: Report
    duplicated: tuple[str, ...] = ()
    """Ids of POSTs that reached a replica more than once, or are in the database more than once."""
    lost: tuple[str, ...] = ()
    """Ids of POSTs that were answered with 201 and are not in the database."""
    reached: dict[str, set[str]] = field(default_factory=dict)
    """Host of a replica → the ids that reached it."""

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """Those that failed."""
        return self.report.failures

    def failed_after(self, moment: float) -> tuple[Outcome, ...]:
        """Those that failed though they began after this."""
        return self.report.between(moment).failures


class Caller:
    """One process of caller.py, and what it has told so far."""

    def __init__(self, command: list[str]) -> None:
        self.calls: dict[str, list[Outcome]] = {"GET": [], "POST": []}
        self._ready = threading.Event()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_until_ready(self) -> None:
        """Returns when it calls. Raises: TimeoutError."""
        wait_until(self._ready.is_set, 90.0, "a caller is ready")

    def stop(self) -> None:
        """No new call begins; returns when those under way have ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(30) == 0, "a caller failed, see above"
        self._reader.join(10)

    def close(self) -> None:
        """Ends it, whatever it does."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(10)
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line == b"ready\n":
                self._ready.set()
                continue
            call: dict[str, Any] = json.loads(line)
            self.calls[call.pop("method")].append(Outcome(**call))


class Traffic:
    """Both callers, calling while their context is open; made by `traffic`."""

    def __init__(self, system: System, rate: float) -> None:
        self._system = system
        client, calling = str(system.container("client").id), ["-m", "tests.e2e.caller", "--rate", f"{rate}"]
        self._callers = {
            BY_NAME: Caller(["docker", "exec", "-i", client, "python", *calling]),
            EDGE: Caller([sys.executable, *calling, "--edge", system.edge[BACKEND.name]]),
        }
        self.columns: dict[tuple[str, str], Column] = {}
        """(side, method) → its calls; filled when the context ends."""

    def column(self, side: str, method: str) -> Column:
        """What came of it."""
        return self.columns[side, method]

    def ended(self, side: str, method: str) -> list[Outcome]:
        """The calls that have ended so far."""
        return self._callers[side].calls[method]

    def go_on(self, calls: int = CALLS, seconds: float = _LONGEST) -> None:
        """Returns when there are so many of every kind in all. Raises: TimeoutError."""
        lists = [calls_ for caller in self._callers.values() for calls_ in caller.calls.values()]
        wait_until(lambda: min(map(len, lists)) >= calls, seconds, f"{calls} calls of every kind")

    def go_on_for(self, calls: int) -> None:
        """Returns when so many more of every kind have ended. Raises: TimeoutError."""
        counts = [len(calls_) for caller in self._callers.values() for calls_ in caller.calls.values()]
        self.go_on(max(counts) + calls)

    def wait_until_ready(self) -> None:
        """Returns when both call."""
        for caller in self._callers.values():
            caller.wait_until_ready()

    def stop(self) -> None:
        """Ends the load, and reads what the replicas and the database have of it."""
        for caller in self._callers.values():
            caller.stop()
        reached = {file.name: _journal(file) for file in self._system.journals.iterdir()}
        cards = self._system.cards()
        for side, caller in self._callers.items():
            for method, calls in caller.calls.items():
                ids = {call.id for call in calls}
                mine = {host: [each for each in arrived if each in ids] for host, arrived in reached.items()}
                column = Column(Report(tuple(calls)), reached={host: set(arrived) for host, arrived in mine.items()})
                if method == "POST":
                    arrivals = Counter(each for arrived in mine.values() for each in arrived)
                    column.duplicated = tuple(each for each in ids if arrivals[each] > 1 or cards.get(each, 0) > 1)
                    answered = {call.id for call in calls if call.error is None}
                    column.lost = tuple(answered - cards.keys())
                    assert answered <= arrivals.keys(), "a card was answered that reached no replica"
                self.columns[side, method] = column

    def close(self) -> None:
        """Ends both callers, whatever they do."""
        for caller in self._callers.values():
            caller.close()


def _journal(file: Path) -> list[str]:
    return [line.rsplit("\t", 1)[1] for line in file.read_text().splitlines()]


@contextmanager
def traffic(system: System, rate: float = RATE) -> Iterator[Traffic]:
    """Load on backend-api from both sides while the context is open; what came of it can be read after that."""
    load = Traffic(system, rate)
    try:
        load.wait_until_ready()
        yield load
        load.stop()
    finally:
        load.close()


def check_once(column: Column) -> None:
    """Nothing was done twice, and nothing that was answered is lost."""
    assert column.duplicated == (), column.duplicated
    assert column.lost == (), column.lost


def now() -> float:
    """Seconds since the epoch, as the callers tell them."""
    return time.time()
