"""What a run found: every sample with the machine and the versions it is from, and ratios between clients."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

from benchmarks.failover import Outcome
from benchmarks.many import Churn, Held
from benchmarks.mesh import MeshCost
from benchmarks.overload import Overload
from benchmarks.throughput import Sample

__all__ = ["Results", "environment"]

PACKAGES = ("aiohttp", "h11", "httpx", "httpx-aiohttp", "httpx2", "py-consul")


@dataclass(frozen=True)
class Results:
    """One run."""

    environment: dict[str, str]
    rounds: int
    seconds: float
    """Of one sample."""
    samples: list[Sample]
    pick: dict[int, float]
    """Instances → median µs of a pick."""
    consul_requests: int
    """Per 10,000 calls."""
    overhead: dict[str, float]
    """What is measured → µs of CPU beyond the same without it."""
    blocking: dict[str, float]
    """Blocking client → µs of CPU per call."""
    mesh: list[MeshCost]
    failover: list[Outcome]
    overload: list[Overload]
    held: list[Held]
    churn: Churn

    def sizes(self) -> list[int]:
        """The numbers of instances, ascending."""
        return sorted({sample.instances for sample in self.samples})

    def callers(self) -> list[int]:
        """The numbers of callers, ascending."""
        return sorted({sample.callers for sample in self.samples})

    def median(self, client: str, callers: int, instances: int, figure: Callable[[Sample], float]) -> float:
        """The figure's median over all rounds."""
        return median(map(figure, self._of(client, callers, instances).values()))

    def ratio(self, client: str, base: str, callers: int, instances: int, figure: Callable[[Sample], float]) -> float:
        """The client's figure by the base's in each round, and the median of that.

        What disturbs a whole round, such as others on the machine, disturbs both.
        """
        ours, theirs = self._of(client, callers, instances), self._of(base, callers, instances)
        return median(figure(ours[turn]) / figure(theirs[turn]) for turn in ours.keys() & theirs.keys())

    def _of(self, client: str, callers: int, instances: int) -> dict[int, Sample]:
        return {
            sample.round: sample
            for sample in self.samples
            if (sample.client, sample.callers, sample.instances) == (client, callers, instances)
        }


def environment(consul: str) -> dict[str, str]:
    """The machine and the versions, with Consul's; never the host's name."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [
        line.partition(":")[2].strip()
        for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
        if line.startswith("model name")
    ]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "Python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "Consul": consul,
        "load before": f"{os.getloadavg()[0]:.1f}",
    }
