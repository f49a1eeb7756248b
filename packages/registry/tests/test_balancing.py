"""Who is picked, how often, and what a pick costs: seeded randomness, a clock that tests move, no I/O."""

import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import Instance
from registry.discovery.balancing import (
    Candidates,
    Pick,
    Policy,
    named_pick,
    power_of_two_choices,
    random_choice,
    round_robin,
)
from registry.discovery.blame import Failure
from registry.discovery.endpoint import Endpoint
from registry.discovery.options import EjectionPolicy
from registry.discovery.pool import Pool
from registry.discovery.roster import SLICE
from registry.errors import InvalidInputError

POLICY = EjectionPolicy()
DECAY = POLICY.latency_decay
MAX_PEAKS = POLICY.latency_peaks
FORGET = 8 * DECAY * 2**MAX_PEAKS
"""Seconds after which nothing is left of a latency, however often it was seen."""


@pytest.fixture(autouse=True)
def _same_every_time() -> None:
    random.seed(20)


class Fleet:
    """A pool whose instances answer in simulated time: each call takes as long as its instance's ``seconds``."""

    def __init__(self, weights: Sequence[int] = (1, 1, 1), pick: Pick = power_of_two_choices) -> None:
        self.now = 1_000.0
        self.pool = Pool("cards", pick, clock=lambda: self.now)
        self.seconds: dict[str, float] = {}
        self.ends: list[tuple[float, int, Endpoint, float]] = []
        self.started = 0
        self.scale_to(weights)

    def scale_to(self, weights: Sequence[int]) -> None:
        self.pool.update(
            tuple(Instance(f"i{n}", "cards", "10.0.0.1", 8000 + n, weight=w) for n, w in enumerate(weights))
        )
        for instance in self.pool.snapshot:
            self.seconds.setdefault(instance.id, 0.002)

    def start(self) -> str:
        endpoint = self.pool.pick((), safe=True)
        assert endpoint is not None
        self.started += 1
        endpoint.started[self.started] = self.now
        seconds = self.seconds[endpoint.instance.id] * random.uniform(0.8, 1.25)
        self.ends.append((self.now + seconds, self.started, endpoint, seconds))
        return endpoint.instance.id

    def end_next(self) -> None:
        end = min(self.ends)
        self.ends.remove(end)
        self.now, number, endpoint, seconds = max(end[0], self.now), *end[1:]
        del endpoint.started[number]
        self.pool.succeeded(endpoint, seconds)

    def shares(self, calls: int, callers: int = 1) -> dict[str, float]:
        """The part of each instance in so many calls by so many callers."""
        counts: Counter[str] = Counter()
        for _ in range(calls):
            while len(self.ends) >= callers:
                self.end_next()
            counts[self.start()] += 1
        return {instance.id: counts[instance.id] / calls for instance in self.pool.snapshot}

    def shares_for(self, seconds: float, callers: int = 4) -> dict[str, float]:
        """The same, over a time."""
        counts: Counter[str] = Counter()
        until = self.now + seconds
        while self.now < until:
            while len(self.ends) >= callers:
                self.end_next()
            counts[self.start()] += 1
        return {instance.id: counts[instance.id] / counts.total() for instance in self.pool.snapshot}


def near(expected: Sequence[float], within: float = 0.2) -> dict[str, object]:
    return {f"i{n}": pytest.approx(share, rel=within) for n, share in enumerate(expected)}


@pytest.mark.parametrize("callers", [1, 4, 32, 200])
@pytest.mark.parametrize("size", [2, 3, 20])
def test_p2c_spreads_equally(size: int, callers: int) -> None:
    """Instances that are equally fast get equal shares, closer than chance alone would bring them."""
    assert Fleet([1] * size).shares(400 * size, callers) == near([1 / size] * size, within=0.05)


@pytest.mark.parametrize("callers", [1, 4, 32, 200])
@pytest.mark.parametrize("pick", [power_of_two_choices, random_choice])
def test_weights_are_shares(pick: Pick, callers: int) -> None:
    """Weights 1:2:5 give an eighth, a quarter and five eighths, idle or busy."""
    assert Fleet([1, 2, 5], pick).shares(8_000, callers) == near([1 / 8, 2 / 8, 5 / 8])


def test_round_robin_takes_turns_from_a_random_start() -> None:
    """Exactly one after the other; processes that start together do not all begin with the same instance."""
    candidates = Candidates([Endpoint(Instance(f"i{n}", "cards", "10.0.0.1", 8000 + n)) for n in range(3)])
    starts = set()
    for _ in range(50):
        pick = round_robin()
        turns = [candidates.index(pick(candidates, 0.0)) for _ in range(6)]
        assert turns == [(turns[0] + n) % 3 for n in range(6)]
        starts.add(turns[0])
    assert starts == {0, 1, 2}


def test_round_robins_do_not_share_their_turn() -> None:
    """Each upstream has its own, or calls that alternate between two services would meet half the instances."""
    candidates = Candidates([Endpoint(Instance(f"i{n}", "cards", "10.0.0.1", 8000 + n)) for n in range(2)])
    one, two = named_pick("round_robin"), named_pick("round_robin")
    picked = [(one(candidates, 0.0).instance.id, two(candidates, 0.0).instance.id) for _ in range(10)]
    assert Counter(first for first, _ in picked) == Counter(second for _, second in picked) == {"i0": 5, "i1": 5}


def test_policies_have_names_and_functions_are_policies() -> None:
    """p2c, random and round_robin by name, a function as it is, anything else is refused with the choice."""

    def first(candidates: Candidates, now: float) -> Endpoint:
        return candidates[0]

    assert named_pick("p2c") is power_of_two_choices
    assert named_pick("random") is random_choice
    assert named_pick(first) is first
    assert Fleet([1, 1, 1], first).shares(100)["i0"] == 1.0
    with pytest.raises(InvalidInputError, match="'p2c', 'random', 'round_robin'"):
        named_pick("least_conn")  # type: ignore[arg-type]


def test_slow_instance_is_avoided_and_tried_again() -> None:
    """At 300 ms beside 2 ms its share is below 5 % from the start; once it is as fast again, its share comes back."""
    fleet = Fleet()
    fleet.shares_for(1.0)
    fleet.seconds["i1"] = 0.3
    assert fleet.shares_for(2.0)["i1"] < 0.05
    assert 0 < fleet.shares_for(60.0)["i1"] < 0.01  # tried again, now and then
    fleet.seconds["i1"] = 0.002
    fleet.shares_for(FORGET)
    assert fleet.shares_for(2.0) == near([1 / 3] * 3)


def test_returned_instance_does_not_make_up_for_what_it_missed() -> None:
    """After a minute apart it gets its share, not the two thirds that being behind would give it."""
    fleet = Fleet()
    slow = fleet.pool.endpoints["i1", "10.0.0.1", 8001]
    fleet.seconds["i1"] = 1.0
    fleet.shares_for(60.0)
    fleet.seconds["i1"] = 0.002
    while slow.latency(fleet.now) > 0.003:
        fleet.shares_for(0.1)
    assert fleet.shares(300) == near([1 / 3] * 3)


def test_fast_instance_is_not_starved_for_its_lead() -> None:
    """One that took most of the traffic gets its share again as soon as the others are as fast."""
    fleet = Fleet()
    fleet.seconds |= {"i1": 0.02, "i2": 0.02}
    assert fleet.shares_for(10.0)["i0"] > 0.6
    fleet.seconds |= {"i1": 0.002, "i2": 0.002}
    fleet.shares_for(FORGET)
    assert fleet.shares(300) == near([1 / 3] * 3)


def test_hanging_instance_is_avoided_by_the_age_of_its_oldest_attempt() -> None:
    """It has answered nothing, so nothing was measured; that it has been silent is enough."""
    fleet = Fleet([1, 1])
    fleet.seconds["i1"] = 1e9
    fleet.shares_for(0.1, callers=4)
    hung = fleet.pool.endpoints["i1", "10.0.0.1", 8001]
    assert 1 <= hung.in_flight <= 3  # at least one caller found out in time
    for _ in range(50):
        assert fleet.shares(100, callers=4)["i1"] == 0.0
    assert fleet.now < 1_100.0  # and none waited for it


def test_newcomer_is_neither_flooded_nor_starved() -> None:
    """A new instance has its equal share from its first second on, even beside one that is slow."""
    fleet = Fleet([1, 1, 1])
    fleet.seconds["i1"] = 0.3
    fleet.shares_for(5.0)
    fleet.pool.endpoints["i1", "10.0.0.1", 8001].observe(2.0, fleet.now)
    fleet.scale_to([1, 1, 1, 1])
    assert fleet.shares_for(1.0)["i3"] == pytest.approx(1 / 3, rel=0.2)


def test_newcomers_of_a_cold_start_share_equally() -> None:
    """From one instance to twenty: the new ones do not wait for each other."""
    fleet = Fleet([1])
    fleet.shares(5_000)
    fleet.scale_to([1] * 20)
    assert fleet.shares(8_000, callers=4) == near([1 / 20] * 20)


def test_latency_jumps_to_a_peak_and_decays() -> None:
    """Worse counts at once, better only with time; the oldest attempt under way counts with its age."""
    endpoint = Endpoint(Instance("i", "cards", "10.0.0.1", 8000), now=100.0)
    endpoint.observe(0.5, 100.0)
    endpoint.observe(0.4, 100.0)
    assert endpoint.latency(100.0) == 0.5
    assert endpoint.latency(100.0 + 2 * DECAY) == pytest.approx(0.5 / math.e)
    endpoint.started[1] = 200.0
    endpoint.started[2] = 201.0
    assert endpoint.latency(203.0) == 3.0


def test_slowness_that_repeats_is_remembered_longer() -> None:
    """Each peak in a row doubles how long it counts, up to a bound; being fast again halves it."""
    endpoint, now, lasts = Endpoint(Instance("i", "cards", "10.0.0.1", 8000)), 0.0, []
    for _ in range(MAX_PEAKS + 2):
        now += 60.0
        endpoint.observe(0.5, now)
        lasts.append(math.log(0.5 / endpoint.latency(now + 1.0)))
    assert lasts == pytest.approx([1 / DECAY / 2 ** min(n, MAX_PEAKS) for n in range(1, MAX_PEAKS + 3)])
    for _ in range(MAX_PEAKS):
        endpoint.observe(0.001, now)
    assert math.log(0.5 / endpoint.latency(now + 1.0)) == pytest.approx(1 / DECAY)


def _steps(call: Callable[[], object]) -> int:
    """How many functions, written in Python or not, a call calls."""
    steps = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal steps
        steps += event in {"call", "c_call"}

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return steps


@pytest.mark.parametrize("policy", ["p2c", "random", "round_robin"])
@pytest.mark.parametrize("weights", [[1], [1, 2, 5]], ids=["equal", "weighted"])
def test_pick_takes_as_many_steps_among_ten_thousand_as_among_three(policy: Policy, weights: list[int]) -> None:
    """Counted, not timed: a pick does the same work whatever the size of the fleet."""

    def most(size: int) -> int:
        pool = Fleet((weights * size)[:size], named_pick(policy)).pool
        for _ in range(size // SLICE):  # until all of them are known
            pool.pick((), safe=True)
        ejected = next(iter(pool.endpoints.values()))
        pool.failed(ejected, Failure.NOT_SENT, 0.0)
        return max(_steps(lambda: pool.pick((), safe=True)) for _ in range(100))

    # Two that are not equal but drawn alike cost one step more.
    assert abs(most(10_000) - most(3)) <= 1


@given(st.lists(st.integers(1, 1_000), min_size=2, max_size=8), st.integers())
def test_two_choices_are_two(weights: list[int], seed: int) -> None:
    """Whatever the weights: two different ones of them, so that a choice is one."""
    random.seed(seed)
    endpoints = [Endpoint(Instance(f"i{n}", "cards", "10.0.0.1", 8000 + n, weight=w)) for n, w in enumerate(weights)]
    one, two = Candidates(endpoints).sample_two()
    assert one is not two
    assert one in endpoints
    assert two in endpoints
