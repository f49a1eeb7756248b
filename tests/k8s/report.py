"""What the scenes on nodes came to."""

from collections import Counter
from dataclasses import dataclass

from tests.e2e.report import Scene
from tests.k8s.traffic import Traffic


@dataclass
class Row(Scene):
    """A scene that is called by name from a pod."""

    HEAD = ("scene", "GET", "POST", "twice", "longest", "seconds", "seen")
    load: Traffic | None = None

    @property
    def counts(self) -> list[str]:
        if self.load is None:
            return [""] * 4
        reports = [self.load.report(method) for method in ("GET", "POST")]
        failed = [f"{len(report.failures)} of {report.calls:,}" for report in reports]
        longest = max((call.seconds for report in reports for call in report.outcomes), default=0.0)
        return [*failed, f"{len(self.load.doubled)}", f"{longest:.1f} s"]

    def saw_failures(self) -> None:
        """Adds how calls failed, as a figure for each kind of error."""
        if self.load is not None:
            kinds = Counter(
                f"{method}: {call.error}" for method in ("GET", "POST") for call in self.load.failures(method)
            )
            self.seen += [f"{count} × {kind}" for kind, count in kinds.items()]
