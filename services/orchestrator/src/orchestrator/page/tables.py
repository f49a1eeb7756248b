"""The tables of the page: the instances of every service, and who calls whom."""

from collections.abc import Iterable, Mapping, Sequence

from orchestrator.page.sheet import Cell, Group, Row, Tone
from orchestrator.page.sight import Seen, Sighting, Use
from orchestrator.page.words import added, clock, counts, per_second, reasons, seconds, whole_number

__all__ = ["condition", "instance_columns", "instance_groups", "tally", "use_rows"]

_GONE = {
    "critical": "gone: critical",
    "maintenance": "gone: in maintenance",
    "vanished": "gone: vanished",
    "uncallable": "gone: can't be called",
}
_TALLIED: tuple[tuple[Tone, str], ...] = (
    ("live", "live"),
    ("ejected", "ejected"),
    ("doubtful", "in doubt"),
    ("gone", "gone"),
)


def condition(seen: Seen) -> Cell:
    """How an instance stands, in one or two words, and the reason."""
    if seen.left is not None:
        return Cell(text=_GONE.get(seen.left.kind, f"gone: {seen.left.kind}"), detail=seen.left.reason, tone="gone")
    listing = [sighting for sighting in seen.sightings if sighting.endpoint.listed]
    if ejecting := [sighting for sighting in listing if sighting.endpoint.ejected_because]:
        return _ejected(ejecting, len(listing))
    told = seen.told
    if told is not None and told.state is not None and told.state.instance.leaving:
        return Cell(text="leaving", detail="it was told to stop", tone="doubtful")
    if told is not None and told.silent:
        return Cell(text="silent", detail=f"it {told.error}", tone="doubtful")
    said = [
        "" if seen.sightings else "nobody calls it",
        f"asked what it sees, it {told.error}" if told and told.error else "",
    ]
    return Cell(text="live", detail="; ".join(part for part in said if part), tone="live")


def _ejected(ejecting: Sequence[Sighting], callers: int) -> Cell:
    why = sorted({(sighting.endpoint.ejected_because or "").replace("_", " ") for sighting in ejecting})
    back = max(sighting.endpoint.ejected_for for sighting in ejecting)
    who = f"by {len(ejecting)} of {callers} callers" if callers > 1 else f"by {ejecting[0].use.caller.instance.id}"
    until = f"may be tried in {back:.1f} s" if back else "the next call tries it"
    return Cell(text=f"ejected: {', '.join(why)}", detail=f"{who}, {until}", tone="ejected")


def instance_columns(*, zoned: bool) -> tuple[str, ...]:
    """The headings. ``zoned``: with the zone of each instance, as there are any zones."""
    zone = ("Zone",) if zoned else ()
    return "Instance", "State", *zone, "Share of picks, last 10 s", "Picks, and why", *_FIGURES


_FIGURES = ("In flight", "Latency", "Attempts ended", "Last failure (UTC)")


def instance_groups(services: Mapping[str, Sequence[Seen]], *, zoned: bool) -> tuple[Group, ...]:
    """One group of rows for each service."""
    return tuple(_group(service, instances, zoned) for service, instances in services.items())


def _group(service: str, instances: Sequence[Seen], zoned: bool) -> Group:
    recent = {seen.key: sum(_recent_picks(seen)) for seen in instances}
    total = sum(recent.values())
    found = [(seen, condition(seen)) for seen in instances]
    return Group(
        key=service,
        heading=service,
        detail=tally(cell.tone for _, cell in found) or "nobody",
        rows=tuple(_row(seen, cell, recent[seen.key] / total if total else None, zoned) for seen, cell in found),
    )


def tally(tones: Iterable[Tone]) -> str:
    """As in ``3 live, 1 ejected``."""
    found = list(tones)
    return ", ".join(f"{count} {word}" for tone, word in _TALLIED if (count := found.count(tone)))


def _recent_picks(seen: Seen) -> Iterable[int]:
    for sighting in seen.sightings:
        if sighting.use.rates:
            yield sighting.use.rates.picks.get(sighting.endpoint.spot, 0)


def _row(seen: Seen, state: Cell, share: float | None, zoned: bool) -> Row:
    endpoints = [sighting.endpoint for sighting in seen.sightings]
    told = seen.told.state if seen.told else None
    about = [seen.netloc, told.instance.version if told else "", *(seen.instance.tags if seen.instance else ())]
    picks = sum(endpoint.picks for endpoint in endpoints)
    failures = [endpoint.last_failure for endpoint in endpoints if endpoint.last_failure]
    last = max(failures, key=lambda failure: failure.at, default=None)
    slowest = max((endpoint.latency for endpoint in endpoints if endpoint.picks), default=None)
    return Row(
        key=seen.key,
        cells=(
            Cell(text=seen.id, detail=" · ".join(part for part in about if part)),
            state,
            *((Cell(text=seen.zone or "–"),) if zoned else ()),
            _NONE if share is None else Cell(text=f"{100 * share:.0f} %", meter=f"{share:.3g}"),
            Cell(text=whole_number(picks), detail=reasons(added(endpoint.picked for endpoint in endpoints))),
            Cell(text=whole_number(sum(endpoint.in_flight for endpoint in endpoints))),
            Cell(text="–" if slowest is None else seconds(slowest)),
            Cell(text=counts(added(endpoint.outcomes for endpoint in endpoints)) or "–"),
            Cell(text=f"{clock(last.at)} {last.outcome.replace('_', ' ')}", detail=last.detail) if last else _NONE,
        ),
    )


_NONE = Cell(text="–")


def use_rows(found: Iterable[Use]) -> tuple[Row, ...]:
    """Who calls whom: one row for each caller and service."""
    rows = sorted((_use_row(use) for use in found), key=lambda row: row.key)
    return tuple(rows)


def _use_row(use: Use) -> Row:
    upstream, rates = use.upstream, use.rates
    tag = "" if upstream.tag is None else f"tag {upstream.tag}"
    retries, budget = upstream.retries, upstream.budget
    return Row(
        key=f"{use.caller.instance.id} {use.caller.instance.netloc} {upstream.service} {tag}",
        cells=(
            Cell(text=use.caller.instance.id),
            Cell(text=upstream.service, detail=tag),
            _flow(use),
            Cell(text=per_second(rates.calls) if rates else "–"),
            Cell(text=whole_number(sum(upstream.calls.values())), detail=counts(upstream.calls)),
            Cell(text=per_second(rates.retries) if rates else "–"),
            Cell(text=whole_number(sum(retries.values())), detail=_after(use)),
            Cell(
                text=f"{budget.left:.0f} left",
                detail=f"{whole_number(budget.exhausted)} refused" if budget.exhausted else "",
            ),
            _view(use),
        ),
    )


def _flow(use: Use) -> Cell:
    if use.caller.error is not None and use.caller.age is not None:
        return Cell(text=f"as {use.caller.age:.0f} s ago", detail=f"the caller {use.caller.error}", tone="doubtful")
    if use.upstream.failing_fast_for:
        return Cell(
            text="fails fast",
            detail=f"every instance fails; tries again in {use.upstream.failing_fast_for:.1f} s",
            tone="ejected",
        )
    return Cell(text="live", tone="live")


def _after(use: Use) -> str:
    said = [f"after {counts(use.upstream.retries)}" if any(use.upstream.retries.values()) else ""]
    said += [f"hedges: {counts(use.upstream.hedges)}" if any(use.upstream.hedges.values()) else ""]
    return "; ".join(part for part in said if part)


def _view(use: Use) -> Cell:
    view = use.upstream.view
    age = "unknown" if view.age is None else f"{view.age:.0f} s"
    return Cell(text=age, detail=view.error or "", tone="doubtful" if view.error else "")
