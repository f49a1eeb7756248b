"""The conformance suite: green on good citizens, in any language, and red with the right sentence on each bad one."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from registry import ConsulSettings, ServiceRegistry
from registry.conformance import PROMISES, CannotExamineError, Finding, examine
from registry.conformance.__main__ import main
from registry.conformance.answers import components
from registry.conformance.subject import Shortfall
from registry.testing.agent import running_agent
from registry.testing.fixtures import ConsulAgent
from registry.testing.ports import free_ports
from tests.support.command import ServiceProcess, running_service, wait_until

HERE = Path(__file__).parent
ENVIRONMENT = {"SERVICE_HEALTH_CHECK_INTERVAL": "1", "SERVICE_DRAIN_SECONDS": "1"}

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
            return stack.enter_context(running_service(app, name, consul=agent, cwd=HERE, env=ENVIRONMENT | env))

        yield start


@pytest.fixture(scope="module")
def side_by_side() -> Iterator[ThreadPoolExecutor]:
    """Examinations are mostly waiting: those that stand in a table run together."""
    with ThreadPoolExecutor(6) as pool:
        yield pool


Running = dict[str, Future[list[Finding]]]


def examined(agent: ConsulAgent, app: str, name: str, stops: bool, patience: float, **env: str) -> list[Finding]:
    """Starts an app and examines it; ``stops``: through its end."""
    with running_service(app, name, consul=agent, cwd=HERE, env=ENVIRONMENT | env) as service:
        stop = partial(service.process.send_signal, signal.SIGTERM) if stops else None
        return examine(service.url, settings(agent), forget=stops, stop=stop, patience=patience)


def fully_examined(agent: ConsulAgent, app: str, name: str) -> list[Finding]:
    """Starts two replicas of an app, and asks one of them for everything."""
    with ExitStack() as stack:
        one, two = (
            stack.enter_context(running_service(app, name, consul=agent, cwd=HERE, env=ENVIRONMENT)) for _ in range(2)
        )
        sick = one.directory / "sick"
        return examine(
            one.url,
            settings(agent),
            replica=two.url,
            sicken=sick.touch,
            heal=sick.unlink,
            forget=True,
            stop=partial(one.process.send_signal, signal.SIGTERM),
        )


@pytest.fixture(scope="module")
def good(
    consul_agent: ConsulAgent, side_by_side: ThreadPoolExecutor, tmp_path_factory: pytest.TempPathFactory
) -> Running:
    """Good citizens under examination."""
    database = f"sqlite+aiosqlite:///{tmp_path_factory.mktemp('conformance')}/cards.db"
    ours = {
        module: partial(
            examined,
            consul_agent,
            f"{module}.main:app",
            f"good-{module}",
            stops=True,
            patience=15,
            DATABASE_URL=database,
        )
        for module in ("backend", "research", "orchestrator")
    }
    apps = {
        app: partial(fully_examined, consul_agent, f"{app}:app", f"good-{app[:8]}")
        for app in ("citizen_app", "presence_app")
    }
    return {name: side_by_side.submit(look) for name, look in (apps | ours).items()}


@pytest.mark.parametrize("module", ["backend", "research", "orchestrator"])
def test_the_services_of_this_repository_are_good_citizens(good: Running, module: str) -> None:
    """Every promise that can be asked of them is kept, through being forgotten and stopped.

    But for the front door's, which takes no deadline from strangers.
    """
    findings = good[module].result()
    assert broken(findings).keys() == ({"deadline"} if module == "orchestrator" else set())
    assert [finding.promise for finding in findings] == list(PROMISES)
    assert [finding.promise for finding in findings if finding.verdict not in {"kept", "broken"}] == [
        "leaves-when-sick"
    ]


@pytest.mark.parametrize("app", ["citizen_app", "presence_app"])
def test_a_good_citizen_keeps_every_promise(good: Running, app: str) -> None:
    """All twelve are kept, by the package and by a service that was written without it."""
    findings = good[app].result()
    assert {finding.promise: finding.sentence for finding in findings if finding.verdict != "kept"} == {}
    assert len(findings) == len(PROMISES) == 12


def test_who_has_no_components_need_not_name_any() -> None:
    """The answer of a service without parts of its own is whole; any other word than healthy needs its components."""
    assert components(httpx.Response(200, json={"status": "healthy"})) == {}
    bodies: list[object] = [{"status": "unhealthy"}, {"status": "ok"}, {"status": "healthy", "components": None}, []]
    for body in bodies:
        with pytest.raises(Shortfall, match="does not say how its components are"):
            components(httpx.Response(200, json=body))


MUTANTS = {
    "does not register": {"registered": r"lists no instance .* register it \(PUT"},
    "id is the name": {"instance-id": r"Its id is the name of the service, .*: replicas overwrite each other"},
    "does not sign": {"signed": r"GET /health \(200\) carries no X-Service-Instance"},
    "does not sign errors": {"signed": r"GET /health\?instance=another-\w+ \(404\) carries no X-Service-Instance"},
    "signs with another id": {"signed": r"says that it is somebody, but is registered as"},
    "changes its name": {
        "address": r"At the registered address \S+, \S+ answers, and not \S+: register its own",
        "signed": r"says that it is \S+ and \S+: give one instance one id; or give the address of one instance",
    },
    "healthy while sick": {"health": r"answers 200 while its component database is sick: answer 503"},
    "sick without a reason": {"health": r"answers 503, but every component that it names is well"},
    "names no components": {"health": r"does not say how its components are"},
    "has no health": {
        "health": "/health answers 404: answer 200 when it is able to work, 503 when it is not",
        "no-ghost": r"answers 404, though that is its own id",
    },
    "contradicts itself": {"health": r'/health answers 200 with the status "unhealthy": agree'},
    "registers no check": {"checked": r"Consul has no check, so it is found even when it is dead: register an HTTP"},
    "check by TTL": {"checked": r"only a check of the kind ttl: register an HTTP check"},
    "check asks /ping": {"checked": r"asks http://127\.0\.0\.1:\d+/ping: let it ask /health", "no-ghost": "instance="},
    "check asks another address": {
        "checked": r"asks http://localhost:\d+/health\?instance=\S+, but callers are sent to 127\.0\.0\.1:\d+: check",
    },
    "check names nobody": {"no-ghost": r"/health: let it ask /health\?instance="},
    "disowns itself": {
        "no-ghost": r"answers 404, though that is its own id",
        "discoverable": r"It is well, but discovery does not find it, for Consul's check says: HTTP GET .* 404",
    },
    "answers for anybody": {"no-ghost": r"answers 200, though it is not another-\w+: answer 404"},
    "ignores the deadline": {"deadline": r"answered 200 a minute after its X-Request-Deadline: answer 504"},
    "takes any deadline for late": {"deadline": r"504, though \"X-Request-Deadline: [\d.]+\" has not passed"},
}


BAD_ENDS = {
    "does not deregister": {"drains": "It has ended, and Consul still lists it: deregister on SIGTERM"},
    "does not drain": {
        "drains": r"stopped answering 0\.\d\d s after it left Consul: serve on|only after it had stopped answering"
    },
    "deregisters too late": {
        "drains": "It left Consul only after it had stopped answering: deregister on SIGTERM at once"
    },
    "does not end": {"drains": "1.5 s after it was told to stop it has left Consul, but still answers"},
}


@pytest.fixture(scope="module")
def mutants(consul_agent: ConsulAgent, side_by_side: ThreadPoolExecutor) -> Running:
    """All mutants under examination; those that end badly are stopped."""
    looks = {
        mutant: partial(examined, consul_agent, "citizen_app:app", f"mutant-{number}", MUTANT=mutant)
        for number, mutant in enumerate(MUTANTS | BAD_ENDS)
    }
    return {
        mutant: side_by_side.submit(look, stops=mutant in BAD_ENDS, patience=1.5 if mutant in BAD_ENDS else 0.5)
        for mutant, look in looks.items()
    }


@pytest.mark.parametrize("mutant", MUTANTS | BAD_ENDS)
def test_each_shortfall_is_named(mutants: Running, mutant: str) -> None:
    """What is wrong is said in a sentence, of that promise alone; what depends on it is unclear, never kept."""
    findings, expected = mutants[mutant].result(), (MUTANTS | BAD_ENDS)[mutant]
    told = broken(findings)
    if mutant == "does not register":
        unclear = {finding.promise for finding in findings if finding.verdict == "unclear"}
        assert unclear == {"address", "instance-id", "signed", "checked", "no-ghost", "discoverable"}
        assert {told.pop(promise) for promise in unclear} == {"It is not in Consul."}
    assert told.keys() == expected.keys(), findings
    for promise, sentence in expected.items():
        assert re.search(sentence, told[promise]), told[promise]


def test_a_wrong_address_is_named(consul_agent: ConsulAgent, start: Start, side_by_side: ThreadPoolExecutor) -> None:
    """Where nobody answers, and where somebody else does, is not the instance's address."""
    nobody, other = start(consul_agent, REGISTERED_PORT=str(free_ports(1)[0])), start(consul_agent)
    stray = start(consul_agent, REGISTERED_PORT=str(other.port))
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
    one, two = start(consul_agent, MUTANT="id is shared"), start(consul_agent, MUTANT="id is shared")
    told = broken(examine(two.url, settings(consul_agent), replica=one.url, patience=0.5))
    assert told["instance-id"].startswith(f"The one at {one.url} says that it is {one.name}-1, too: make the id of")
    name, mutant = "silent-twin", "id is shared, does not sign"
    one, two = start(consul_agent, name=name, MUTANT=mutant), start(consul_agent, name=name, MUTANT=mutant)
    listed = examine(one.url, settings(consul_agent), patience=0.5)[0].verdict == "kept"
    seen, replica = (one, two) if listed else (two, one)
    told = broken(examine(seen.url, settings(consul_agent), replica=replica.url, patience=0.5))
    assert told["instance-id"].startswith("Only one of the two is in Consul, silent-twin-1: if")


def test_an_id_on_two_nodes_is_named(consul_agent: ConsulAgent, start: Start) -> None:
    """An id is unique in the whole catalog, not only on its own agent."""
    service = start(consul_agent)
    wait_until(service.is_found)
    twin = {"Node": "far-away", "Address": "192.0.2.8", "Service": {"ID": service.id, "Service": service.name}}
    catalog = f"{consul_agent.url}/v1/catalog"
    httpx.put(f"{catalog}/register", json=twin).raise_for_status()
    told = broken(examine(service.url, settings(consul_agent)))
    httpx.put(f"{catalog}/deregister", json={"Node": "far-away"}).raise_for_status()
    assert told.keys() == {"instance-id"}
    assert re.search(f"The id {service.id} is registered on 2 nodes, .*far-away", told["instance-id"])


def test_maintenance_is_no_shortfall_and_no_pass(consul_agent: ConsulAgent, start: Start) -> None:
    """Who was taken out by hand is not told that it is not found; nothing that needs it to be found is kept."""
    service = start(consul_agent)
    wait_until(service.is_found)
    httpx.put(f"{consul_agent.url}/v1/agent/service/maintenance/{service.id}?enable=true").raise_for_status()
    findings = examine(service.url, settings(consul_agent), forget=True, sicken=str, heal=str, stop=str)
    unclear = {finding.promise: finding.sentence for finding in findings if finding.verdict == "unclear"}
    assert unclear.keys() == broken(findings).keys() == {"discoverable", "leaves-when-sick", "comes-back", "drains"}
    assert unclear["discoverable"] == "Somebody has put it into maintenance."


def test_a_token_that_sees_nothing_is_named(consul_binary: Path, start: Start) -> None:
    """Under access rules, what we may not see is unclear and not missing; with a token that may, all is seen."""
    with running_agent(binary=consul_binary, acl=True, in_memory=True) as agent:
        service = start(agent, "research.main:app")
        wait_until(service.is_found)
        blind = broken(examine(service.url, settings(agent), patience=0.2))
        assert "hides services: give a token with service:read" in blind["registered"]
        seeing = settings(agent).model_copy(update={"token": SecretStr(agent.token or "")})
        assert broken(examine(service.url, seeing, forget=True)) == {}


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
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search("^kept +deadline +GET /health answers 504", done.stdout, re.MULTILINE)
    assert re.search("^not asked for +drains +Say how to stop it", done.stdout, re.MULTILINE)
    assert done.stdout.endswith("\n9 kept, 3 not asked for, of 12 promises.\n")


@pytest.fixture
def command(consul_agent: ConsulAgent, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command in this process: quicker."""
    monkeypatch.setenv("CONSUL_HTTP_ADDR", "to be replaced, and put back after the test")
    return lambda *arguments: main([*arguments, "--consul", consul_agent.url])


def test_the_command_stops_what_it_is_told_to(
    consul_agent: ConsulAgent, start: Start, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """With all it may do, through the end; when nobody answers any more, that is said, and nothing else."""
    service = start(consul_agent)
    sick = service.directory / "sick"
    disturbing = "--sicken", f"touch {sick}", "--heal", f"rm {sick}", "--forget", "--pid", str(service.process.pid)
    assert command(service.url, *disturbing) == 0
    assert capsys.readouterr().out.endswith("\n12 kept, of 12 promises.\n")
    service.process.wait(10)
    assert command(service.url) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"Nobody answers at {service.url} (")


def test_the_command_fails_when_a_promise_is_broken(
    consul_agent: ConsulAgent, start: Start, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken promise stands out, and its status is 1; so is that of one that can't be told."""
    service = start(consul_agent, MUTANT="ignores the deadline")
    assert command(service.url) == 1
    assert re.search("^BROKEN +deadline ", capsys.readouterr().out, re.MULTILINE)
    service = start(consul_agent)
    assert command(service.url, "--stop", "false") == 1
    assert re.search("^UNCLEAR +drains +It could not be told to stop", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sicken", "true"], "--sicken and --heal go together"),
        (["--pid", "1", "--stop", "true"], "not allowed with"),
        (["--consul", "ftp://localhost"], "CONSUL_HTTP_ADDR: set it to host:port"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options that contradict each other are refused before anything is asked."""
    monkeypatch.setenv("CONSUL_HTTP_ADDR", "to be replaced, and put back after the test")
    try:
        status: object = main(["http://localhost:1", *arguments])
    except SystemExit as refusal:
        status = refusal.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_without_consul_nothing_is_examined(consul_agent: ConsulAgent, start: Start) -> None:
    """An agent that does not answer is said to be missing; no promise counts as broken, or as kept."""
    service = start(consul_agent)
    with pytest.raises(CannotExamineError, match=r"Consul at http://127\.0\.0\.1:\d+ can't be reached"):
        examine(service.url, ConsulSettings(host="127.0.0.1", port=free_ports(1)[0]))
