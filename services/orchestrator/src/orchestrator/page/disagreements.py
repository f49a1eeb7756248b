"""Where Consul and callers see different things, each said in one sentence."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from orchestrator.page.sheet import Line
from orchestrator.page.sight import Seen, Sighting, Use

__all__ = ["Disagreements"]

PATIENCE = 3.0
"""Seconds that two may differ because news is still under way."""
MOST = 100


class _Difference(NamedTuple):
    key: str
    text: str
    certain: bool = False
    """Whether no news under way can explain it."""


class Disagreements:
    """Remembers since when each holds."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def between(self, services: Mapping[str, Sequence[Seen]], using: Iterable[Use], now: float) -> tuple[Line, ...]:
        """Those that have lasted. ``now``: ``time.monotonic()``."""
        found = [*_of_instances(services), *_of_lists(services, using)]
        self._since = {each.key: self._since.get(each.key, now) for each in found}
        lasting = [each for each in found if each.certain or now - self._since[each.key] >= PATIENCE]
        lines = [Line(key=each.key, time="", text=each.text, tone="doubtful") for each in lasting[:MOST]]
        if len(lasting) > MOST:
            lines.append(Line(key="more", time="", text=f"and {len(lasting) - MOST} more"))
        return tuple(lines)


def _of_instances(services: Mapping[str, Sequence[Seen]]) -> Iterator[_Difference]:
    for instances in services.values():
        for seen in instances:
            yield from _of_unlisted(seen) if seen.left is not None else _of_listed(seen)


def _of_unlisted(seen: Seen) -> Iterator[_Difference]:
    if holding := [sighting for sighting in seen.sightings if sighting.endpoint.listed]:
        kind = seen.left.kind if seen.left else ""
        yield _Difference(
            f"{seen.key} listed", f"{seen.id}: Consul does not offer it ({kind}), but {_who(holding)} would call it"
        )


def _of_listed(seen: Seen) -> Iterator[_Difference]:
    ejecting = [each for each in seen.sightings if each.endpoint.listed and each.endpoint.ejected_because]
    if ejecting:
        why = ", ".join(sorted({each.endpoint.ejected_because or "" for each in ejecting})).replace("_", " ")
        passing = f"{seen.id}: its checks pass, says Consul; {_who(ejecting)} ejected it ({why})"
        yield _Difference(f"{seen.key} ejected", passing, certain=True)
    told = seen.told
    if told is not None and told.error is not None:
        yield _Difference(
            f"{seen.key} silent", f"{seen.id}: its checks pass, says Consul; asked by us, it {told.error}"
        )
    elif told is not None and told.state is not None and not told.state.instance.registered:
        yield _Difference(f"{seen.key} unregistered", f"{seen.id}: Consul lists it; it says that it is not registered")


def _of_lists(services: Mapping[str, Sequence[Seen]], using: Iterable[Use]) -> Iterator[_Difference]:
    passing = {
        service.lower(): {(seen.id, seen.netloc): seen for seen in instances if seen.instance is not None}
        for service, instances in services.items()
    }
    for use in using:
        caller, upstream = use.caller.instance.id, use.upstream
        if upstream.view.error:
            error = f"{caller} can't ask Consul for {upstream.service}: {upstream.view.error}"
            yield _Difference(f"{caller} {upstream.service} view", error)
        known = {endpoint.spot for endpoint in upstream.endpoints if endpoint.listed}
        for spot, seen in passing.get(upstream.service.lower(), {}).items():
            tags = seen.instance.tags if seen.instance else ()
            if spot not in known and upstream.tag in {None, *tags}:
                unknown = f"{seen.id}: Consul offers it; {caller} does not know it"
                yield _Difference(f"{caller} {seen.key} unknown", unknown)


def _who(sightings: Iterable[Sighting]) -> str:
    names = sorted({sighting.use.caller.instance.id for sighting in sightings})
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
