"""What the scenes came to, as a table of Markdown for people."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from tests.e2e.traffic import BY_NAME, EDGE, Column, Traffic

_STREAMS = [(side, method) for side in (BY_NAME, EDGE) for method in ("GET", "POST")]


@dataclass
class Scene:
    """One row. ``seen``: its figures, in words."""

    HEAD: ClassVar[tuple[str, ...]]
    name: str
    seconds: float = 0.0
    seen: list[str] = field(default_factory=list)
    passed: bool = True

    def saw(self, what: str) -> None:
        """Adds a figure."""
        self.seen.append(what)

    @property
    def counts(self) -> list[str]:
        """What came of the calls, in the order of the head."""
        raise NotImplementedError

    @property
    def cells(self) -> list[str]:
        """In the order of the head."""
        name = self.name if self.passed else f"**failed:** {self.name}"
        return [name, *self.counts, f"{self.seconds:.0f}", "; ".join(self.seen)]


@dataclass
class Row(Scene):
    """A scene that is called by name and through the edge."""

    HEAD = ("scene", "by name: GET", "POST", "edge: GET", "POST", "twice", "seconds", "seen")
    traffic: Traffic | None = None

    @property
    def counts(self) -> list[str]:
        columns = self.traffic.columns if self.traffic else {}
        twice = f"{sum(len(column.duplicated) for column in columns.values())}" if columns else ""
        return [*(_count(columns[stream]) if stream in columns else "" for stream in _STREAMS), twice]


def _count(column: Column) -> str:
    return f"{len(column.failures)} of {column.report.calls:,}"


def markdown(rows: Sequence[Scene]) -> str:
    """The table, of one kind of rows."""
    head = rows[0].HEAD
    lines = [head, tuple("---" for _ in head), *(tuple(row.cells) for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write(rows: Sequence[Scene], head: str, path: Path) -> None:
    """The table under these words. Failed calls are counted, ``twice`` are POSTs that were carried out twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}\n\n{markdown(rows)}")
