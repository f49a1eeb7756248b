"""Turns calls away while every endpoint fails, for a short time that doubles.

Nothing here blocks, locks or sends.
"""

from registry.discovery.options import EjectionPolicy

__all__ = ["Breaker"]


class Breaker:
    """Closed until it is opened; then a call is let through now and then, and the others fail fast."""

    def __init__(self, policy: EjectionPolicy) -> None:
        self.until = 0.0
        """When the next call may try; 0: it is closed."""
        self._seconds = 0.0
        self._policy = policy

    def open(self, now: float) -> float:
        """Every endpoint fails. Returns for how many seconds calls are turned away."""
        self._seconds = self._policy.refused
        self.until = now + self._seconds
        return self._seconds

    def stay_open(self, now: float) -> None:
        """One call tries: the others are turned away for twice as long."""
        self._seconds = min(2 * self._seconds, self._policy.max_refused)
        self.until = now + self._seconds

    def close(self) -> bool:
        """Somebody answers; whether it was open."""
        was_open = bool(self.until)
        self.until = self._seconds = 0.0
        return was_open
