"""A caller of many instances knows some of them: these are equally loaded over all callers, and replaced at once."""

import gc
import random
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import httpx
import pytest

from registry import ConnectionOptions, DiscoveryTransport, Instance, StaticResolver
from registry.discovery.blame import Failure
from registry.discovery.endpoint import Counts, Endpoint
from registry.discovery.options import EjectionPolicy
from registry.discovery.pool import Pool
from registry.discovery.ranking import Ranking
from registry.discovery.roster import Roster
from registry.discovery.upstream import Upstream
from registry.model import Key, Snapshot

KNOWN = ConnectionOptions().max_instances
NOT_SENT = Failure.NOT_SENT


@pytest.fixture(autouse=True)
def _same_every_time() -> None:
    random.seed(20)


def instances(count: int) -> Snapshot:
    return tuple(Instance(f"i{n:04}", "cards", f"10.0.{n >> 8}.{n & 255}", 8000) for n in range(count))


class Following(StaticResolver):
    """Says what a pool was told last."""

    def __init__(self, pool: Pool) -> None:
        super().__init__({})
        self.pool = pool

    def resolve(self, service: str, tag: str | None = None) -> Snapshot:
        return self.pool.snapshot


class Callers:
    """Many, each of which knows some of the instances of one service, in simulated time."""

    def __init__(self, count: int, snapshot: Snapshot, known: int = KNOWN) -> None:
        self.now = 1_000.0
        self.pools = [
            Pool("cards", clock=lambda: self.now, roster=Roster(size=known, chance=random.Random(seed)))
            for seed in range(count)
        ]
        self.list(snapshot)

    def list(self, snapshot: Snapshot) -> None:
        for pool in self.pools:
            pool.update(snapshot, frozenset())

    def connections(self) -> set[tuple[int, Key]]:
        """Which caller keeps connections to whom."""
        return {(number, key) for number, pool in enumerate(self.pools) for key in pool.endpoints}

    async def call(self, times: int) -> Counter[str]:
        """How often each instance is called when all callers call so often, each of them 20 calls at a time."""
        upstreams = [Upstream(Following(pool), pool, None) for pool in self.pools]
        asked: Counter[str] = Counter()
        for _ in range(times // 20):
            for upstream in upstreams:
                picked = []
                for number in range(20):
                    endpoint = await upstream.pick((), safe=True)
                    assert endpoint is not None
                    endpoint.started[number] = self.now
                    picked.append(endpoint)
                    asked[endpoint.instance.id] += 1
                for number, endpoint in enumerate(picked):
                    del endpoint.started[number]
                    upstream.pool.succeeded(endpoint, 0.005 * random.uniform(0.8, 1.25))
                self.now += 0.0001
        return asked


async def test_two_hundred_callers_load_five_hundred_instances_equally() -> None:
    """None has a third more or less than its share, though no caller knows of another."""
    callers = Callers(200, instances(500))
    asked = await callers.call(1_000)
    share = asked.total() / 500
    loads = sorted(asked[instance.id] / share for instance in instances(500))
    assert 0.7 <= loads[0] <= loads[-1] <= 1.3


@pytest.mark.parametrize("change", ["leaves", "joins", "leaves and returns"])
def test_one_instance_moves_few_connections(change: str) -> None:
    """Those that it had or is to have, the five hundredth part; the limit is two of a hundred."""
    all_of_them = instances(501)
    without = (*all_of_them[:77], *all_of_them[78:])
    callers = Callers(200, without if change == "joins" else all_of_them)
    before = callers.connections()
    assert len(before) == 200 * KNOWN
    callers.list(all_of_them if change == "joins" else without)
    if change == "leaves and returns":
        callers.list(all_of_them)
    after = callers.connections()
    assert len(after) == len(before)
    assert 0 < len(after - before) < 0.01 * len(before)


def test_few_instances_are_all_known() -> None:
    """Up to the limit nothing is different: every caller knows all."""
    callers = Callers(3, instances(KNOWN))
    assert {len(pool.endpoints) for pool in callers.pools} == {KNOWN}


class Small:
    """A caller that knows three of ten."""

    def __init__(self, known: int = 3, listed: int = 10) -> None:
        self.now = 1_000.0
        roster = Roster(size=known, chance=random.Random(5))
        self.pool = Pool("cards", clock=lambda: self.now, roster=roster)
        self.all = instances(listed)
        self.pool.update(self.all)

    @property
    def asked(self) -> set[str]:
        """Whom calls go to."""
        picked = (self.pool.pick((), safe=True) for _ in range(200))
        return {endpoint.instance.id for endpoint in picked if endpoint}

    def fail(self, id_: str) -> None:
        for endpoint in list(self.pool.endpoints.values()):
            if endpoint.instance.id == id_:
                self.pool.failed(endpoint, NOT_SENT, 0.0)

    def call(self, alive: set[str], failure: Failure = NOT_SENT) -> str | None:
        """Who answers a call that asks one after the other; None: nobody was left to ask."""
        tried: list[Endpoint] = []
        while (endpoint := self.pool.pick(tried, safe=True)) is not None:
            if endpoint.instance.id in alive:
                self.pool.succeeded(endpoint, 0.001)
                return endpoint.instance.id
            self.pool.failed(endpoint, failure, 0.0)
            tried.append(endpoint)
        return None


def test_one_that_is_ejected_is_replaced_until_it_is_back() -> None:
    """The others are as many as before, and then they are the same."""
    small = Small()
    before = small.asked
    assert len(before) == 3
    for ejected in sorted(before)[:2]:
        small.fail(ejected)
    during = small.asked
    assert len(during) == 3
    assert len(during & before) == 1
    for endpoint in [each for each in small.pool.endpoints.values() if each.ejected_until]:
        small.now += 1.0
        small.pool.succeeded(endpoint, 0.0)
    assert small.asked == before


def test_one_that_leaves_is_replaced_at_once() -> None:
    """With the list that does not have it any more: an instance that drains is not listed."""
    small = Small()
    before = small.asked
    leaving = min(before)
    small.pool.update(tuple(each for each in small.all if each.id != leaving), frozenset())
    assert len(small.asked) == 3
    assert small.asked > before - {leaving}


@pytest.mark.parametrize("known", [1, 2, 3])
@pytest.mark.parametrize("alive", ["i0000", "i0005", "i0009"])
@pytest.mark.parametrize("failure", [NOT_SENT, Failure.SENT], ids=["dead", "broken"])
def test_nobody_fails_while_somebody_is_alive(known: int, alive: str, failure: Failure) -> None:
    """However few are known: a call that finds all of them broken goes on to the others, and so does the next one."""
    small = Small(known)
    for _ in range(50):
        assert small.call({alive}, failure) == alive
        small.now += 0.01


@pytest.mark.parametrize("alive", ["i0000", "i0005", "i0009"])
def test_when_all_are_lost_those_outside_may_be_asked_too(alive: str) -> None:
    """Consul forgot everybody: who answers still is found, known or not."""
    small = Small()
    small.pool.update((), frozenset(each.key for each in small.all))
    for _ in range(10):
        assert small.call({alive}) == alive


def test_all_that_are_known_fail_fast_only_when_nobody_is_left() -> None:
    """The breaker is for the service, not for the part of it that this caller knows."""
    small = Small()
    assert small.call(set()) is None
    small.now += 1.0
    assert small.call(set()) is None
    assert small.pool.failing_fast_for > 0
    small.now += 1.0
    for _ in range(20):
        small.call({"i0004"})
        small.now += 1.0
    assert small.call({"i0004"}) == "i0004"
    assert small.pool.failing_fast_for == 0.0


async def test_explain_names_those_outside() -> None:
    """Each instance is listed once: with what is known of it, or as one of the others."""
    everybody = instances(10)

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, request=request)

    async with (
        DiscoveryTransport(
            StaticResolver({"cards": everybody}),
            connections=ConnectionOptions(max_instances=4),
            transport=httpx.MockTransport(answer),
        ) as transport,
        httpx.AsyncClient(transport=transport, base_url="http://cards") as client,
    ):
        for _ in range(20):
            (await client.get("/")).raise_for_status()
        explanation = transport.explain("cards")
    known = [endpoint.id for endpoint in explanation.endpoints]
    assert (len(known), len(explanation.outside)) == (4, 6)
    assert sorted([*known, *explanation.outside]) == [each.id for each in everybody]
    assert sum(endpoint.picks for endpoint in explanation.endpoints) == 20


def objects() -> Counter[type]:
    gc.collect()
    return Counter(type(each) for each in gc.get_objects())


def rolling(size: int, changes: int) -> Iterator[Snapshot]:
    """One list after the other: in each, the eldest has left and another has joined."""
    fleet = instances(size + changes)
    for change in range(changes):
        yield fleet[change : change + size]


def test_ten_thousand_that_came_and_went_leave_nothing() -> None:
    """After a minute of remembering: no endpoint, count, rank or candidate of one that is not listed any more."""
    now = 1_000.0
    before = objects()
    pool = Pool("cards", clock=lambda: now, roster=Roster(EjectionPolicy(remember_at_most=100), 50))
    upstream = Upstream(Following(pool), pool, None)
    for number, snapshot in enumerate(rolling(200, 10_000)):
        pool.update(snapshot)
        for _ in range(3):
            endpoint = pool.pick((), safe=True)
            assert endpoint is not None
            endpoint.counts.outcomes["ok"] = endpoint.counts.outcomes.get("ok", 0) + 1
            if number % 7 == 0:
                pool.failed(endpoint, NOT_SENT, 0.0)
        now += 0.06
    for _ in range(200):
        now += 1.0
        if endpoint := pool.pick((), safe=True):
            pool.succeeded(endpoint, 0.001)
    for _ in range(2):  # who is gone is forgotten, and a minute later so are its counts
        pool.update(pool.snapshot[1:], frozenset())
        now += 61.0
    explanation = upstream.explain()
    assert (len(explanation.endpoints), len(explanation.outside)) == (50, 148)
    after = objects()
    assert after[Endpoint] - before[Endpoint] <= 50 + 1
    assert after[Counts] - before[Counts] <= 50 + 1
    assert len(pool._candidates) == len(pool._candidates._members) == 50
    assert_consistent(pool.roster.ranking, 198)


def assert_consistent(ranking: Ranking, listed: int) -> None:
    """Everything that it holds is about those that are listed."""
    ranks = ranking._known + ranking._outside
    assert len(ranks) == len(ranking._keys) == len(ranking._ranks) == len(ranking.listed) == listed
    assert set(ranks) == ranking._keys.keys()
    for rising in (ranking._known, ranking._outside):
        assert all(one < two for one, two in pairwise(rising))
