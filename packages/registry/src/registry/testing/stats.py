"""What the instances of `registry.testing.instances` have received, read from the journals that they write."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Stats", "read_journals"]


@dataclass(frozen=True)
class Stats:
    """What instances have received, as counted by themselves, without requests for ``/health``."""

    requests: int
    methods: Mapping[str, int]
    """Method → requests."""
    modes: Mapping[str, int]
    """How a request was handled (see Mode) → requests."""
    ids: Mapping[str, int]
    """``Idempotency-Key`` or ``X-Request-Id`` → requests with it."""
    bodies: int
    """Requests with a body that arrived completely and was not empty."""

    @property
    def duplicated(self) -> dict[str, int]:
        """The ids that were received more than once."""
        return {id_: times for id_, times in self.ids.items() if times > 1}


def read_journals(journals: Iterable[Path]) -> Stats:
    """What the instances that write these files have received together; see `instance_app` for a line's form."""
    lines = [line.split(b"\t") for journal in journals for line in journal.read_bytes().splitlines()]
    return Stats(
        requests=len(lines),
        methods=Counter(line[0].decode() for line in lines),
        modes=Counter(line[2].decode() for line in lines),
        ids=Counter(line[1].decode() for line in lines if line[1]),
        bodies=sum(line[3] not in {b"0", b"-"} for line in lines),
    )
