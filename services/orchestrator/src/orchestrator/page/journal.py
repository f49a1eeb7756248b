"""What happened, told once: the events of all instances and what Consul's answers differ in, merged for reading.

It is there to be read. What the page shows of now comes from snapshots, and never from here.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from orchestrator.page.catalog import Listing
from orchestrator.page.state import Event

__all__ = ["Entry", "Journal"]

SIZE = 300
TOGETHER = 30.0
"""Seconds within which several who saw the same tell of the same."""
CONSUL = "Consul"
_About: TypeAlias = tuple[str, str, str | None]
"""A kind, a service, an instance."""
_KINDS = {
    "registered": "joined",
    "withdrawn": "left",
    "left": "left",
    "ejected": "ejected",
    "reinstated": "came back",
    "failing_fast": "failing fast",
    "recovered": "recovered",
    "watch_lost": "lost Consul",
    "watch_back": "has Consul again",
    "in_doubt": "registration in doubt",
}
"""That a caller got to know of somebody is no news; the instance's own word, or Consul's, is."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the journal."""

    number: int
    at: float
    """Unix time, when the first of them saw it."""
    kind: str
    service: str
    instance: str | None
    reason: str
    detail: str
    by: tuple[str, ...]
    """Who saw it."""


class Journal:
    """Keeps the last entries."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        """By number, the oldest first."""
        self._latest: dict[_About, int] = {}
        self._number = 0
        self._listed: dict[str, set[str]] | None = None

    def __iter__(self) -> Iterator[Entry]:
        return iter(sorted(self._entries.values(), key=lambda entry: (entry.at, entry.number), reverse=True))

    def heard(self, news: Iterable[tuple[str, Event]]) -> None:
        """What instances have seen, each by its id."""
        for caller, event in sorted(news, key=lambda each: each[1].at):
            if kind := _KINDS.get(event.kind):
                own = event.kind in {"registered", "withdrawn"}
                self._add(
                    at=event.at,
                    kind=kind,
                    service=event.service,
                    instance=(event.instance or caller) if own else event.instance,
                    reason="withdrew" if event.kind == "withdrawn" else event.reason,
                    detail=event.detail,
                    by=caller,
                )

    def compared(self, listings: Iterable[Listing], at: float) -> None:
        """What Consul lists now. The first time, nobody has joined: they were there before."""
        now = {listing.service: {each.id for each in listing.passing} for listing in listings}
        why: Mapping[str, Mapping[str, tuple[str, str]]] = {
            listing.service: {left.id: (left.kind, left.reason) for left in listing.left_out} for listing in listings
        }
        before, self._listed = self._listed, now
        for service in () if before is None else sorted(now.keys() | before.keys()):
            present, past = now.get(service, set()), before.get(service, set()) if before else set()
            for instance in sorted(present - past):
                self._add(at, "joined", service, instance, "", "", CONSUL)
            for instance in sorted(past - present):
                reason, detail = why.get(service, {}).get(instance, ("vanished", ""))
                self._add(at, "left", service, instance, reason, detail, CONSUL)

    def _add(self, at: float, kind: str, service: str, instance: str | None, reason: str, detail: str, by: str) -> None:
        about = kind, service, instance
        entry = self._entries.get(self._latest.get(about, 0))
        same = entry is not None and (kind == "joined" or entry.reason == reason) and abs(entry.at - at) < TOGETHER
        if entry is not None and same and by not in entry.by:
            self._entries[entry.number] = replace(
                entry,
                at=min(entry.at, at),
                reason=entry.reason or reason,
                detail=entry.detail or detail,
                by=(*entry.by, by),
            )
            return
        self._number += 1
        self._latest[about] = self._number
        self._entries[self._number] = Entry(self._number, at, kind, service, instance, reason, detail, (by,))
        if len(self._entries) > SIZE:
            oldest = self._entries.pop(next(iter(self._entries)))
            about = oldest.kind, oldest.service, oldest.instance
            if self._latest[about] == oldest.number:
                del self._latest[about]
