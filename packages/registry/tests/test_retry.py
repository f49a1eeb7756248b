"""The decision table row by row, the delays, the budget and what Retry-After means. No I/O, injected clocks."""

import math
import random
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import RetryPolicy
from registry.backoff import Backoff
from registry.discovery.advice import retry_after
from registry.discovery.blame import Failure
from registry.discovery.retry import RetryBudget, is_idempotent

NOT_SENT, SENT, FINAL = Failure.NOT_SENT, Failure.SENT, Failure.FINAL
NOT_EXECUTED, TOO_EARLY = Failure.NOT_EXECUTED, Failure.TOO_EARLY


@pytest.mark.parametrize(
    ("failure", "idempotent", "replayable", "allowed"),
    [
        (NOT_SENT, True, True, True),
        (NOT_SENT, False, True, True),
        (NOT_SENT, True, False, False),
        (NOT_SENT, False, False, False),
        (NOT_EXECUTED, True, True, True),
        (NOT_EXECUTED, False, True, True),
        (NOT_EXECUTED, True, False, False),
        (NOT_EXECUTED, False, False, False),
        (SENT, True, True, True),
        (SENT, False, True, False),
        (SENT, True, False, False),
        (SENT, False, False, False),
        (TOO_EARLY, True, True, True),
        (TOO_EARLY, False, True, False),
        (TOO_EARLY, True, False, False),
        (TOO_EARLY, False, False, False),
        (FINAL, True, True, False),
        (FINAL, False, True, False),
        (FINAL, True, False, False),
        (FINAL, False, False, False),
    ],
)
def test_decision_table(failure: Failure, idempotent: bool, replayable: bool, allowed: bool) -> None:
    """Each row: what did nothing may go again, the rest only if idempotent; never a body that can't be replayed."""
    assert RetryPolicy().allows(failure, idempotent=idempotent, replayable=replayable) is allowed


@pytest.mark.parametrize(
    ("method", "idempotent"),
    [
        ("GET", True),
        ("HEAD", True),
        ("OPTIONS", True),
        ("TRACE", True),
        ("PUT", True),
        ("DELETE", True),
        ("POST", False),
        ("PATCH", False),
        ("CONNECT", False),
        ("PURGE", False),
    ],
)
def test_methods(method: str, idempotent: bool) -> None:
    """RFC 9110's idempotent methods may be sent twice, all others not; the caller's word beats the method."""
    url = "http://cards/"
    assert is_idempotent(httpx.Request(method, url)) is idempotent
    assert is_idempotent(httpx.Request(method, url, extensions={"idempotent": True})) is True
    assert is_idempotent(httpx.Request(method, url, extensions={"idempotent": False})) is False
    assert is_idempotent(httpx.Request(method, url, headers={"idempotency-KEY": "1"})) is True


# -- delays ------------------------------------------------------------------------------------------------------------


@given(base=st.floats(0, 10), cap=st.floats(0, 60), attempt=st.integers(1, 100_000))
def test_delay_stays_within_its_bounds(base: float, cap: float, attempt: int) -> None:
    """A delay lies between 0 and base × 2 ** (attempt - 1), and never above the cap, however many attempts failed."""
    bound = cap if attempt > 100 else min(cap, base * 2 ** (attempt - 1))
    assert 0 <= Backoff(base, cap).delay(attempt) <= bound + 1e-9


def test_delay_has_full_jitter() -> None:
    """Delays fill the whole range from zero, so that clients that failed together do not come back together."""
    delays = [Backoff(1.0, 60.0).delay(3) for _ in range(2000)]
    assert min(delays) < 0.2
    assert max(delays) > 3.8
    assert sum(delays) / len(delays) == pytest.approx(2.0, abs=0.15)


def test_retry_after_is_a_lower_bound_of_the_delay() -> None:
    """Whoever asks for more time than the back-off gets it."""
    policy = RetryPolicy(retry_delay=0.1, max_delay=1.0)
    assert policy.delay(1, 30.0) == 30.0
    assert policy.delay(1, 0.0) <= 0.1
    assert policy.delay(1) <= 0.1


# -- budget ------------------------------------------------------------------------------------------------------------


class Clock:
    """Time that goes on when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def spend(budget: RetryBudget) -> int:
    """How many retries the budget pays for right now."""
    retries = 0
    while budget.withdraw():
        retries += 1
        assert retries < 100_000
    return retries


def test_budget_starts_with_a_second() -> None:
    """A fresh client may retry ten times at once."""
    assert spend(RetryBudget(clock=Clock())) == 10


def test_budget_grows_with_calls() -> None:
    """A hundred calls pay for twenty retries."""
    budget = RetryBudget(clock=Clock())
    spend(budget)
    for _ in range(100):
        budget.deposit()
    assert spend(budget) == pytest.approx(20, abs=1)


def test_budget_grows_with_time_to_a_limit() -> None:
    """A second pays for ten retries; a quiet day for no more than ten seconds do."""
    clock = Clock()
    budget = RetryBudget(clock=clock)
    spend(budget)
    clock.now += 1
    assert spend(budget) == 10
    clock.now += 86_400
    assert spend(budget) == 100


def test_many_calls_save_up_no_more_than_the_limit() -> None:
    """A million good calls do not pay for a storm of retries."""
    budget = RetryBudget(clock=Clock())
    for _ in range(1_000_000):
        budget.deposit()
    assert spend(budget) <= 100


@given(st.lists(st.tuples(st.sampled_from(["call", "retry"]), st.floats(0, 0.5)), max_size=400))
def test_budget_holds_whatever_happens(events: list[tuple[str, float]]) -> None:
    """Retries are at most 20 % of the calls, plus ten per second that passed, plus the ten of the start."""
    clock = Clock()
    budget = RetryBudget(clock=clock)
    start, calls, retries = clock.now, 0, 0
    for event, seconds in events:
        clock.now += seconds
        if event == "call":
            budget.deposit()
            calls += 1
        elif budget.withdraw():
            retries += 1
        assert retries <= 0.2 * calls + 10 * (clock.now - start) + 10 + 1e-6


# -- Retry-After -------------------------------------------------------------------------------------------------------


def asks(value: str | bytes) -> float | None:
    """What ``retry_after`` reads from this header."""
    return retry_after(
        httpx.Response(503, headers=[(b"Retry-After", value if isinstance(value, bytes) else value.encode())])
    )


def test_retry_after_in_seconds() -> None:
    """A number is seconds; blanks around it do not matter."""
    assert (asks("0"), asks("7"), asks(" 120 ")) == (0.0, 7.0, 120.0)


def test_retry_after_as_a_date() -> None:
    """A date is the time until then, and one in the past means now."""
    soon = asks(format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True))
    assert soon == pytest.approx(90, abs=2)
    assert asks("Sun, 06 Nov 1994 08:49:37 GMT") == 0.0


def test_no_retry_after() -> None:
    """Without the header nobody asks for anything."""
    assert retry_after(httpx.Response(503)) is None


@pytest.mark.parametrize(
    "value", ["", "soon", "-5", "1.5", "1e3", "0x10", "Sun, 99 Foo 1994 25:61:61 GMT", "Mon, 01 Jan 99999 00:00:00 GMT"]
)
def test_odd_retry_after_is_ignored(value: str) -> None:
    """What is neither a whole number nor a date asks for nothing, and breaks nothing."""
    assert asks(value) is None


@given(st.binary(max_size=40))
def test_hostile_retry_after_breaks_nothing(value: bytes) -> None:
    """Whatever stands in the header, the result is a finite number of seconds, 0 or more, or None."""
    wanted = asks(value)
    assert wanted is None or (wanted >= 0 and math.isfinite(wanted))


@pytest.mark.parametrize("value", [b"\xb2", "٣".encode(), b"9" * 400])
def test_digits_that_are_no_number_break_nothing(value: bytes) -> None:
    """Superscripts, other scripts' digits and absurdly large numbers are no seconds to wait."""
    wanted = asks(value)
    assert wanted is None or (wanted >= 0 and math.isfinite(wanted))


def test_clock_of_dates_is_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A date is compared with the wall clock, to the second."""
    monkeypatch.setattr(time, "time", lambda: datetime(1994, 11, 6, 8, 49, 7, tzinfo=UTC).timestamp())
    assert asks("Sun, 06 Nov 1994 08:49:37 GMT") == 30.0


def test_jitter_comes_from_the_seedable_generator() -> None:
    """A seeded test run sees the same delays."""
    random.seed(7)
    first = [Backoff(1.0, 60.0).delay(n) for n in range(1, 6)]
    random.seed(7)
    assert [Backoff(1.0, 60.0).delay(n) for n in range(1, 6)] == first
