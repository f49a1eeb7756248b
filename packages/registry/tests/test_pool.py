"""Ejection rule by rule, the circuit breaker that it carries, and what is left when the registry knows nobody."""

import gc
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from registry import Instance, NoHealthyInstanceError
from registry.discovery.blame import Failure
from registry.discovery.endpoint import Endpoint
from registry.discovery.group import LEAD
from registry.discovery.options import EjectionPolicy
from registry.discovery.pool import Pool
from registry.discovery.roster import Roster

POLICY = EjectionPolicy()
DOUBT = POLICY.doubt
EJECTION = POLICY.seconds
FAILURES_TO_EJECT = POLICY.failures
KEEP_GONE = POLICY.remember
MAX_EJECTION = POLICY.max_seconds
MAX_GONE = POLICY.remember_at_most
MAX_REFUSED = POLICY.max_refused
PROBE_EVERY = POLICY.probe_interval
REFUSED = POLICY.refused
NOT_SENT, SENT = Failure.NOT_SENT, Failure.SENT


@pytest.fixture(autouse=True)
def _same_every_time() -> None:
    random.seed(20)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += seconds


def instances(names: Sequence[str]) -> tuple[Instance, ...]:
    """Those with an even letter, as b, are in zone 0, the others in zone 1."""
    return tuple(Instance(name, "cards", "10.0.0.1", 8000 + ord(name[0]), zone=str(ord(name[0]) % 2)) for name in names)


def test_who_is_back_early_can_be_ejected_again() -> None:
    """An answer that came in spite of the ejection ends it, and five more failures in a row eject at once again."""
    fleet = Fleet()
    for _ in range(FAILURES_TO_EJECT):
        fleet.pool.failed(fleet["a"], SENT, 0.0)
    fleet.clock.tick(1.0)
    fleet.pool.succeeded(fleet["a"], 0.5)
    assert fleet["a"].ejected_until == 0
    for _ in range(FAILURES_TO_EJECT):
        fleet.pool.failed(fleet["a"], SENT, 0.0)
    assert fleet["a"].ejected_until == pytest.approx(fleet.clock.now + 2 * EJECTION)
    assert fleet.picks() == {"b", "c"}


class Fleet:
    """A pool over instances with names of one letter."""

    def __init__(self, names: str = "abc") -> None:
        self.clock = Clock()
        self.pool = Pool("cards", clock=self.clock)
        self.change(names)

    def change(self, names: str) -> None:
        self.pool.update(instances(names))

    def __getitem__(self, name: str) -> Endpoint:
        return self.pool.endpoints[name, "10.0.0.1", 8000 + ord(name)]

    def picks(self, times: int = 200, *, safe: bool = True, tried: Sequence[Endpoint] = ()) -> set[str | None]:
        """Whom so many calls at this moment would ask first; None: nobody."""
        picked = [self.pool.pick(tried, safe=safe) for _ in range(times)]
        return {endpoint.instance.id if endpoint else None for endpoint in picked}

    def next_is(self, name: str, *, safe: bool = True) -> bool:
        """Whether the next call asks this one, as others after it do not: it is the probe."""
        endpoint = self.pool.pick((), safe=safe)
        return endpoint is self[name]

    def refuse(self, names: str, seconds: float = 0.0) -> None:
        for name in names:
            self.pool.failed(self[name], NOT_SENT, seconds)

    def fail(self, name: str, times: int = FAILURES_TO_EJECT) -> None:
        for _ in range(times):
            self.pool.failed(self[name], SENT, 0.0)

    def answer(self, name: str, seconds: float = 0.0) -> None:
        self.pool.succeeded(self[name], seconds)


def test_refused_connection_ejects_at_once() -> None:
    """One refusal, and nobody is sent there."""
    fleet = Fleet()
    assert fleet.picks() == {"a", "b", "c"}
    fleet.refuse("b")
    assert fleet.picks() == {"a", "c"}


def test_refusals_eject_for_a_short_doubling_time() -> None:
    """0.1, 0.2, 0.4 and then 0.8 s for ever: what comes back is found within a second."""
    fleet = Fleet()
    waits = []
    for _ in range(1_500):  # after 1,024 doublings a float would overflow
        fleet.refuse("b")
        waits.append(fleet["b"].ejected_until - fleet.clock.now)
        fleet.clock.tick(waits[-1])
        assert fleet.next_is("b")
    assert waits[:5] == pytest.approx([REFUSED, 2 * REFUSED, 4 * REFUSED, MAX_REFUSED, MAX_REFUSED])
    assert set(map(round, waits[4:])) == {round(MAX_REFUSED)}


def test_connect_time_outs_eject_for_as_long_as_they_cost() -> None:
    """To find out again costs a caller two seconds, so it is tried ever more rarely, at least every half minute."""
    fleet = Fleet()
    waits = []
    for _ in range(7):
        fleet.refuse("b", seconds=2.0)
        waits.append(fleet["b"].ejected_until - fleet.clock.now)
        fleet.clock.tick(waits[-1] + 2.0)
        assert fleet.next_is("b")
    assert waits == pytest.approx([2, 4, 8, 16, EJECTION, EJECTION, EJECTION])


def test_refusals_under_way_count_once() -> None:
    """Ten calls that were connecting at the same time are one finding, not ten doublings."""
    fleet = Fleet()
    fleet.clock.tick(1.0)
    fleet.refuse("b", seconds=0.002)
    for _ in range(9):
        fleet.clock.tick(0.0001)
        fleet.refuse("b", seconds=0.002)
    assert fleet["b"].ejected_until - fleet.clock.now <= REFUSED


def test_five_failures_in_a_row_eject() -> None:
    """Four do not, and a success in between begins the count anew."""
    fleet = Fleet()
    for _ in range(3):
        fleet.fail("b", FAILURES_TO_EJECT - 1)
        fleet.answer("b")
    fleet.fail("b", FAILURES_TO_EJECT - 1)
    assert fleet.picks() == {"a", "b", "c"}
    fleet.fail("b", 1)
    assert fleet.picks() == {"a", "c"}
    assert fleet["b"].ejected_until == fleet.clock.now + EJECTION


def test_ejections_grow_to_five_minutes() -> None:
    """30 s × times ejected, at most 300 s; after ten quiet minutes 30 s again."""
    fleet = Fleet()
    fleet.fail("b")
    waits = []
    for _ in range(13):
        waits.append(fleet["b"].ejected_until - fleet.clock.now)
        fleet.clock.tick(waits[-1])
        assert fleet.next_is("b")
        fleet.fail("b", 1)
    assert waits == pytest.approx([min(n * EJECTION, MAX_EJECTION) for n in range(1, 14)])
    fleet.clock.tick(MAX_EJECTION)
    assert fleet.next_is("b")
    fleet.answer("b")
    fleet.clock.tick(2 * MAX_EJECTION + 1)
    fleet.fail("b")
    assert fleet["b"].ejected_until == fleet.clock.now + EJECTION


def test_one_probe_decides_the_return() -> None:
    """When its time is over, one call goes there and the others do not; its success brings the instance back."""
    fleet = Fleet()
    fleet.fail("b")
    fleet.clock.tick(EJECTION - 0.01)
    assert fleet.picks() == {"a", "c"}
    fleet.clock.tick(0.02)
    assert fleet.next_is("b")
    assert fleet.picks() == {"a", "c"}
    fleet.clock.tick(1.0)
    assert fleet.picks() == {"a", "c"}
    fleet.answer("b")
    assert fleet.picks() == {"a", "b", "c"}


def test_one_failed_probe_ejects_again() -> None:
    """No five failures are waited for."""
    fleet = Fleet()
    fleet.fail("b")
    fleet.clock.tick(EJECTION)
    assert fleet.next_is("b")
    fleet.fail("b", 1)
    assert fleet.picks() == {"a", "c"}
    assert fleet["b"].ejected_until == fleet.clock.now + 2 * EJECTION


def test_probe_that_never_ends_is_repeated() -> None:
    """A caller that was cancelled takes its probe along: another one goes after a while."""
    fleet = Fleet()
    fleet.fail("b")
    fleet.refuse("c")
    fleet.clock.tick(EJECTION)
    assert fleet.next_is("c")  # due for longest
    fleet.clock.tick(PROBE_EVERY)
    assert fleet.next_is("b")
    fleet.clock.tick(MAX_REFUSED)
    assert fleet.next_is("c")
    fleet.clock.tick(EJECTION)
    assert fleet.next_is("c")
    fleet.clock.tick(PROBE_EVERY)
    assert fleet.next_is("b")


def test_what_began_before_the_ejection_does_not_end_it() -> None:
    """A success or a failure of an attempt from before says nothing about the time since."""
    fleet = Fleet()
    fleet.clock.tick(10.0)
    fleet.refuse("b")
    fleet.fail("c")
    ejected = fleet["b"].ejected_until, fleet["c"].ejected_until
    fleet.clock.tick(0.01)
    for name in "bc":
        fleet.answer(name, seconds=5.0)
        fleet.pool.failed(fleet[name], SENT, 5.0)
        fleet.pool.failed(fleet[name], NOT_SENT, 5.0)
    assert (fleet["b"].ejected_until, fleet["c"].ejected_until) == ejected
    assert fleet.picks() == {"a"}


def test_post_is_no_probe_of_what_answered_badly() -> None:
    """It could not be sent again if the probe fails: a GET finds out, or after a while nobody else came along."""
    fleet = Fleet()
    fleet.fail("b")
    fleet.clock.tick(EJECTION)
    assert fleet.picks(safe=False) == {"a", "c"}
    fleet.clock.tick(PROBE_EVERY)
    assert fleet.next_is("b", safe=True)

    fleet = Fleet()
    fleet.fail("b")
    fleet.clock.tick(2 * EJECTION + 0.1)
    assert fleet.next_is("b", safe=False)


def test_post_is_not_sent_where_the_last_answer_was_bad() -> None:
    """For ten seconds after a bad answer, calls that can't be sent again go to the others, and safe ones find out."""
    fleet = Fleet()
    fleet.fail("a", 1)
    assert fleet.picks(safe=False) == {"b", "c"}
    assert fleet.picks(safe=True) == {"a", "b", "c"}
    fleet.clock.tick(DOUBT)
    assert "a" in fleet.picks(safe=False)
    fleet.fail("a", 1)
    fleet.answer("a")
    assert "a" in fleet.picks(safe=False)


def test_post_is_sent_anywhere_when_most_answered_badly() -> None:
    """The few that have not failed last do not get the load of all the others."""
    fleet = Fleet("abcd")
    for name in "abc":
        fleet.fail(name, 1)
    assert fleet.picks(safe=False) == {"a", "b", "c", "d"}


def test_post_may_probe_what_refused() -> None:
    """A refused connection costs it nothing: it goes to the next instance unseen."""
    fleet = Fleet()
    fleet.refuse("b")
    fleet.clock.tick(REFUSED)
    assert fleet.next_is("b", safe=False)


def test_a_call_meets_one_probe_at_most() -> None:
    """Three of six are dead and due: a call with three attempts has two of them for the living."""
    fleet = Fleet("abcdef")
    fleet.refuse("abc")
    for _ in range(50):
        fleet.clock.tick(1.0)
        tried: list[Endpoint] = []
        for _ in range(3):
            endpoint = fleet.pool.pick(tried, safe=True)
            assert endpoint is not None
            tried.append(endpoint)
            if endpoint.instance.id in "abc":
                fleet.refuse(endpoint.instance.id)
            else:
                fleet.answer(endpoint.instance.id)
        assert sum(endpoint.instance.id in "abc" for endpoint in tried) == 1


def test_probes_are_within_what_the_retry_budget_gives() -> None:
    """Ten a second, however many are dead; each of them is asked in turn."""
    names = "abcdefghijklmnopqrstuvwxyz"
    fleet = Fleet(names)
    dead = set(names[:20])
    fleet.refuse(names[:20])
    probes: list[str] = []
    for _ in range(10_000):
        fleet.clock.tick(0.001)
        endpoint = fleet.pool.pick((), safe=True)
        assert endpoint is not None
        if endpoint.instance.id in dead:
            fleet.refuse(endpoint.instance.id)
            probes.append(endpoint.instance.id)
    assert len(probes) <= 10.0 / PROBE_EVERY + 1
    assert set(probes) == dead
    assert max(map(probes.count, dead)) - min(map(probes.count, dead)) <= 1


def test_fewer_than_half_left_uses_all_that_answer() -> None:
    """Two of five can't carry it all: those that answered badly are asked again, those that refuse are not."""
    fleet = Fleet("abcde")
    fleet.fail("a")
    fleet.refuse("b")
    assert fleet.picks() == {"c", "d", "e"}
    fleet.fail("c")
    assert fleet.picks() == {"a", "c", "d", "e"}
    fleet.answer("c")
    assert fleet.picks() == {"c", "d", "e"}


def test_failures_while_all_are_used_do_not_add_up() -> None:
    """An instance that is asked although it is ejected is not ejected for longer with each answer."""
    fleet = Fleet("ab")
    fleet.fail("a")
    fleet.refuse("b")
    fleet.fail("a", times=20)
    assert fleet["a"].ejections == 1
    assert fleet["a"].ejected_until == fleet.clock.now + EJECTION


@pytest.mark.parametrize("names", ["a", "ab", "abcde"])
def test_the_last_is_never_ejected(names: str) -> None:
    """When every one is out they are all in: somebody is always asked."""
    fleet = Fleet(names)
    fleet.refuse(names)
    assert fleet.picks() == set(names)
    fleet = Fleet(names)
    for name in names:
        fleet.fail(name)
    assert fleet.picks() == set(names)


def opened(names: str = "abc") -> Fleet:
    """All are ejected and one more call has failed."""
    fleet = Fleet(names)
    fleet.refuse(names)
    fleet.clock.tick(0.001)
    fleet.refuse(names[0])
    return fleet


def test_breaker_fails_fast_until_a_time_that_it_tells() -> None:
    """When every instance fails, calls are turned away, and the error says until when."""
    fleet = opened()
    assert fleet.picks() == {None}
    assert 0 < fleet.pool.failing_fast_for <= REFUSED
    error = fleet.pool.unavailable()
    assert isinstance(error, NoHealthyInstanceError)
    assert str(error) == "Service 'cards': every one of its 3 instances fails; next try in 0.1 s"


def test_breaker_lets_one_probe_through_at_a_time() -> None:
    """Half-open: each time that it is due one call is let through, and the others are turned away as before."""
    fleet = opened("a")
    waits = []
    for _ in range(8):
        waits.append(fleet.pool.failing_fast_for)
        fleet.clock.tick(waits[-1] + 1e-6)
        assert fleet.picks(times=1) == {"a"}
        assert fleet.picks() == {None}
        fleet.refuse("a")
    assert waits[0] == pytest.approx(REFUSED, abs=0.01)
    assert sorted(waits) == waits
    assert waits[-1] == pytest.approx(MAX_REFUSED, abs=0.01)


def test_breaker_doubles_for_failed_answers_too() -> None:
    """Instances that answer 5xx for ever are asked at most every 0.8 s."""
    fleet = Fleet("ab")
    for name in "ab":
        fleet.fail(name)
    fleet.fail("a", 1)
    asked = []
    for _ in range(10_000):
        fleet.clock.tick(0.001)
        if endpoint := fleet.pool.pick((), safe=True):
            asked.append(fleet.clock.now - 1_000.0)
            fleet.pool.failed(endpoint, SENT, 0.0)
    assert asked[:4] == pytest.approx([0.1, 0.3, 0.7, 1.5], abs=0.01)
    assert len(asked) == pytest.approx(4 + 8.5 / MAX_REFUSED, abs=1)


def test_one_success_closes_the_breaker() -> None:
    """The probe was answered: that instance serves, the others return by probes of their own."""
    fleet = opened()
    fleet.clock.tick(REFUSED)
    assert fleet.picks(times=1) <= {"a", "b", "c"}
    fleet.answer("b")
    assert fleet.pool.failing_fast_for == 0.0
    assert "b" in fleet.picks()
    assert None not in fleet.picks()


def test_probing_call_goes_on_to_the_others() -> None:
    """One call that is let through asks all of them, so that the one that is back is found."""
    fleet = opened()
    fleet.clock.tick(MAX_REFUSED)
    tried: list[Endpoint] = []
    while endpoint := fleet.pool.pick(tried, safe=True):
        tried.append(endpoint)
        fleet.pool.failed(endpoint, NOT_SENT, 0.0)
    assert {endpoint.instance.id for endpoint in tried} == {"a", "b", "c"}


def test_instance_that_returns_is_found_within_a_second_when_all_are_dead() -> None:
    """Whichever of eight it is, with a call every 10 ms."""
    for back in "abcdefgh":
        fleet = opened("abcdefgh")
        for step in range(1_000):
            fleet.clock.tick(0.01)
            endpoint = fleet.pool.pick((), safe=True)
            if step > 500 and endpoint is fleet[back]:
                break
            if endpoint:
                fleet.pool.failed(endpoint, NOT_SENT, 0.001)
        assert step < 602


def test_change_of_the_list_closes_the_breaker() -> None:
    """A new instance is no suspect."""
    fleet = opened()
    fleet.change("abcd")
    assert fleet.picks() == {"d"}


def test_what_stays_is_remembered_over_a_change() -> None:
    """An update keeps ejections, failures and load of the instances that stay."""
    fleet = Fleet()
    fleet.refuse("b")
    fleet.fail("c", 3)
    fleet["a"].started[1] = fleet.clock.now
    fleet.change("abcd")
    assert "b" not in fleet.picks()
    assert (fleet["c"].failures, fleet["a"].in_flight) == (3, 1)


def test_what_returns_starts_anew() -> None:
    """An instance that left and was registered again is another process."""
    fleet = Fleet()
    fleet.refuse("b")
    fleet.change("ac")
    fleet.change("abc")
    assert fleet.picks() == {"a", "b", "c"}


def test_process_that_refused_starts_anew() -> None:
    """Once nobody listens, whoever does so next has not failed yet: its first bad answer ejects it not at once."""
    fleet = Fleet()
    fleet.fail("b")
    fleet.refuse("b")
    fleet.clock.tick(EJECTION)
    assert fleet.next_is("b")
    fleet.fail("b", 1)
    assert fleet.picks() == {"a", "b", "c"}


def test_gone_is_asked_only_when_no_listed_one_is_live() -> None:
    """What the registry no longer lists is the last resort: not for a retry, not while one listed instance works."""
    fleet = Fleet("abc")
    fleet.change("bc")
    assert fleet.picks() == {"b", "c"}
    assert fleet.picks(tried=[fleet["b"], fleet["c"]]) == {None}
    fleet.refuse("bc")
    assert fleet.picks(tried=[fleet["b"], fleet["c"]]) == {"a"}
    fleet.change("")
    assert fleet.picks() == {"a", "b", "c"}


def test_gone_that_refuses_is_dropped() -> None:
    """Gone from the registry and nobody listens: forgotten. One that answers badly still answers, up to five times."""
    fleet = Fleet("abc")
    endpoints = [fleet[name] for name in "abc"]
    fleet.change("")
    fleet.pool.failed(endpoints[0], NOT_SENT, 0.0)
    assert fleet.picks() == {"b", "c"}
    for _ in range(FAILURES_TO_EJECT - 1):
        fleet.pool.failed(endpoints[1], SENT, 0.0)
    assert fleet.picks() == {"b", "c"}
    fleet.pool.failed(endpoints[1], SENT, 0.0)
    assert fleet.picks() == {"c"}
    fleet.pool.failed(endpoints[2], NOT_SENT, 0.0)
    assert fleet.picks() == {None}
    assert not fleet.pool.knows_any


def test_gone_is_forgotten_after_a_while() -> None:
    """An address that another may have by now is not asked."""
    fleet = Fleet("abc")
    fleet.change("bc")
    fleet.clock.tick(KEEP_GONE + 1)
    fleet.change("")
    assert fleet.picks() == {"b", "c"}


def known_endpoints() -> int:
    gc.collect()
    return sum(isinstance(each, Endpoint) for each in gc.get_objects())


@pytest.mark.real
def test_memory_is_bounded_over_many_changes() -> None:
    """A thousand changes that replace every instance within a minute: no more is remembered than was meant to be."""
    policy = EjectionPolicy(remember_at_most=500)
    before, pool = known_endpoints(), Pool("cards", clock=Clock(), roster=Roster(policy))
    for change in range(1_000):
        pool.update(tuple(Instance(f"i{change}-{n}", "cards", "10.0.0.1", 1 + n) for n in range(50)))
        endpoint = pool.pick((), safe=True)
        assert endpoint
        pool.failed(endpoint, NOT_SENT, 0.0)
    assert known_endpoints() - before <= 500 + 50 + 1
    assert next(reversed(pool.gone))[0] == "i998-49"  # the last that left


@pytest.mark.real
def test_ten_thousand_instances_and_as_many_gone_are_the_most() -> None:
    """A fleet that is replaced over and over is remembered once."""
    before, pool = known_endpoints(), Pool("cards", clock=Clock())
    for change in range(5):
        pool.update(tuple(Instance(f"i{change}-{n}", "cards", "10.0.0.1", 1 + n) for n in range(10_000)))
    assert known_endpoints() - before <= 10_000 + MAX_GONE


@dataclass(frozen=True)
class Attempt:
    """One under way, and whom its call had asked before."""

    tried: list[Endpoint]
    endpoint: Endpoint
    started: float


@settings(max_examples=150, stateful_step_count=60, deadline=None)
class Ejection(RuleBasedStateMachine):
    """Calls, outcomes, changes of the list and time, in any order."""

    attempts: Bundle[Attempt] = Bundle("attempts")
    size = math.inf
    """How many the caller knows of those that are listed."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.pool = Pool("cards", clock=self.clock, roster=Roster(size=self.size, chance=random.Random(5)))
        self.under_way: dict[Endpoint, int] = {}
        self.next_key = 0

    @initialize(zone=st.sampled_from([None, "0"]))
    def begin(self, zone: str | None) -> None:
        self.pool = Pool("cards", clock=self.clock, zone=zone, roster=Roster(size=self.size, chance=random.Random(5)))

    @rule(names=st.sets(st.sampled_from("abcdef")))
    def change(self, names: set[str]) -> None:
        self.pool.update(instances(sorted(names)))

    @rule(seconds=st.sampled_from([0.001, 0.05, 0.1, 0.5, 1.0, 10.0, 31.0, 301.0, 700.0]))
    def wait(self, seconds: float) -> None:
        self.clock.tick(seconds)

    def _begin(self, tried: list[Endpoint], safe: bool) -> MultipleResults[Attempt]:
        now, pool = self.clock.now, self.pool
        listed = list(pool.endpoints.values())
        live = [endpoint for endpoint in listed if not endpoint.ejected_until]
        due = {endpoint for endpoint in listed if 0 < endpoint.ejected_until <= now}
        endpoint = pool.pick(tried, safe=safe)
        if endpoint is None:
            # Somebody is always asked, unless the breaker says until when nobody is.
            asked = {endpoint.instance.key for endpoint in tried}
            assert {each.instance.key for each in live} <= asked
            assert not live or {each.key for each in pool.snapshot} <= asked | {each.instance.key for each in listed}
            assert tried or not listed or 0 < pool.failing_fast_for <= MAX_REFUSED
            return multiple()
        assert endpoint not in tried
        if endpoint in listed and endpoint.ejected_until and live and endpoint not in due:
            # Ejected and asked while others stand: only when they are too few, and never one that refuses.
            assert 2 * len(live) < min(len(listed), self.size)
            assert not endpoint.refusals
        if endpoint.instance in pool.snapshot and endpoint not in listed:
            assert set(live) <= set(tried)
            assert len(pool.snapshot) > self.size
        elif endpoint not in listed:
            assert not live
            assert endpoint in [gone for gone, _ in pool.gone.values()]
        self.next_key += 1
        endpoint.started[self.next_key] = now
        self.under_way[endpoint] = self.under_way.get(endpoint, 0) + 1
        return multiple(Attempt(tried, endpoint, now))

    @rule(target=attempts, safe=st.booleans())
    def call(self, safe: bool) -> MultipleResults[Attempt]:
        return self._begin([], safe)

    @rule(target=attempts, attempt=consumes(attempts), failure=st.sampled_from([NOT_SENT, SENT]), safe=st.booleans())
    def fail_and_retry(self, attempt: Attempt, failure: Failure, safe: bool) -> MultipleResults[Attempt]:
        tried = [*attempt.tried, self._end(attempt)]
        self.pool.failed(attempt.endpoint, failure, self.clock.now - attempt.started)
        return self._begin(tried, safe)

    @rule(attempt=consumes(attempts))
    def succeed(self, attempt: Attempt) -> None:
        endpoint = self._end(attempt)
        self.pool.succeeded(endpoint, self.clock.now - attempt.started)
        if endpoint in self.pool.endpoints.values() and attempt.started > endpoint.ejected_at:
            assert not endpoint.ejected_until
            assert self.pool.failing_fast_for == 0.0

    @rule(attempt=consumes(attempts))
    def cancel(self, attempt: Attempt) -> None:
        self._end(attempt)

    def _end(self, attempt: Attempt) -> Endpoint:
        endpoint = attempt.endpoint
        del endpoint.started[next(iter(endpoint.started))]
        self.under_way[endpoint] -= 1
        return endpoint

    @invariant()
    def in_flight_is_what_is_under_way(self) -> None:
        assert all(endpoint.in_flight == count >= 0 for endpoint, count in self.under_way.items())

    @invariant()
    def candidates_are_listed_and_hold_every_live_one(self) -> None:
        listed = list(self.pool.endpoints.values())
        live = {endpoint for endpoint in listed if not endpoint.ejected_until}
        assert live <= set(self.pool._candidates) <= set(listed)
        assert bool(self.pool._candidates) is bool(listed)
        assert {endpoint.instance for endpoint in listed} <= set(self.pool.snapshot)
        # Those outside are for when one of them is ejected.
        assert len(live) == min(self.size, len(live) + len(self.pool.snapshot) - len(listed))
        assert not self.pool.gone.keys() & self.pool.endpoints.keys()
        assert {endpoint for endpoint, _ in self.pool.gone.values()} == set(self.pool._last_resort)

    @invariant()
    def zones_are_those_of_the_candidates(self) -> None:
        zones, candidates = self.pool.zones, self.pool._candidates or self.pool._last_resort
        if zones is None or not candidates:
            return
        near = [each for each in candidates if each.instance.zone == zones.zone]
        assert candidates.halves is not None
        assert (candidates.halves.near, len(candidates.halves.far)) == (near, len(candidates) - len(near))
        assert zones.near.step == 1 / (len(near) or 1)
        assert all((each.group is zones.near) is (each in near) for each in candidates)

    @invariant()
    def figures_stay_in_their_bounds(self) -> None:
        for endpoint in self.pool.endpoints.values():
            assert endpoint.ejected_until <= self.clock.now + MAX_EJECTION
            assert min(endpoint.failures, endpoint.ejections, endpoint.refusals) >= 0
            assert endpoint.turn <= (endpoint.group or self.pool._all).turn + LEAD + 1
            assert 0 <= endpoint.latency(self.clock.now) < float("inf")
        assert self.pool.failing_fast_for <= MAX_REFUSED

    def teardown(self) -> None:
        """Whatever has happened: when all answer well again, all are back within one ejection and a probe each."""
        for _ in range(1_000):
            self.clock.tick(0.5)
            if endpoint := self.pool.pick((), safe=True):
                self.pool.succeeded(endpoint, 0.0)
        assert not any(endpoint.ejected_until for endpoint in self.pool.endpoints.values())


class EjectionAmongFew(Ejection):
    """The same for a caller that knows two of up to six."""

    size = 2


TestEjection = pytest.mark.real(Ejection.TestCase)
TestEjectionAmongFew = pytest.mark.real(EjectionAmongFew.TestCase)
