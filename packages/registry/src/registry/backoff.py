"""How long to wait before trying again: a delay that grows, and differs from everybody else's."""

import tenacity

__all__ = ["Backoff"]


class Backoff:
    """Full-jitter exponential delays: uniform between 0 and ``base`` × 2 ** (attempt - 1), at most ``cap`` seconds.

    Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """

    def __init__(self, base: float, cap: float) -> None:
        self._wait = tenacity.wait_random_exponential(multiplier=base, max=cap)

    def delay(self, attempt: int) -> float:
        """Seconds to wait after the ``attempt``-th failure (1-based)."""
        state = tenacity.RetryCallState(retry_object=tenacity.Retrying(), fn=None, args=(), kwargs={})
        state.attempt_number = attempt
        return self._wait(state)
