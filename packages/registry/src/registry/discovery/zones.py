"""Keeps calls in the caller's own zone while that has capacity, and sends elsewhere what is too much for it.

Two things decide which part stays. *Few*: the zones are taken to call equally much, so one with less than its share of
the instances keeps as much as these are of a share; then every instance gets the same. *Slow*: that zones do not call
equally much shows in the time that answers take. While those of the own zone take longer than others', less is sent
there, the less the longer it takes, until it no longer does. Both are continuous: nothing tips over.

One call in fifty goes elsewhere anyhow, or nobody would know how long it takes there.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from registry.discovery.balancing import Candidates, Halves, Pick
from registry.discovery.endpoint import Endpoint
from registry.discovery.group import NOISE, Group
from registry.telemetry import PickReason

__all__ = ["FADE", "SAMPLE", "SLOW", "ZoneFirst", "ZoneState"]

SAMPLE = 0.02
"""The part of the calls that goes elsewhere in any case."""
SLOW = 1.5
"""So many times as long as elsewhere answers may take before less stays."""
FADE = 10.0
"""Seconds after which what is known of a zone that is asked no more counts for 1/e, so that it is tried again."""


@dataclass(frozen=True, slots=True)
class ZoneState:
    """How far one upstream's calls stay in the caller's own zone."""

    own: str
    kept: float
    """The part of the calls that stays there at present."""
    spilled: Mapping[PickReason, float]
    """The parts that go elsewhere, and why: ``zone_few``, ``zone_slow``, ``zone_sample``."""
    own_picks: int
    """How often an instance of the own zone was picked."""
    other_picks: int


class ZoneFirst:
    """A policy over another: that one picks, within the own zone or elsewhere. One per upstream."""

    def __init__(self, pick: Pick, zone: str) -> None:
        self.zone = zone
        self.near, self.far = Group(), Group()
        self._pick = pick
        self._candidates = Candidates()

    def __call__(self, candidates: Candidates, now: float) -> Endpoint:
        halves = candidates.halves or self._halve(candidates)
        if not halves.far:
            return self._pick_near(candidates, halves, now)
        chance, share, near = random.random(), halves.share, self.near
        if chance >= share:
            candidates.reason = _lacking(share)
        elif chance >= share * self._kept(near.usual - self.far.usual, now - near.updated):
            candidates.reason = "zone_slow"
        else:
            endpoint = self._pick_near(candidates, halves, now)
            if chance < share * self._kept_despite_silence(endpoint, now):
                return endpoint
            candidates.reason = "zone_slow"
        return self._pick(halves.far, now)

    def _pick_near(self, candidates: Candidates, halves: Halves, now: float) -> Endpoint:
        endpoint = self._pick(halves.near, now)
        candidates.reason = halves.near.reason
        return endpoint

    def rebuilt(self, candidates: Candidates) -> None:
        """These are the candidates from now on."""
        self._candidates = candidates
        halves = self._halve(candidates)
        self.near.step, self.far.step = 1 / (halves.near.weight or 1), 1 / (halves.far.weight or 1)

    def state(self, now: float) -> ZoneState:
        """How the next pick would go."""
        halves = self._candidates.halves or self._halve(self._candidates)
        kept = share = halves.share
        spilled: dict[PickReason, float] = {}
        if share < 1:
            spilled[_lacking(share)] = 1 - share
        if halves.near and halves.far:
            kept *= self._kept(self.near.usual - self.far.usual, now - self.near.updated)
            silent = sum(self._kept_despite_silence(endpoint, now) for endpoint in halves.near) / len(halves.near)
            kept = min(kept, share * silent)
        if kept < share:
            spilled["zone_slow"] = share - kept
        return ZoneState(self.zone, kept, spilled, self.near.picks, self.far.picks)

    def _kept_despite_silence(self, endpoint: Endpoint, now: float) -> float:
        silence = endpoint.silence(now)
        return self._kept(math.log(silence + NOISE) - max(self.near.long, self.far.long)) if silence else 1.0

    def _kept(self, excess: float, age: float = 0.0) -> float:
        """The part that stays though answers take e^excess times as long, as was last seen so many seconds ago."""
        if excess <= _SLOW or not self.far.known:
            return 1.0
        excess *= math.exp(-age / FADE)
        return 1.0 if excess <= _SLOW else math.exp(2 * (_SLOW - excess))

    def _halve(self, candidates: Candidates) -> Halves:
        near: list[Endpoint] = []
        far: list[Endpoint] = []
        zones = {self.zone}
        for endpoint in candidates:
            zone = endpoint.instance.zone
            endpoint.group = self.near if zone == self.zone else self.far
            (near if zone == self.zone else far).append(endpoint)
            zones.add(zone or "")
        here = Candidates(near)
        share = min(here.weight * len(zones) / candidates.weight, 1 - SAMPLE) if far else 1.0
        candidates.halves = Halves(here, Candidates(far), share)
        return candidates.halves


def _lacking(share: float) -> PickReason:
    """Why no more than this part stays."""
    return "zone_sample" if share == 1 - SAMPLE else "zone_few"


_SLOW = math.log(SLOW)
