"""The conformance suite: green on good citizens, in any language, and red with the right sentence on each bad one."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from registry import ConsulSettings, ServiceRegistry
from registry.conformance import PROMISES, CannotExamineError, Finding, examine
from registry.testing.command import ServiceProcess, running_service, wait_until
from registry.testing.fixtures import ConsulAgent
from registry.testing.ports import free_ports

HERE = Path(__file__).parent
KNOWN_BY = {"SERVICE_HEALTH_CHECK_INTERVAL": "1"}

Start = Callable[..., ServiceProcess]


def settings(agent: ConsulAgent) -> ConsulSettings:
    """The way to this agent."""
    return ConsulSettings(host="127.0.0.1", port=agent.http_port)


def broken(findings: list[Finding]) -> dict[str, str]:
    """Promise → sentence, of all that are neither kept nor left out."""
    return {
        finding.promise: finding.sentence for finding in findings if finding.verdict not in {"kept", "not asked for"}
    }


@pytest.fixture
def start(service_name: str) -> Iterator[Start]:
    """Starts one of our apps, `citizen_app` unless told otherwise; keywords are its environment."""
    with ExitStack() as stack:

        def start(
            agent: ConsulAgent, app: str = "citizen_app:app", name: str = service_name, **env: str
        ) -> ServiceProcess:
            return stack.enter_context(running_service(app, name, consul=agent, cwd=HERE, env=KNOWN_BY | env))

        yield start


@pytest.mark.parametrize("module", ["backend", "research", "orchestrator"])
def test_the_services_of_this_repository_are_good_citizens(
    consul_agent: ConsulAgent, tmp_path: Path, module: str
) -> None:
    """Every promise that can be asked of them is kept, through being forgotten and stopped."""
    env = KNOWN_BY | {"DATABASE_URL": f"sqlite+aiosqlite:///{tmp_path}/cards.db"}
    name = f"good-{module}"
    with running_service(f"{module}.main:app", name, consul=consul_agent, cwd=tmp_path, env=env) as service:
        stop = partial(service.process.send_signal, signal.SIGTERM)
        findings = examine(service.url, settings(consul_agent), forget=True, stop=stop)
        assert broken(findings) == {}
        assert [finding.promise for finding in findings] == list(PROMISES)
        assert [finding.promise for finding in findings if finding.verdict != "kept"] == ["leaves-when-sick"]
        service.process.wait(10)


@pytest.mark.parametrize("app", ["citizen_app:app", "presence_app:app"])
def test_a_good_citizen_keeps_every_promise(consul_agent: ConsulAgent, start: Start, app: str) -> None:
    """All twelve are kept, by the package and by a service that was written without it."""
    one, two = start(consul_agent, app), start(consul_agent, app)
    sick = one.directory / "sick"
    findings = examine(
        one.url,
        settings(consul_agent),
        replica=two.url,
        sicken=sick.touch,
        heal=sick.unlink,
        forget=True,
        stop=partial(one.process.send_signal, signal.SIGTERM),
    )
    assert {finding.promise: finding.sentence for finding in findings if finding.verdict != "kept"} == {}
    assert len(findings) == len(PROMISES) == 12


MUTANTS = {
    "does not register": {"registered": r"lists no instance .* register it \(PUT"},
    "id is the name": {"instance-id": r"Its id is the name of the service, .*: replicas overwrite each other"},
    "does not sign": {"signed": r"GET /health \(200\) carries no X-Service-Instance"},
    "does not sign errors": {"signed": r"GET /health\?instance=another-\w+ \(404\) carries no X-Service-Instance"},
    "signs with another id": {"signed": r"says that it is somebody, but is registered as"},
    "healthy while sick": {"health": r"answers 200 while its component database is sick: answer 503"},
    "sick without a reason": {"health": r"answers 503, but every component that it names is well"},
    "names no components": {"health": r"does not say how its components are"},
    "registers no check": {"checked": r"Consul has no check, so it is found even when it is dead: register an HTTP"},
    "check by TTL": {"checked": r"only a check of the kind ttl: register an HTTP check"},
    "check asks /ping": {"checked": r"asks http://127\.0\.0\.1:\d+/ping: let it ask /health", "no-ghost": "instance="},
    "check names nobody": {"no-ghost": r"/health: let it ask /health\?instance="},
    "answers for anybody": {"no-ghost": r"answers 200, though it is not another-\w+: answer 404"},
    "ignores the deadline": {"deadline": r"answered 200 a minute after its X-Request-Deadline: answer 504"},
    "takes any deadline for late": {"deadline": r"504, though \"X-Request-Deadline: [\d.]+\" has not passed"},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_shortfall_is_named(consul_agent: ConsulAgent, start: Start, mutant: str) -> None:
    """What is wrong is said in a sentence, of that promise alone; what depends on it is unclear, never kept."""
    service = start(consul_agent, MUTANT=mutant)
    findings = examine(service.url, settings(consul_agent), patience=0.5)
    told = broken(findings)
    if mutant == "does not register":
        unclear = {finding.promise for finding in findings if finding.verdict == "unclear"}
        assert unclear == {"address", "instance-id", "signed", "checked", "no-ghost", "discoverable"}
        assert {told.pop(promise) for promise in unclear} == {"It is not in Consul."}
    assert told.keys() == MUTANTS[mutant].keys(), findings
    for promise, sentence in MUTANTS[mutant].items():
        assert re.search(sentence, told[promise]), told[promise]


def test_a_wrong_address_is_named(consul_agent: ConsulAgent, start: Start) -> None:
    """Where nobody answers, and where somebody else does, is not the instance's address."""
    nobody, other = start(consul_agent, REGISTERED_PORT=str(free_ports(1)[0])), start(consul_agent)
    stray = start(consul_agent, REGISTERED_PORT=str(other.port))
    with ThreadPoolExecutor() as side_by_side:
        look = partial(examine, consul=settings(consul_agent), patience=0.5)
        lost, astray = map(broken, side_by_side.map(look, (nobody.url, stray.url)))
    assert lost.keys() == astray.keys() == {"address", "discoverable"}
    assert re.search(r"Nobody answers at the registered address 127\.0\.0\.1:\d+ \(ConnectError\)", lost["address"])
    assert re.search("well, but discovery does not find it, .*connection refused", lost["discoverable"])
    assert (
        f"At the registered address 127.0.0.1:{other.port}, {other.id} answers, and not {stray.id}" in astray["address"]
    )


def test_loopback_is_no_address_when_consul_is_elsewhere(private_consul_agent: ConsulAgent, start: Start) -> None:
    """127.0.0.1 is right on a single machine only: not when the agent tells others another address of its host."""
    private_consul_agent.stop()
    configuration = private_consul_agent._configuration
    configuration.write_text(json.dumps(json.loads(configuration.read_text()) | {"advertise_addr": "192.0.2.7"}))
    private_consul_agent.start()
    service = start(private_consul_agent, "research.main:app", SERVICE_ADDRESS="127.0.0.1")
    told = broken(examine(service.url, settings(private_consul_agent)))
    assert told.keys() == {"address"}
    assert told["address"].startswith("It is registered as 127.0.0.1, but its Consul agent is at 192.0.2.7: callers")


def test_a_shared_id_is_named(consul_agent: ConsulAgent, start: Start) -> None:
    """Two replicas with one id overwrite each other: seen by asking the second one, whether it signs or not."""
    one = start(consul_agent, MUTANT="id is shared")
    two = start(consul_agent, MUTANT="id is shared")
    told = broken(examine(two.url, settings(consul_agent), replica=one.url, patience=0.5))
    assert told["instance-id"].startswith(f"The one at {one.url} says that it is {one.name}-1, too: make the id of")


STOPPED = {
    "does not deregister": "It has ended, and Consul still lists it: deregister on SIGTERM",
    "does not drain": r"stopped answering 0\.\d\d s after it left Consul: serve on|only after it had stopped answering",
    "deregisters too late": "It left Consul only after it had stopped answering: deregister on SIGTERM at once",
    "does not end": "1.5 s after it was told to stop it has left Consul, but still answers",
}


@pytest.mark.parametrize("mutant", STOPPED)
def test_each_bad_end_is_named(consul_agent: ConsulAgent, start: Start, mutant: str) -> None:
    """An instance that does not leave Consul first, does not serve on, or does not end is told how to."""
    service = start(consul_agent, MUTANT=mutant)
    stop = partial(service.process.send_signal, signal.SIGTERM)
    told = broken(examine(service.url, settings(consul_agent), stop=stop, patience=1.5))
    assert told.keys() == {"drains"}
    assert re.search(STOPPED[mutant], told["drains"]), told


def test_one_that_does_not_come_back_is_named_and_put_back(consul_agent: ConsulAgent, start: Start) -> None:
    """Who is forgotten for ever is told to look; the examination leaves it in Consul as it was."""
    service = start(consul_agent, MUTANT="does not come back")
    told = broken(examine(service.url, settings(consul_agent), forget=True, patience=1.0))
    assert told.keys() == {"comes-back"}
    assert "Consul forgot it, and 1 s later it was not back: look every few seconds" in told["comes-back"]
    wait_until(service.is_found)
    assert broken(examine(service.url, settings(consul_agent))) == {}


NOT_KEPT_BY_HAND = {
    "instance-id": r"Its id is the name of the service",
    "signed": r"carries no X-Service-Instance",
    "health": r"does not say how its components are",
    "no-ghost": r"answers 200, though it is not another-\w+",
    "deadline": r"answered 200 a minute after its X-Request-Deadline",
    "comes-back": r"Consul forgot it, and 1 s later it was not back",
    "drains": r"It has ended, and Consul still lists it",
}


def test_a_service_without_the_package_learns_what_it_lacks(
    consul_agent: ConsulAgent, start: Start, service_registry: ServiceRegistry
) -> None:
    """Plain FastAPI, registered by a script: each shortfall has its sentence, and what is right is kept."""
    service = start(consul_agent, "plain_app:app")
    subprocess.run([sys.executable, HERE / "plain_register.py"], check=True, env=service._env)
    stop = partial(service.process.send_signal, signal.SIGTERM)
    findings = examine(service.url, settings(consul_agent), forget=True, stop=stop, patience=1.0)
    assert service_registry.deregister_service(service.name)
    told = broken(findings)
    assert told.keys() == NOT_KEPT_BY_HAND.keys(), findings
    for promise, sentence in NOT_KEPT_BY_HAND.items():
        assert re.search(sentence, told[promise]), told[promise]
    kept = [finding.promise for finding in findings if finding.verdict == "kept"]
    assert kept == ["registered", "address", "checked", "discoverable"]


def test_sickness_that_discovery_does_not_see_is_named(consul_agent: ConsulAgent, start: Start) -> None:
    """Made sick: a check of something else keeps it in discovery, and a health that says 200 hides it."""
    blind, silent = start(consul_agent, MUTANT="check asks /ping"), start(consul_agent)
    sick = blind.directory / "sick"
    consul = settings(consul_agent)
    told = broken(examine(blind.url, consul, patience=0.5, sicken=sick.touch, heal=sick.unlink))
    assert re.search("answers 503, and .* later discovery still finds it", told["leaves-when-sick"])
    assert not sick.exists()
    told = broken(examine(silent.url, consul, patience=0.5, sicken=str, heal=str))
    assert told == {"leaves-when-sick": "/health answers 200 after a component was made sick: let it answer 503."}


def test_the_command_tells_and_judges(consul_agent: ConsulAgent, start: Start) -> None:
    """``python -m registry.conformance``: a line for each promise, what was not asked for by name, and a status."""
    service = start(consul_agent)
    command = [sys.executable, "-m", "registry.conformance", service.url, "--consul", consul_agent.url]
    run = partial(subprocess.run, capture_output=True, text=True, timeout=30)
    first = run(command)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.count("\nkept ") == 8
    assert re.search("^not asked for +drains +Say how to stop it", first.stdout, re.MULTILINE)
    assert first.stdout.endswith("\n9 kept, 3 not asked for, of 12 promises.\n")
    second = run([*command, "--forget", "--pid", str(service.process.pid)])
    assert second.stdout.endswith("\n11 kept, 1 not asked for, of 12 promises.\n")
    service.process.wait(10)
    third = run(command)
    assert (third.returncode, third.stdout) == (2, "")
    assert third.stderr.startswith(f"Nobody answers at {service.url} (")


def test_the_command_fails_when_a_promise_is_broken(consul_agent: ConsulAgent, start: Start) -> None:
    """A broken promise stands out, and its status is 1; so is that of one that can't be told."""
    service = start(consul_agent, MUTANT="ignores the deadline")
    arguments = [service.url, "--consul", consul_agent.url, "--stop", "false"]
    command = [sys.executable, "-m", "registry.conformance", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert re.search("^BROKEN +deadline ", done.stdout, re.MULTILINE)
    assert re.search("^UNCLEAR +drains +It could not be told to stop", done.stdout, re.MULTILINE)


def test_without_consul_nothing_is_examined(consul_agent: ConsulAgent, start: Start) -> None:
    """An agent that does not answer is said to be missing; no promise counts as broken, or as kept."""
    service = start(consul_agent)
    with pytest.raises(CannotExamineError, match=r"Consul at http://127\.0\.0\.1:\d+ can't be reached"):
        examine(service.url, ConsulSettings(host="127.0.0.1", port=free_ports(1)[0]))
