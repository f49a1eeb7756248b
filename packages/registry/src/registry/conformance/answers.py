"""What a good citizen promises about its answers.

Each function returns what was seen, when the promise is kept. Raises: Shortfall, UnclearError; httpx.TransportError,
when the service did not answer; RegistryError, when Consul did not.
"""

import time
import uuid
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx

from registry.conformance.subject import SIGNATURE, Shortfall, Subject
from registry.discovery.context import DEADLINE_HEADER

__all__ = ["components", "deadline", "health", "no_ghost", "signed"]

HEALTH_SECONDS = 2.0
"""An agent that waits for a health endpoint registers nobody meanwhile."""
AT_ONCE = 1.0


def signed(subject: Subject) -> str:
    """Every response says who gave it."""
    nowhere = f"/nothing-{uuid.uuid4().hex[:8]}"
    answers = [
        subject.ask(),
        subject.ask(params={"instance": f"another-{uuid.uuid4().hex[:8]}"}),
        subject.ask(nowhere),
        subject.ask(nowhere, method="POST"),
        subject.ask(headers={DEADLINE_HEADER: _stamp(-60)}),
    ]
    names = set()
    for answer in answers:
        name = answer.headers.get(SIGNATURE)
        if name is None:
            what = f"{answer.request.method} {answer.request.url.raw_path.decode()} ({answer.status_code})"
            raise Shortfall(f"The answer to {what} carries no {SIGNATURE}: put the id on every answer, errors too.")
        names.add(name)
    if len(names) > 1:
        raise Shortfall(
            f"It says that it is {' and '.join(sorted(names)[:2])}: give one instance one id; or give the address of "
            "one instance here, not of a load balancer."
        )
    (name,) = names
    if name != subject.registered().id:
        raise Shortfall(f"It says that it is {name}, but is registered as {subject.registered().id}: say the same id.")
    return f"{len(answers)} of {len(answers)} answers say {name}, errors too."


def health(subject: Subject) -> str:
    """``/health`` is 200 when its components are well, 503 when one is sick."""
    begun = time.monotonic()
    answer = subject.ask()
    took = time.monotonic() - begun
    if answer.status_code not in {200, 503}:
        raise Shortfall(
            f"/health answers {answer.status_code}: answer 200 when it is able to work, 503 when it is not."
        )
    states = components(answer)
    sick = sorted(name for name, state in states.items() if state == "unhealthy")
    if answer.status_code == 200 and sick:
        raise Shortfall(
            f"/health answers 200 while its component {', '.join(sick)} is sick: answer 503, Consul reads nothing else."
        )
    if answer.status_code == 503 and not sick:
        raise Shortfall("/health answers 503, but every component that it names is well: name the sick one.")
    if (answer.json().get("status") == "healthy") != (answer.status_code == 200):
        raise Shortfall(f'/health answers {answer.status_code} with the status "{answer.json().get("status")}": agree.')
    if took > HEALTH_SECONDS:
        raise Shortfall(f"/health took {took:.1f} s: give each component less than {HEALTH_SECONDS:g} s to answer.")
    return f"/health answers {answer.status_code}; " + (f"sick: {', '.join(sick)}." if sick else "nothing is sick.")


def components(answer: httpx.Response) -> dict[str, str]:
    """Each component's status, from a health body; who is healthy need not name any. Raises: Shortfall."""
    body: Any = None
    with suppress(ValueError):
        body = answer.json()
    unnamed: dict[str, Any] | None = {} if isinstance(body, dict) and body.get("status") == "healthy" else None
    if isinstance(body, dict) and isinstance(found := body.get("components", unnamed), dict):
        states = {str(name): str(state.get("status")) for name, state in found.items() if isinstance(state, dict)}
        if len(states) == len(found) and set(states.values()) <= {"healthy", "degraded", "unhealthy"}:
            return states
    raise Shortfall(
        "The body of /health does not say how its components are: answer "
        '{"status": "healthy", "components": {"database": {"status": "healthy"}}}, with "unhealthy" for what is sick.'
    )


def no_ghost(subject: Subject) -> str:
    """A dead registration does not live on when its address is used again."""
    other = f"another-{uuid.uuid4().hex[:8]}"
    status = subject.ask(params={"instance": other}).status_code
    if status != httpx.codes.NOT_FOUND:
        raise Shortfall(
            f"/health?instance={other} answers {status}, though it is not {other}: answer 404 unless it is asked "
            "for its own id, or it keeps the registration of whoever had its address before."
        )
    own = subject.registered().id
    if subject.ask(params={"instance": own}).status_code == httpx.codes.NOT_FOUND:
        raise Shortfall(f"/health?instance={own} answers 404, though that is its own id: answer as /health does.")
    urls = [check.url for check in subject.checks() if check.url]
    if urls and not any(own in parse_qs(urlsplit(url).query).get("instance", ()) for url in urls):
        raise Shortfall(
            f"Consul's check asks {urls[0]}: let it ask /health?instance={own}, so that nobody else answers."
        )
    return "/health answers 404 to a check of somebody else."


def deadline(subject: Subject, path: str) -> str:
    """Who has no time left is not served."""
    begun = time.monotonic()
    status = subject.ask(path, headers={DEADLINE_HEADER: _stamp(-60)}).status_code
    took = time.monotonic() - begun
    if status != httpx.codes.GATEWAY_TIMEOUT:
        raise Shortfall(
            f"GET {path} answered {status} a minute after its {DEADLINE_HEADER}: answer 504 and do nothing, for nobody "
            "waits any more."
        )
    if took > AT_ONCE:
        raise Shortfall(f"GET {path} took {took:.1f} s to say that its {DEADLINE_HEADER} has passed: look at it first.")
    for stamp in (_stamp(60), "soon"):
        if subject.ask(path, headers={DEADLINE_HEADER: stamp}).status_code == httpx.codes.GATEWAY_TIMEOUT:
            raise Shortfall(
                f'GET {path} answered 504, though "{DEADLINE_HEADER}: {stamp}" has not passed: it is a Unix time in '
                "seconds, and what is none counts as absent."
            )
    return f"GET {path} answers 504 at once when its deadline has passed."


def _stamp(seconds: float) -> str:
    return f"{time.time() + seconds:.3f}"
