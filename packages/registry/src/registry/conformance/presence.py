"""What a good citizen promises about its entry in Consul, as far as it shows without disturbing it.

Each function returns what was seen, when the promise is kept. Raises: Shortfall, UnclearError; httpx.TransportError,
when the service did not answer; RegistryError, when Consul did not.
"""

from urllib.parse import urlsplit

import httpx

from registry.conformance.agent import HealthCheck
from registry.conformance.subject import SIGNATURE, Shortfall, Subject, UnclearError, is_loopback, until

__all__ = ["FAILURES_BEFORE_CRITICAL", "address", "checked", "discoverable", "instance_id", "registered"]

FAILURES_BEFORE_CRITICAL = 3


def registered(subject: Subject) -> str:
    """Consul knows it."""
    until(lambda: subject.find() is not None, subject.patience)
    subject.instance = subject.find()
    if subject.instance is None and subject.agent.hides:
        raise UnclearError(f"The agent at {subject.agent.url} hides services: give a token with service:read on this.")
    if subject.instance is None:
        known_as = subject.signature()
        who = f"no instance {known_as}, and none" if known_as else "no instance"
        raise Shortfall(
            f"The agent at {subject.agent.url} lists {who} with the address of {subject.url}: register it "
            "(PUT /v1/agent/service/register) once it answers, or give --consul the agent that it registers with."
        )
    return f"{subject.instance.id} of {subject.instance.service}."


def address(subject: Subject) -> str:
    """The registered address leads callers to it, and to nobody else."""
    instance, agent = subject.registered(), subject.agent.address()
    host = instance.address or agent  # Consul's rule: the service's address, else its node's
    if not instance.port:
        raise Shortfall("It is registered without a port: register the one on which callers reach it.")
    if is_loopback(host) and not is_loopback(agent):
        raise Shortfall(
            f"It is registered as {host}, but its Consul agent is at {agent}: callers elsewhere would only reach "
            "themselves; register the address from which it reaches Consul."
        )
    netloc = f"[{host}]:{instance.port}" if ":" in host else f"{host}:{instance.port}"
    expected = subject.signature()
    try:
        found = subject.signature(f"{urlsplit(subject.url).scheme}://{netloc}")
    except httpx.TransportError as error:
        if any(check.status == "passing" and _netloc(check) == netloc for check in subject.checks() if check.output):
            return f"{netloc} does not answer from here, but Consul's check reaches it."
        raise Shortfall(
            f"Nobody answers at the registered address {netloc} ({type(error).__name__}): register the address and "
            "port on which callers reach it, and listen there."
        ) from None
    if found != expected:
        raise Shortfall(
            f"At the registered address {netloc}, {found or 'somebody without a name'} answers, and not "
            f"{expected or 'who answers at the given one'}: register its own address and port."
        )
    if found is None and urlsplit(subject.url).netloc != netloc:
        raise UnclearError(f"Whether it is this one that answers at {netloc} can't be told without {SIGNATURE}.")
    return f"It answers at {netloc}."


def instance_id(subject: Subject, replica: str | None) -> str:
    """Its id is nobody else's."""
    instance = subject.registered()
    cure = "make the id of its name, address and port."
    if instance.id == instance.service:
        raise Shortfall(f"Its id is the name of the service, {instance.id}: replicas overwrite each other; {cure}")
    nodes = subject.agent.nodes(instance)
    if len(nodes) > 1:
        raise Shortfall(f"The id {instance.id} is registered on {len(nodes)} nodes, {', '.join(sorted(nodes))}: {cure}")
    if replica is None:
        return f"{instance.id}; that a second one has another can be seen with --replica."
    if subject.signature(replica) == instance.id:
        raise Shortfall(f"The one at {replica} says that it is {instance.id}, too: {cure}")
    until(lambda: subject.find(replica) is not None, subject.patience)  # It may have been started just now.
    other = subject.find(replica)
    if other is None:
        raise Shortfall(f"Only one of the two is in Consul, {instance.id}: if {replica} overwrote it or was, {cure}")
    return f"{instance.id}, and {other.id} at {replica}."


def checked(subject: Subject) -> str:
    """Consul asks its ``/health``, at the address that callers use."""
    instance = subject.registered()
    checks = [check for check in subject.checks() if check.kind == "http"]
    if not checks:
        kinds = sorted({check.kind for check in subject.checks()})
        has = (
            f"only a check of the kind {', '.join(kinds)}" if kinds else "no check, so it is found even when it is dead"
        )
        raise Shortfall(f"Consul has {has}: register an HTTP check of its /health.")
    known = [check for check in checks if check.url]
    if not known:
        raise UnclearError("Consul does not say what its check asks (check_update_interval, discard_check_output?).")
    ours = [check for check in known if urlsplit(check.url).path == "/health"]
    if not ours:
        raise Shortfall(f"Consul's check asks {known[0].url}: let it ask /health.")
    if all(_netloc(check) != instance.netloc for check in ours) and instance.address:
        raise Shortfall(
            f"Consul's check asks {ours[0].url}, but callers are sent to {instance.netloc}: check the address that is "
            "registered, or one that nobody reaches passes."
        )
    return f"Consul asks {ours[0].url} every {ours[0].interval:g} s."


def discoverable(subject: Subject) -> str:
    """It is found if it is well, and only then."""
    instance = subject.registered()
    if subject.agent.is_in_maintenance(instance.id):
        raise UnclearError("Somebody has put it into maintenance.")
    checks = subject.checks()
    longest = FAILURES_BEFORE_CRITICAL * max((check.interval for check in checks), default=0.0)
    status, found = 0, False

    def agree() -> bool:
        nonlocal status, found
        status, found = subject.ask().status_code, subject.is_passing()
        return (status == 200) == found

    if until(agree, longest + subject.patience):
        return "It is well and found." if found else "It is sick and not found."
    if found:
        raise Shortfall(f"/health answers {status}, but discovery finds it: let Consul's check ask /health.")
    said = "; ".join(check.output[:200] for check in subject.agent.checks(instance.id) if check.status != "passing")
    raise Shortfall(f"It is well, but discovery does not find it, for Consul's check says: {said or 'nothing'}")


def _netloc(check: HealthCheck) -> str | None:
    return urlsplit(check.url).netloc if check.url else None
