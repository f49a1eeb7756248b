"""Pictures of systems of any size, for looking at the topology page without running them."""

from collections.abc import AsyncIterator, Sequence

import anyio

from orchestrator.page.callers import Rates, Told
from orchestrator.page.catalog import Listing, Outlook
from orchestrator.page.compose import compose
from orchestrator.page.journal import Entry
from orchestrator.page.sheet import Line, Sheet
from orchestrator.page.sight import Picture
from orchestrator.page.state import State
from orchestrator.registry import Instance, LeftOut

CALLERS = 3


def instance(service: str, number: int, tags: Sequence[str] = (), zones: Sequence[str] = ()) -> Instance:
    """The number-th of a service; in these zones, if any, by turns."""
    address, port = f"10.0.{number // 250}.{number % 250}", 8000
    return Instance(
        f"{service}-{address}-{port}",
        service,
        address,
        port,
        tags=tuple(tags),
        zone=zones[number % len(zones)] if zones else None,
    )


def state(caller: Instance, called: Sequence[Instance], number: int, ejected: int = 0) -> State:
    """What a caller says that has called each of them often; the first so many are ejected."""
    endpoints = [
        {
            "id": each.id,
            "netloc": each.netloc,
            "zone": each.zone,
            "in_flight": (number + index) % 4,
            "latency": 0.001 * (1 + (number + index) % 30),
            "picks": 100 + number * (index % 3),
            "picked": {"p2c_cost": 60 + number, "p2c_turn": 40},
            "outcomes": {"ok": 99 + number, "refused": 1},
            "ejected_for": 2.5 if index < ejected else 0.0,
            "ejected_because": "refused" if index < ejected else None,
            "last_failure": {"at": 1_700_000_000.0 + number, "outcome": "refused", "detail": "ConnectError"},
            "listed": True,
        }
        for index, each in enumerate(called)
    ]
    upstream = {
        "service": called[0].service,
        "tag": None,
        "failing_fast_for": 0.0,
        "calls": {"ok": 100 * len(called) + number},
        "retries": {"refused": 3},
        "hedges": {"won": 1, "lost": 2},
        "budget": {"left": 9.0, "exhausted": 0},
        "view": {"age": 1.0, "error": None},
        "endpoints": endpoints,
    }
    presence = {"id": caller.id, "registered": True, "leaving": False, "started": 1.0, "version": "1.2.3"}
    return State.model_validate({"instance": presence, "upstreams": [upstream], "events": []})


def told(caller: Instance, known: State | None, error: str | None = None) -> Told:
    """As the page has it."""
    rates = {}
    for upstream in known.upstreams if known else ():
        picks = {endpoint.spot: 10 for endpoint in upstream.endpoints}
        rates[upstream.service, upstream.tag] = Rates(seconds=10.0, calls=12.5, retries=0.5, picks=picks)
    return Told(caller, known, 0.1 if known else None, error, error is not None, rates)


def picture(
    instances: int,
    number: int = 1,
    tags: Sequence[str] = (),
    outage: str | None = None,
    zones: Sequence[str] = (),
) -> Picture:
    """So many instances of backend-api, called by three of research-api; one is ejected, one in maintenance."""
    backends = tuple(instance("backend-api", each, tags, zones) for each in range(instances))
    callers = tuple(instance("research-api", each) for each in range(CALLERS))
    left = (LeftOut("backend-api-10.9.9.9-8000", "in maintenance: new disks", "maintenance"),)
    listings = (Listing("backend-api", backends, left), Listing("research-api", callers, ()))
    entries = [
        Entry(each, 1_700_000_000.0 + each, "ejected", "backend-api", backends[0].id, "refused", "", (callers[0].id,))
        for each in range(number, 0, -1)
    ]
    return Picture(
        epoch="0",
        number=number,
        at=1_700_000_000.0 + number,
        outlook=Outlook("http://127.0.0.1:8500", outage, 12.0 if outage else 0.4, listings, untold=0),
        told=tuple(told(each, state(each, backends, number, ejected=1)) for each in callers),
        disagreements=(Line(key="one", time="", text=f"{backends[0].id}: its checks pass", tone="doubtful"),),
        entries=tuple(entries),
    )


class Album:
    """Stands in for the hub: a new picture, of the same system, every so many seconds."""

    def __init__(
        self,
        instances: int,
        period: float = 0.5,
        tags: Sequence[str] = (),
        outage: str | None = None,
        zones: Sequence[str] = (),
    ) -> None:
        self.is_full = False
        """True: streams end."""
        self._instances = instances
        self._period = period
        self._tags = tags
        self._outage = outage
        self.zones = zones
        """A test may change them."""

    async def sheet(self, caller: str) -> Sheet:
        """The first."""
        return compose(self._picture(1), caller)

    async def stream(self, caller: str) -> AsyncIterator[str]:
        """One after the other."""
        number = 1
        while not self.is_full:
            number += 1
            await anyio.sleep(self._period)
            yield compose(self._picture(number), caller).model_dump_json()

    def _picture(self, number: int) -> Picture:
        return picture(self._instances, number, self._tags, self._outage, self.zones)
