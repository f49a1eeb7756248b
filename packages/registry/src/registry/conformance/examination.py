"""The examination: every promise in turn, and what was found."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import httpx

from registry.conformance import answers, presence, upheaval
from registry.conformance.subject import Shortfall, Subject, UnclearError
from registry.errors import RegistryError
from registry.settings import ConsulSettings

__all__ = ["PROMISES", "CannotExamineError", "Finding", "Verdict", "examine"]

Verdict = Literal["kept", "broken", "unclear", "not asked for"]
"""``unclear``: could not be observed, so not passed. ``not asked for``: needs an option, since it may disturb."""

PROMISES = {
    "registered": "Consul lists it",
    "address": "the registered address leads callers to it, also from elsewhere",
    "instance-id": "its id is nobody else's",
    "signed": "every answer carries X-Service-Instance with that id",
    "health": "/health is 200 when its components are well, and 503, naming it, when one is sick",
    "checked": "Consul's check asks /health, at the registered address",
    "no-ghost": "/health?instance=<another> is 404, and Consul's check names the id",
    "discoverable": "it is found when it is well, and only then",
    "deadline": "a request whose X-Request-Deadline has passed is answered 504 at once",
    "leaves-when-sick": "discovery drops it while a component is sick, and takes it back",
    "comes-back": "forgotten by Consul, it registers again",
    "drains": "on SIGTERM it leaves Consul, serves on for a moment, and only then ends",
}
"""Name → promise, in the order of the examination."""

Act = Callable[[], object]


class CannotExamineError(RuntimeError):
    """The service or Consul does not answer at all. The message says which one, and what to do."""


@dataclass(frozen=True)
class Finding:
    """The result for one promise."""

    promise: str
    verdict: Verdict
    sentence: str
    """What was observed; if the promise is broken, also what to do."""

    def __str__(self) -> str:
        """As a line."""
        verdict = self.verdict.upper() if self.verdict in {"broken", "unclear"} else self.verdict
        return f"{verdict:<13}  {self.promise:<16}  {self.sentence}"


def examine(
    url: str,
    consul: ConsulSettings | None = None,
    *,
    path: str = "/health",
    replica: str | None = None,
    sicken: Act | None = None,
    heal: Act | None = None,
    forget: bool = False,
    stop: Act | None = None,
    patience: float = 15.0,
    tell: Callable[[Finding], object] | None = None,
) -> list[Finding]:
    """Returns one finding for each of `PROMISES`, in order, about the instance at ``url``. Blocks for some seconds.

    ``consul``: the agent with which it registers, by default from the environment. ``path``: a path that may be
    requested with a GET. ``replica``: the URL of a second instance, which must have a different id.

    The other promises disturb the service, and are only checked on request: ``sicken`` and ``heal`` make one of its
    components fail and work again (takes about four check intervals); ``forget=True`` removes it from Consul; ``stop``
    tells it to stop, like SIGTERM, and may block until it has exited. ``patience``: seconds to wait for slow changes.
    ``tell`` is called with each finding at once. Raises: CannotExamineError.
    """
    with Subject(url, consul or ConsulSettings(), patience) as subject:
        _meet(subject)
        steps: dict[str, Callable[[Subject], str] | str] = {
            "registered": presence.registered,
            "address": presence.address,
            "instance-id": partial(presence.instance_id, replica=replica),
            "signed": answers.signed,
            "health": answers.health,
            "checked": presence.checked,
            "no-ghost": answers.no_ghost,
            "discoverable": presence.discoverable,
            "deadline": partial(answers.deadline, path=path),
            "leaves-when-sick": partial(upheaval.leaves_when_sick, sicken=sicken, heal=heal)
            if sicken and heal
            else "Say how to make a component sick and well again (--sicken, --heal).",
            "comes-back": upheaval.comes_back if forget else "Allow to take it out of Consul (--forget).",
            "drains": partial(upheaval.drains, stop=stop)
            if stop
            else "Say how to stop it (--pid, --stop): it will end.",
        }
        findings = []
        for promise, step in steps.items():
            findings.append(_finding(promise, step, subject))
            if tell:
                tell(findings[-1])
        return findings


def _meet(subject: Subject) -> None:
    try:
        subject.ask()
    except (httpx.TransportError, httpx.InvalidURL) as error:
        what = str(error) or type(error).__name__
        raise CannotExamineError(f"Nobody answers at {subject.url} ({what}): start the service first.") from error
    try:
        subject.agent.instances()
    except RegistryError as error:
        raise CannotExamineError(str(error)) from error


def _finding(promise: str, step: Callable[[Subject], str] | str, subject: Subject) -> Finding:
    if isinstance(step, str):
        return Finding(promise, "not asked for", step)
    try:
        return Finding(promise, "kept", step(subject))
    except Shortfall as shortfall:
        return Finding(promise, "broken", str(shortfall))
    except (UnclearError, RegistryError) as error:
        return Finding(promise, "unclear", str(error))
    except httpx.TransportError as error:
        what = f"{type(error).__name__} {error}".strip()
        return Finding(promise, "broken", f"A request got no answer ({what}): answer every request, within seconds.")
