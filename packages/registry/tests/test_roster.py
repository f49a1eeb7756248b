"""Whom a caller knows of those that are listed: a change costs what changed, however many others there are."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest

from registry import Instance
from registry.discovery.pool import Pool
from registry.discovery.roster import SLICE
from registry.model import Snapshot


def listed(*numbers: int, weight: int = 1) -> Snapshot:
    return tuple(Instance(f"i{n:05}", "cards", f"10.0.{n >> 8}.{n & 255}", 8000, weight=weight) for n in numbers)


def filled(snapshot: Snapshot) -> Pool:
    """A pool that knows all of them."""
    pool = Pool("cards")
    pool.update(snapshot)
    while len(pool.endpoints) < len(snapshot):
        assert pool.pick((), safe=True)
    return pool


def steps(call: Callable[[], object]) -> int:
    """How many functions, written in Python or not, a call calls, and how many lines of Python it runs."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += 1
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return count


Edit = Callable[[Snapshot], Snapshot]
EDITS: dict[str, Edit] = {
    "joined": lambda snapshot: (*snapshot, *listed(20_000)),
    "left": lambda snapshot: (*snapshot[:5], *snapshot[6:]),
    "altered": lambda snapshot: (*snapshot[:5], replace(snapshot[5], tags=("blue",)), *snapshot[6:]),
    "same": lambda snapshot: (*snapshot,),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_a_change_takes_as_many_steps_among_ten_thousand_as_among_two_hundred(edit: Edit) -> None:
    """Counted, not timed: what is the same as before is not looked at one by one."""

    def taken(size: int) -> int:
        pool = filled(listed(*range(size)))
        after = edit(pool.snapshot)
        return steps(lambda: pool.update(after))

    assert taken(10_000) - taken(200) < 200  # places are found by halving: six halvings more, each some steps


def test_no_more_than_a_slice_is_made_at_once() -> None:
    """The first list is taken in step by step, and calls go on meanwhile to those that are known."""
    pool = Pool("cards")
    pool.update(listed(*range(3 * SLICE)))
    for known in (1, 2, 3, 3):
        assert len(pool.endpoints) == known * SLICE
        assert pool.pick((), safe=True) in pool.endpoints.values()


def test_what_is_known_stays_with_an_instance_that_is_altered() -> None:
    """Another weight counts at once; the endpoint, and what is under way there, is the same."""
    pool = filled(listed(1, 2))
    before = dict(pool.endpoints)
    pool.update((listed(1, weight=9)[0], pool.snapshot[1]))
    assert pool.endpoints == before
    picks = [pool.pick((), safe=True) for _ in range(300)]
    assert picks.count(before["i00001", "10.0.0.1", 8000]) > 200


def test_a_key_that_is_listed_twice_leaves_when_both_have() -> None:
    """Two nodes may have the same entry, of which one goes first."""
    (one,), (other,), (third,) = listed(1), listed(1), listed(2)
    pool = filled((third,))
    assert pool.update((one, other, third)).joined == {one.key: other}
    for rest in ((one, third), (other, third), (one, third)):
        assert pool.update(rest) == ({}, {}, {})
        assert one.key in pool.endpoints
    assert pool.update((third,)).left.keys() == {one.key}
    assert one.key not in pool.endpoints
