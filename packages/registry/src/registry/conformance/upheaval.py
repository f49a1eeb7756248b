"""What a good citizen promises for the worse days, and what it takes to see it: each of these disturbs the service.

Returns and raises as in `registry.conformance.presence`.
"""

import threading
import time
from collections.abc import Callable

import httpx

from registry.conformance.answers import components
from registry.conformance.presence import FAILURES_BEFORE_CRITICAL
from registry.conformance.subject import Shortfall, Subject, UnclearError, until
from registry.errors import RegistryError

__all__ = ["comes_back", "drains", "leaves_when_sick"]

SERVES_ON = 0.2
"""Seconds: watchers learn of a change within milliseconds, and who had chosen the instance before still comes."""
CONSUL_LEARNS = 3.0
"""Seconds: how late a withdrawal may be and still be told from none."""

Act = Callable[[], object]


def comes_back(subject: Subject) -> str:
    """Consul forgets it, and it registers again by itself. If it does not, it is put back."""
    instance = subject.registered()
    if not subject.is_passing():
        raise UnclearError("Discovery does not find it now, so its return would not show.")
    entry = subject.agent.deregister(instance.id)
    begun = time.monotonic()
    # The agent knows at once that it is gone, discovery a moment later.
    if until(lambda: subject.agent.lists(instance.id) and subject.is_passing(), subject.patience):
        return f"It was back {time.monotonic() - begun:.1f} s after Consul forgot it."
    try:
        subject.agent.register(entry)
        left = "It is put back now, as Consul showed it"
    except RegistryError:
        left = "It is out of Consul now"
    raise Shortfall(
        f"Consul forgot it, and {subject.patience:g} s later it was not back: look every few seconds whether the agent "
        f"still knows the id, and register again. ({left}: restart it.)"
    )


def leaves_when_sick(subject: Subject, sicken: Act, heal: Act) -> str:
    """Discovery drops it while a component is sick, and finds it again afterwards."""
    subject.registered()
    if not subject.is_passing():
        raise UnclearError("Discovery does not find it now, so its leaving would not show.")
    slowest = max((check.interval for check in subject.checks()), default=0.0)
    patience = FAILURES_BEFORE_CRITICAL * slowest + subject.patience
    try:
        _act(sicken)
        if not until(lambda: subject.ask().status_code == httpx.codes.SERVICE_UNAVAILABLE, subject.patience):
            status = subject.ask().status_code
            raise Shortfall(f"/health answers {status} after a component was made sick: let it answer 503.")
        sick = sorted(name for name, state in components(subject.ask()).items() if state != "healthy")
        if not sick:
            raise Shortfall("/health answers 503, but every component that it names is well: name the sick one.")
        begun = time.monotonic()
        if not until(lambda: not subject.is_passing(), patience):
            raise Shortfall(
                f"/health answers 503, and {patience:g} s later discovery still finds it: let Consul's check ask "
                "/health, and let nothing but that check decide."
            )
        left = time.monotonic() - begun
    finally:
        _act(heal)
    if not until(subject.is_passing, patience):
        raise Shortfall(f"It was healed, and {patience:g} s later discovery does not find it: let /health answer 200.")
    return f"/health named {', '.join(sick)}; discovery dropped it after {left:.1f} s, and finds it again."


def drains(subject: Subject, stop: Act) -> str:
    """Told to stop, it leaves Consul first, serves on for a moment, and only then ends."""
    instance, signature = subject.registered(), subject.signature()
    if not subject.is_passing():
        raise UnclearError("Discovery does not find it now, so its leaving would not show.")
    failed: list[Exception] = []

    def stopping() -> None:
        try:
            stop()
        except Exception as error:
            failed.append(error)

    # It may block until everything is over, as "docker stop" does.
    threading.Thread(target=stopping, daemon=True).start()
    begun = time.monotonic()
    left = last_answer = None
    while time.monotonic() < begun + subject.patience and not failed:
        if left is None and not subject.is_passing():
            left = time.monotonic()
        if not subject.answers(signature):
            break
        last_answer = time.monotonic()
        time.sleep(0.01)
    else:
        if failed:
            raise UnclearError(f"It could not be told to stop: {failed[0]!r}.")
        what = "it is in Consul and answers" if left is None else "it has left Consul, but still answers"
        raise Shortfall(f"{subject.patience:g} s after it was told to stop {what}: leave Consul, drain, and end.")
    ended = time.monotonic()
    if not until(lambda: not subject.agent.lists(instance.id), min(CONSUL_LEARNS, subject.patience)):
        raise Shortfall(
            "It has ended, and Consul still lists it: deregister on SIGTERM, before anything else, and serve on while "
            "callers learn of it."
        )
    if left is None:
        raise Shortfall(
            "It left Consul only after it had stopped answering: deregister on SIGTERM at once, and close the listener "
            "a second or two later."
        )
    served = (last_answer or left) - left
    if served < SERVES_ON:
        raise Shortfall(
            f"It stopped answering {max(served, 0):.2f} s after it left Consul: serve on for a second or two, callers "
            "that chose it before still come."
        )
    return f"It left Consul {left - begun:.2f} s after it was told to, served on for {ended - left:.1f} s, and ended."


def _act(act: Act) -> None:
    try:
        act()
    except Exception as error:
        raise UnclearError(f"The command failed: {error}") from error
