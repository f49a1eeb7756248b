"""Which calls stay in their zone: callers and instances in simulated time, the real pools, seeded randomness."""

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from registry import Instance, ServiceDiscoveryClient, StaticResolver
from registry.discovery.blame import Failure
from registry.discovery.endpoint import Endpoint
from registry.discovery.pool import Pool
from registry.discovery.zones import SAMPLE, ZoneFirst, ZoneState
from registry.errors import InvalidInputError
from registry.telemetry import PickReason

SECONDS = 0.005
"""That an instance works on a call; it does one after the other."""


@pytest.fixture(autouse=True)
def _same_every_time() -> None:
    random.seed(20)


def fleet(**zones: int) -> tuple[Instance, ...]:
    """So many instances in each of these zones."""
    return tuple(
        Instance(f"{zone}{number}", "cards", f"10.0.{ord(zone)}.{number}", 80, zone=zone)
        for zone, size in zones.items()
        for number in range(size)
    )


class World:
    """Callers, each in a zone and with a pool of its own, that call at random times, whatever has become of others."""

    def __init__(self, instances: Sequence[Instance], callers: str, rate: float) -> None:
        """``rate``: calls per second of each caller."""
        self.now = 1_000.0
        self.rate = rate
        self.idle_at = dict.fromkeys((each.id for each in instances), self.now)
        self.hanging: set[str] = set()
        self.calls: list[tuple[float, str, Instance, float]] = []
        """Of each that has ended: when it began, the caller's zone, who answered, and how long that took."""
        self.late = 0
        self.callers = [(zone, Pool("cards", clock=lambda: self.now, zone=zone)) for zone in callers]
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self.list(instances)
        for zone, pool in self.callers:
            self._call_later(zone, pool)

    def list(self, instances: Sequence[Instance]) -> None:
        for _, pool in self.callers:
            pool.update(tuple(instances))

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self._due[0][0] < until:
            self.now, _, step = heapq.heappop(self._due)
            step()
        self.now = until

    def load(self, since: float) -> dict[str, float]:
        """How busy each instance was from then on, as multiples of their mean."""
        counts = Counter(instance.id for begun, _, instance, _ in self.calls if begun >= since)
        mean = counts.total() / len(counts)
        return {id_: count / mean for id_, count in counts.items()}

    def stayed(self, zone: str, since: float) -> float:
        """The part of the calls from this zone that were answered there."""
        asked = [
            instance.zone == zone for begun, caller, instance, _ in self.calls if begun >= since and caller == zone
        ]
        return sum(asked) / len(asked)

    def median(self, zone: str, since: float) -> float:
        """Seconds that half of the answers from there took at most."""
        taken = sorted(took for begun, _, instance, took in self.calls if begun >= since and instance.zone == zone)
        return taken[len(taken) // 2]

    def _later(self, seconds: float, step: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now + seconds, next(self._number), step))

    def _call_later(self, zone: str, pool: Pool) -> None:
        self._later(random.expovariate(self.rate), lambda: self._call(zone, pool))

    def _call(self, zone: str, pool: Pool) -> None:
        self._call_later(zone, pool)
        endpoint = pool.pick((), safe=True)
        assert endpoint is not None
        token, begun, id_ = object(), self.now, endpoint.instance.id
        endpoint.started[token] = begun
        if id_ in self.hanging:
            self._later(2.0, lambda: self._time_out(pool, endpoint, token, begun))
            return
        self.idle_at[id_] = max(self.idle_at[id_], begun) + SECONDS * random.uniform(0.8, 1.25)
        self._later(self.idle_at[id_] - begun, lambda: self._answer(zone, pool, endpoint, token, begun))

    def _answer(self, zone: str, pool: Pool, endpoint: Endpoint, token: object, begun: float) -> None:
        del endpoint.started[token]
        self.calls.append((begun, zone, endpoint.instance, self.now - begun))
        pool.succeeded(endpoint, self.now - begun)

    def _time_out(self, pool: Pool, endpoint: Endpoint, token: object, begun: float) -> None:
        del endpoint.started[token]
        self.late += 1
        pool.failed(endpoint, Failure.SENT, self.now - begun, "timeout")


def test_calls_stay_in_their_zone_while_it_has_capacity() -> None:
    """Nine of ten at least, at a third of what the instances can do, and all of them are equally busy."""
    world = World(fleet(a=3, b=3, c=3), "abc" * 4, rate=50)
    world.run(5.0)
    assert all(world.stayed(zone, 1_002) > 0.9 for zone in "abc")
    assert all(0.8 < load < 1.2 for load in world.load(1_002).values())


def test_a_zone_lost_leaves_the_others_equally_busy() -> None:
    """All instances of one zone leave the list, its callers stay: after 2 s the others are within 20 % of equal."""
    world = World(fleet(a=3, b=3, c=3), "abc" * 4, rate=50)
    world.run(3.0)
    world.list(fleet(a=3, b=3))
    world.run(7.0)
    assert len(world.load(1_005)) == 6
    assert all(0.8 < load < 1.2 for load in world.load(1_005).values())
    assert world.stayed("a", 1_005) > 0.9


@pytest.mark.parametrize("rate", [10, 92, 146])
def test_ten_callers_do_not_drown_the_one_instance_of_their_zone(rate: float) -> None:
    """Ten callers beside one instance, two beside ten, at 5, 50 and 80 % of what all can do: no queue grows there."""
    world = World(fleet(a=1, b=5, c=5), "a" * 10 + "bc", rate)
    world.run(6.0)
    busy = world.load(1_002)["a0"] * rate * 12 / 11 * SECONDS  # of the time
    assert busy < 0.95
    assert world.median("a", 1_002) < 5 * world.median("b", 1_002)
    assert world.stayed("a", 1_002) > 0.05


def test_callers_that_are_all_in_one_zone_use_the_others_when_it_is_too_busy() -> None:
    """Their zone could do 83 % of what they ask for: it stays answering quickly, and the rest goes elsewhere."""
    world = World(fleet(a=3, b=3, c=3), "a" * 12, rate=60)
    world.run(6.0)
    assert 0.4 < world.stayed("a", 1_003) < 0.8
    assert world.median("a", 1_003) < 4 * SECONDS


def test_a_zone_that_hangs_is_left_at_once_and_found_again() -> None:
    """Fewer calls hang than one in twenty of those made by its callers; once it answers, they come back."""
    world = World(fleet(a=3, b=3, c=3), "abc" * 4, rate=50)
    world.run(3.0)
    world.hanging = {"c0", "c1", "c2"}
    world.run(5.0)
    assert world.late < 0.15 * 4 * 50 * 5
    assert all(load < 1.2 for id_, load in world.load(1_005).items() if id_[0] != "c")
    world.hanging = set()
    world.run(45.0)
    assert world.stayed("c", world.now - 5) > 0.9


SHARES: list[tuple[dict[str, int], float, PickReason]] = [
    ({"a": 3, "b": 3, "c": 3}, 1 - SAMPLE, "zone_sample"),
    ({"a": 2, "b": 3, "c": 3}, 6 / 8, "zone_few"),
    ({"a": 1, "b": 3, "c": 3}, 3 / 7, "zone_few"),
    ({"a": 1, "b": 5, "c": 5}, 3 / 11, "zone_few"),
    ({"b": 3, "c": 3}, 0.0, "zone_few"),
]


@pytest.mark.parametrize(("zones", "share", "reason"), SHARES)
def test_a_zone_with_too_few_keeps_what_they_are_of_a_share(
    zones: dict[str, int], share: float, reason: PickReason
) -> None:
    """One instance less takes one step, and the last that leaves no bigger one; each pick elsewhere says why."""
    pool = Pool("cards", zone="a")
    pool.update(fleet(**zones))
    picked = [pool.pick((), safe=True) for _ in range(4_000)]
    near = [each for each in picked if each and each.instance.zone == "a"]
    assert len(near) / 4_000 == pytest.approx(share, abs=0.03)
    assert pool.zones
    state = pool.zones.state(0.0)
    assert state.kept == pytest.approx(share)
    assert state.spilled == pytest.approx({reason: 1 - share})
    assert (state.own, state.own_picks, state.other_picks) == ("a", len(near), 4_000 - len(near))
    reasons: Counter[PickReason] = Counter()
    for endpoint in pool.endpoints.values():
        if endpoint.instance.zone != "a":
            reasons.update(endpoint.counts.picks)
    assert set(reasons) == {reason}


def test_without_others_or_without_a_zone_nothing_changes() -> None:
    """All in the own zone: it is picked as ever. No zone given: those of all zones are equal."""
    pool = Pool("cards", zone="a")
    pool.update(fleet(a=2))
    picked = {each.instance.id for each in (pool.pick((), safe=True) for _ in range(50)) if each}
    assert picked == {"a0", "a1"}
    pool = Pool("cards")
    pool.update(fleet(a=1, b=1))
    assert pool.zones is None
    counts = Counter(each.instance.id for each in (pool.pick((), safe=True) for _ in range(1_000)) if each)
    assert counts["a0"] == pytest.approx(500, rel=0.2)


def state_of(world: World, zone: str) -> ZoneState:
    """What a caller there would say now, of all of them the one that keeps most."""
    zones = [pool.zones for caller, pool in world.callers if caller == zone]
    return max((each.state(world.now) for each in zones if isinstance(each, ZoneFirst)), key=lambda state: state.kept)


def test_a_slow_zone_is_told_while_it_lasts() -> None:
    """What is kept is what stays indeed, near enough; too much for the own zone and silence there are both ``slow``."""
    world = World(fleet(a=3, b=3, c=3), "a" * 12, rate=60)
    world.run(6.0)
    states = [pool.zones.state(world.now) for _, pool in world.callers if pool.zones]
    kept = sum(state.kept for state in states) / len(states)
    assert kept == pytest.approx(world.stayed("a", 1_005), abs=0.15)
    assert all(state.kept + sum(state.spilled.values()) == pytest.approx(1.0) for state in states)
    assert any("zone_slow" in state.spilled for state in states)
    world = World(fleet(a=3, b=3, c=3), "abc" * 4, rate=50)
    world.run(3.0)
    assert state_of(world, "c").kept == 1 - SAMPLE
    world.hanging = {"c0", "c1", "c2"}
    world.run(1.5)
    assert state_of(world, "c").kept < 0.2
    assert state_of(world, "c").spilled.keys() == {"zone_sample", "zone_slow"}


async def test_explain_tells_zones() -> None:
    """The own one, each instance's, and what is kept; without one, None. A zone that was given is not replaced."""
    resolver = StaticResolver({"cards": fleet(a=1, b=3)})
    async with ServiceDiscoveryClient(resolver) as client:
        assert client.explain("cards").zones is None
        assert [each.zone for each in client.explain("cards").endpoints] == ["a", "b", "b", "b"]
    async with ServiceDiscoveryClient(resolver, zone="a") as client:
        client.use_zone("b")
        assert client.explain("cards").zones == ZoneState("a", 0.5, {"zone_few": 0.5}, 0, 0)


def test_a_slow_zone_is_asked_when_it_is_all_there_is() -> None:
    """It takes 1,000 times as long as the others did, which have left since."""
    pool = Pool("cards", clock=lambda: 1_000.0, zone="a")
    pool.update(fleet(a=2, b=2))
    for endpoint in pool.endpoints.values():
        endpoint.observe(1.0 if endpoint.instance.zone == "a" else 0.001, 1_000.0)
    picked = [pool.pick((), safe=True) for _ in range(100)]
    assert {each.instance.zone for each in picked if each} == {"b"}
    pool.update(fleet(a=2))
    assert {each.instance.id for each in (pool.pick((), safe=True) for _ in range(100)) if each} == {"a0", "a1"}
    assert pool.zones
    assert (pool.zones.state(1_000.0).kept, pool.zones.state(1_000.0).spilled) == (1.0, {})


async def test_what_is_no_zone_is_refused() -> None:
    """At once, rather than never to be found among the instances."""
    with pytest.raises(InvalidInputError, match="not a zone"):
        ServiceDiscoveryClient(StaticResolver({}), zone="no zone")
