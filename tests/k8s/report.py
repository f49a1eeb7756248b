"""What the scenes came to, as a table of Markdown for people."""

from collections import Counter
from dataclasses import dataclass, field

from tests.k8s.traffic import Traffic

_HEAD = ("scene", "GET", "POST", "twice", "longest", "seconds", "seen")


@dataclass
class Row:
    """One scene. ``seen``: its figures, in words."""

    name: str
    load: Traffic | None = None
    seconds: float = 0.0
    seen: list[str] = field(default_factory=list)
    passed: bool = True

    @property
    def cells(self) -> list[str]:
        """In the order of the head."""
        name = self.name if self.passed else f"**failed:** {self.name}"
        if self.load is None:
            return [name, "", "", "", "", f"{self.seconds:.0f}", "; ".join(self.seen)]
        reports = {method: self.load.report(method) for method in ("GET", "POST")}
        counts = [f"{len(report.failures)} of {report.calls:,}" for report in reports.values()]
        longest = max((call.seconds for report in reports.values() for call in report.outcomes), default=0.0)
        failed = Counter(f"{method}: {call.error}" for method, report in reports.items() for call in report.failures)
        seen = self.seen + [f"{count} × {what}" for what, count in failed.items()]
        return [name, *counts, f"{len(self.load.doubled)}", f"{longest:.1f} s", f"{self.seconds:.0f}", "; ".join(seen)]


def markdown(rows: list[Row]) -> str:
    """The table."""
    lines = [_HEAD, tuple("---" for _ in _HEAD), *(tuple(row.cells) for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
