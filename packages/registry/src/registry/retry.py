"""The former place of `registry.discovery.retry`, for those who import from here; it goes with the next release."""

from registry.discovery.advice import retry_after
from registry.discovery.retry import RetryBudget, RetryPolicy, is_idempotent

__all__ = ["RetryBudget", "RetryPolicy", "is_idempotent", "retry_after"]
