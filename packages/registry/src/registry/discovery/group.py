"""Endpoints among which turns are taken: all of an upstream, or those of one zone, and how long answers take there.

Nothing here blocks, locks or sends.
"""

import math

__all__ = ["LEAD", "NOISE", "Group"]

LEAD = 4.0
"""Turns that an endpoint may be ahead or behind: caps the share that a returning endpoint may claim back."""
NOISE = 0.001
"""Seconds that are added to each measurement, as differences below are noise."""
MEMORY = 64
"""Answers that the average is taken over."""
SECONDS = 10.0
"""Seconds after which an old answer counts for 1/e, if they come more rarely."""
UNKNOWN = 0.1
"""Seconds that an answer may take where none has come yet."""


class Group:
    """Whose turn it is, and the usual time of an answer: its logarithm, so that a few long ones do not decide."""

    __slots__ = ("_answers", "_variance", "picks", "step", "turn", "updated", "usual")

    def __init__(self) -> None:
        self.picks = 0
        """How often one of them was picked."""
        self.turn = 0.0
        self.step = 1.0
        """By how much each pick brings them all forward: 1 / their weight."""
        self.usual = math.log(UNKNOWN)
        self.updated = -math.inf
        """When that was measured last; -inf: never."""
        self._variance = 0.0
        self._answers = 0

    def take_turn(self, turn: float, weight: int) -> float:
        """The turn of one that is picked now, and had this one before: it moves on by 1 / its weight."""
        self.picks += 1
        self.turn += self.step
        return min(max(turn, self.turn - LEAD), self.turn + LEAD) + 1 / weight

    def observe(self, seconds: float, now: float) -> None:
        """An answer took so long."""
        self._answers = min(self._answers + 1, MEMORY)
        weight = max(1 / self._answers, 1 - math.exp((self.updated - now) / SECONDS))
        off = math.log(seconds + NOISE) - self.usual
        self.usual += weight * off
        self._variance = (1 - weight) * (self._variance + weight * off * off)
        self.updated = now

    @property
    def known(self) -> bool:
        """Whether any answer was measured."""
        return self._answers > 0

    @property
    def long(self) -> float:
        """What few answers take longer than; a logarithm, too."""
        return self.usual + 3 * math.sqrt(self._variance)
