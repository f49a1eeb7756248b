"""What the scenes came to, as a table of Markdown for people."""

from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.traffic import BY_NAME, EDGE, Column, Traffic

_HEAD = ("scene", "by name: GET", "POST", "edge: GET", "POST", "twice", "seconds", "seen")
_STREAMS = [(side, method) for side in (BY_NAME, EDGE) for method in ("GET", "POST")]


@dataclass
class Row:
    """One scene. ``seen``: its figures, in words."""

    name: str
    traffic: Traffic | None = None
    seconds: float = 0.0
    seen: list[str] = field(default_factory=list)
    passed: bool = True

    def saw(self, what: str) -> None:
        """Adds a figure."""
        self.seen.append(what)

    @property
    def cells(self) -> list[str]:
        """In the order of the head."""
        columns = self.traffic.columns if self.traffic else {}
        counts = [_count(columns[stream]) if stream in columns else "" for stream in _STREAMS]
        twice = f"{sum(len(column.duplicated) for column in columns.values())}" if columns else ""
        name = self.name if self.passed else f"**failed:** {self.name}"
        return [name, *counts, twice, f"{self.seconds:.0f}", "; ".join(self.seen)]


def _count(column: Column) -> str:
    return f"{len(column.failures)} of {column.report.calls:,}"


def markdown(rows: list[Row]) -> str:
    """The table."""
    lines = [_HEAD, tuple("---" for _ in _HEAD), *(tuple(row.cells) for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write(rows: list[Row], head: str, path: Path) -> None:
    """The table under these words. Failed calls are counted, ``twice`` are POSTs that were carried out twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}\n\n{markdown(rows)}")
