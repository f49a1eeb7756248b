"""Makes the sheet of a moment and a point of view."""

from collections.abc import Iterable

from orchestrator.page.drawing import draw
from orchestrator.page.journal import Entry
from orchestrator.page.sheet import Choice, Group, Line, Sheet, Tone
from orchestrator.page.sight import Picture, uses, whole
from orchestrator.page.tables import instance_columns, instance_groups, tally, use_rows
from orchestrator.page.words import clock

__all__ = ["compose"]

_TONES: dict[str, Tone] = {
    "joined": "live",
    "came back": "live",
    "recovered": "live",
    "has Consul again": "live",
    "ejected": "ejected",
    "failing fast": "ejected",
    "left": "gone",
    "lost Consul": "doubtful",
    "registration in doubt": "doubtful",
}
LINES = 100


def compose(picture: Picture, caller: str = "") -> Sheet:
    """``caller``: an instance's id; empty: all of them."""
    services, using = whole(picture.outlook, picture.told, caller), list(uses(picture.told, caller))
    zoned = any(seen.zone for instances in services.values() for seen in instances)
    groups = instance_groups(services, zoned=zoned)
    return Sheet(
        epoch=picture.epoch,
        number=picture.number,
        at=clock(picture.at),
        caller=caller,
        choices=_choices(picture, caller),
        outage=_outage(picture),
        summary=_summary(groups),
        freshness=_freshness(picture),
        columns=instance_columns(zoned=zoned),
        instances=groups,
        calls=use_rows(using),
        disagreements=picture.disagreements,
        journal=tuple(_line(entry) for entry in picture.entries[:LINES]),
        drawing=draw(services, using),
    )


def _choices(picture: Picture, caller: str) -> tuple[Choice, ...]:
    callers = sorted({use.caller.instance.id for use in uses(picture.told)})
    choices = [Choice(value="", label="all callers"), *(Choice(value=each, label=each) for each in callers)]
    if caller and caller not in callers:
        choices.append(Choice(value=caller, label=f"{caller} (calls nobody now)"))
    return tuple(choices)


def _outage(picture: Picture) -> str:
    outlook = picture.outlook
    if outlook.error is None:
        return ""
    if outlook.age is None:
        return f"Consul can't be asked, and nothing is known yet. {outlook.error}"
    return (
        f"Consul can't be asked: this is its list of {outlook.age:.0f} s ago, which callers go on with. {outlook.error}"
    )


def _freshness(picture: Picture) -> str:
    outlook = picture.outlook
    age = "has not answered yet" if outlook.age is None else f"answered {outlook.age:.0f} s ago"
    silent = sum(1 for told in picture.told if told.error is not None)
    late = f", {silent} of them silent" if silent else ""
    untold = f" {outlook.untold} more services are not shown." if outlook.untold else ""
    return f"Consul at {outlook.source} {age}; {len(picture.told)} instances tell what they see{late}.{untold}"


def _summary(groups: Iterable[Group]) -> str:
    found = list(groups)
    instances = sum(len(group.rows) for group in found)
    how = tally(row.cells[1].tone for group in found for row in group.rows)
    return f"{len(found)} services, {instances} instances" + (f": {how}" if how else "")


def _line(entry: Entry) -> Line:
    what = f"{entry.service} {entry.kind}" if entry.instance is None else f"{entry.instance} {entry.kind}"
    why = f": {entry.reason.replace('_', ' ')}" if entry.reason else ""
    detail = f" ({entry.detail})" if entry.detail else ""
    by = [name for name in entry.by if name != entry.instance]
    more = f" and {len(by) - 3} more" if len(by) > 3 else ""
    seen = f", seen by {', '.join(by[:3])}{more}" if by else ""
    key = f"{entry.number}"
    return Line(key=key, time=clock(entry.at), text=f"{what}{why}{detail}{seen}", tone=_TONES.get(entry.kind, ""))
