"""An instance is in Consul exactly as long as it can answer: real uvicorn processes, a real agent."""

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import AsyncMock

import httpx
import pytest

from registry import ConsulSettings, Registrar, ServiceRegistry, ServiceSettings
from registry.presence import addresses
from registry.presence import registrar as presence
from registry.presence.addresses import is_loopback, is_ours
from registry.testing.fixtures import ConsulAgent, Instances
from tests.support.command import ServiceProcess, found, running_service, wait_until

Start = Callable[..., ServiceProcess]

HERE = Path(__file__).parent


@pytest.fixture
def service() -> Iterator[Start]:
    """Starts `presence_app` under a name, with uvicorn's options; keywords in capitals are its environment."""
    with ExitStack() as stack:

        def start(
            name: str,
            consul: ConsulAgent | None,
            *options: str,
            port: int | None = None,
            wait: bool = True,
            **env: str,
        ) -> ServiceProcess:
            return stack.enter_context(
                running_service(
                    "presence_app:app", name, *options, consul=consul, port=port, cwd=HERE, wait=wait, env=env
                )
            )

        yield start


def entry(agent: ConsulAgent, name: str) -> dict[str, object]:
    """What Consul holds of the only instance of a service."""
    (only,) = httpx.get(f"{agent.url}/v1/health/service/{name}").json()
    return dict(only["Service"])


def agent_put(agent: ConsulAgent, path: str) -> None:
    """Change something at the agent."""
    httpx.put(f"{agent.url}{path}").raise_for_status()


def test_found_within_a_second_after_the_port_answers(service: Start, consul_agent: ConsulAgent) -> None:
    """A started service is discoverable at once, as after kill -9 and a restart that finds its id critical."""
    one = service("prompt", consul_agent, SERVICE_HEALTH_CHECK_INTERVAL="0.5")
    assert wait_until(one.is_found, 1) < 1
    one.end(signal.SIGKILL)
    wait_until(lambda: not one.is_found(), 8)
    assert found(consul_agent, "prompt", passing=False) == [one.id]
    # With so long an interval, no check of Consul's can come to the rescue.
    again = service("prompt", consul_agent, port=one.port, SERVICE_HEALTH_CHECK_INTERVAL="600")
    assert again.id == one.id
    assert wait_until(again.is_found, 1) < 1


def test_not_registered_before_it_answers(service: Start, consul_agent: ConsulAgent) -> None:
    """While the app's own start-up lasts, Consul knows nothing of it."""
    one = service("slow-start", consul_agent, wait=False, STARTUP_SECONDS="1")

    def answers() -> bool:
        known = found(consul_agent, "slow-start", passing=False)
        if one.answers():
            return True
        assert known == []
        return False

    wait_until(answers, 30)
    assert wait_until(one.is_found, 1) < 1


def test_wrong_port_is_never_registered_and_told(service: Start, consul_agent: ConsulAgent) -> None:
    """Nobody answers on the advertised port: the instance stays out of Consul, and a warning says what to check."""
    one = service("wrong-port", consul_agent, SERVICE_PORT="1")
    wait_until(lambda: "WARNING the advertised address does not answer" in one.log, 8)
    assert "SERVICE_PORT" in one.log
    assert "(GET http://127.0.0.1:1/health?instance=wrong-port-127.0.0.1-1 failed: " in one.log
    assert found(consul_agent, "wrong-port", passing=False) == []
    assert one.end(signal.SIGTERM) < 2.5


def test_a_sick_app_is_registered_once_it_is_well(service: Start, consul_agent: ConsulAgent) -> None:
    """An instance whose component is sick at start is not offered to anybody until it recovers."""
    one = service("sick-start", consul_agent, wait=False)
    (one.directory / "sick").touch()
    wait_until(one.answers, 20)
    wait_until(lambda: one.log.count("/health?instance=") > 2)
    assert one.http.get("/health").status_code == 503
    assert found(consul_agent, "sick-start", passing=False) == []
    (one.directory / "sick").unlink()
    assert wait_until(one.is_found, 2) < 1


def test_back_after_agent_lost_its_state(service: Start, private_consul_agent: ConsulAgent) -> None:
    """An agent that restarts without its data has the instance again within 5 s."""
    one = service("forgotten", private_consul_agent, SERVICE_HEALTH_CHECK_INTERVAL="600")
    wait_until(one.is_found)
    private_consul_agent.restart(keep_data=False)
    assert wait_until(one.is_found, 5) < 5
    private_consul_agent.restart(keep_data=True)
    # The registration survived, but its check is critical until Consul runs it, if nobody repairs that.
    assert wait_until(one.is_found, 5) < 5
    private_consul_agent.kill()
    assert one.answers()
    private_consul_agent.start()
    assert wait_until(one.is_found, 5) < 5


def test_back_after_a_deregistration_by_hand(service: Start, consul_agent: ConsulAgent) -> None:
    """Whoever deregisters a living instance has it back at once."""
    one = service("by-hand", consul_agent)
    wait_until(one.is_found)
    agent_put(consul_agent, f"/v1/agent/service/deregister/{one.id}")
    assert wait_until(one.is_found, 2) < 1


def test_serves_without_consul_and_registers_when_it_comes(service: Start, private_consul_agent: ConsulAgent) -> None:
    """With Consul stopped at start the service runs, and is found soon after Consul runs."""
    private_consul_agent.stop()
    one = service("early", private_consul_agent)
    assert one.http.get("/health").status_code == 200
    wait_until(lambda: "registration failed" in one.log)
    private_consul_agent.start()
    assert wait_until(one.is_found, 5) < 5


@pytest.mark.real
def test_serves_while_consul_has_no_address(service: Start) -> None:
    """A Consul host name that does not resolve stops neither the start nor the end of the service."""
    one = service("nameless", None, CONSUL_HTTP_ADDR="consul.invalid:8500")
    assert "X-Service-Instance" not in one.http.get("/health").headers
    assert one.http.get("/health?instance=somebody").status_code == 404
    wait_until(lambda: "no address of consul.invalid is known" in one.log)
    assert one.end(signal.SIGTERM) < 2.5


async def test_the_host_name_may_come_later(consul_agent: ConsulAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The own address is found out as soon as Consul's name resolves, IPv4 before the ::1 that localhost may be."""
    resolving = socket.getaddrinfo
    attempts = iter([OSError("unknown"), None])

    def resolve(host: str, port: int, *args: int, **kwargs: int) -> object:
        if host != "consul.test":
            return resolving(host, port, *args, **kwargs)
        if error := next(attempts, None):
            raise error
        return [
            (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("::1", port, 0, 0)),
            (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", port)),
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    registrar = Registrar(ServiceSettings(name="later", port=1), ConsulSettings(host="consul.test", port=8500))
    registrar.start()
    await asyncio.to_thread(wait_until, lambda: registrar.instance_id)
    assert registrar.instance_id == "later-127.0.0.1-1"
    await registrar.aclose()


def test_ids_addresses_tags_meta_and_weight_arrive(service: Start, consul_agent: ConsulAgent) -> None:
    """What the environment says stands in Consul, SERVICE_ADDRESS before the address found out; its check passes."""
    service(
        "described",
        consul_agent,
        SERVICE_ADDRESS="localhost",
        SERVICE_TAGS="v2,blue",
        SERVICE_META='{"team": "cards"}',
        SERVICE_WEIGHT="7",
    )
    wait_until(lambda: found(consul_agent, "described"))
    told = entry(consul_agent, "described")
    assert (told["Address"], told["Tags"]) == ("localhost", ["v2", "blue"])
    assert told["Meta"] == {"team": "cards", "version": "0.1.0", "secure": "false"}
    assert told["Weights"] == {"Passing": 7, "Warning": 1}
    assert str(told["ID"]).startswith("described-localhost-")
    with ServiceRegistry("127.0.0.1", consul_agent.http_port) as registry:
        health = registry.get_service_health(str(told["ID"]))
    assert health is not None
    assert (health.status, list(health.checks)) == ("passing", [f"service:{told['ID']}"])


def test_replicas_differ(service: Start, consul_agent: ConsulAgent) -> None:
    """Two replicas on one host have two ids, with the address that this host uses towards Consul, on every answer."""
    one, two = (service("replica", consul_agent, wait=False) for _ in range(2))
    wait_until(lambda: len(found(consul_agent, "replica")) == 2, 20)
    assert found(consul_agent, "replica") == sorted([one.id, two.id])
    for path, status in (("/health", 200), ("/nowhere", 404), ("/error", 500)):
        answer = one.http.get(path)
        assert (answer.status_code, answer.headers.get_list("X-Service-Instance")) == (status, [one.id])


def test_a_second_copy_on_a_taken_port_harms_nobody(service: Start, consul_agent: ConsulAgent) -> None:
    """A copy that can't get the port ends without deregistering the one that has it."""
    one = service("taken", consul_agent)
    wait_until(one.is_found)
    two = service("taken", consul_agent, wait=False, port=one.port)

    def ended() -> bool:
        assert one.is_found(), one.log + two.log
        return two.process.poll() is not None

    wait_until(ended, 30)
    assert "address already in use" in two.log
    assert "forgot" not in one.log
    assert one.is_found()


def test_a_newcomer_on_the_address_keeps_no_ghost(
    service: Start, consul_agent: ConsulAgent, instances: Instances
) -> None:
    """After kill -9, another service on the same address answers the check with 404, and the dead id turns critical."""
    ghost = service("ghost", consul_agent, SERVICE_HEALTH_CHECK_INTERVAL="0.5")
    wait_until(ghost.is_found)
    ghost.end(signal.SIGKILL)
    newcomer = service("newcomer", consul_agent, port=ghost.port)
    wait_until(newcomer.is_found)

    def answered_by_the_newcomer() -> bool:
        (check,) = httpx.get(f"{consul_agent.url}/v1/health/checks/ghost").json()
        return "404" in check["Output"] and check["Status"] == "critical"

    wait_until(answered_by_the_newcomer)
    assert not ghost.is_found()
    assert newcomer.is_found()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_maintenance_survives_a_restart(
    number: signal.Signals, service: Start, consul_agent: ConsulAgent, service_name: str
) -> None:
    """An instance that an operator took out of discovery stays out when its process is replaced, however it ended."""
    one = service(service_name, consul_agent)
    wait_until(one.is_found)
    agent_put(consul_agent, f"/v1/agent/service/maintenance/{one.id}?enable=true&reason=test")
    wait_until(lambda: not one.is_found())
    one.end(number)
    assert found(consul_agent, service_name, passing=False) == [one.id]
    one.start()
    wait_until(lambda: one.log.count("INFO registered") == 2)
    assert not one.is_found()
    agent_put(consul_agent, f"/v1/agent/service/maintenance/{one.id}?enable=false")
    wait_until(one.is_found)


def test_failing_checks_take_it_out_and_healing_brings_it_back(service: Start, consul_agent: ConsulAgent) -> None:
    """Out of discovery on the third failing check, not the first; 503 names the component; back when it is well."""
    one = service("ailing", consul_agent, SERVICE_HEALTH_CHECK_INTERVAL="1")
    wait_until(one.is_found)
    time.sleep(1.1)  # the very first check decides alone: let it pass
    (one.directory / "sick").touch()
    assert wait_until(lambda: not one.is_found(), 6) > 1
    answer = one.http.get("/health")
    assert answer.status_code == 503
    assert answer.json()["components"] == {"database": {"status": "unhealthy", "error": "ConnectionError"}}
    assert "hunter2" not in answer.text
    (one.directory / "sick").unlink()
    wait_until(one.is_found, 4)


async def test_refused_requests_do_not_end_the_effort(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong, it is told once and tried again; closing leaves no task and no connection."""
    caplog.set_level(logging.DEBUG, "registry")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        settings = ConsulSettings(host="127.0.0.1", port=silent.getsockname()[1])
        registrar = Registrar(ServiceSettings(name="trying", port=1, address="127.0.0.1"), settings)
        monkeypatch.setattr(registrar, "answers", AsyncMock(return_value=True))
        registrar.start()
        await asyncio.to_thread(wait_until, lambda: len(caplog.records) >= 3)
        assert [record.levelname for record in caplog.records[:3]] == ["WARNING", "DEBUG", "DEBUG"]
        await registrar.aclose()
    assert not {task.get_name() for task in asyncio.all_tasks() if "trying" in task.get_name()}


async def test_a_host_that_got_another_address_is_registered_there_alone(
    consul_agent: ConsulAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the registered address is no longer this host's, the new one is registered and the old one withdrawn.

    A whole host is moved by the end-to-end test that cuts a container off; here only its answers are changed.
    """
    consul = ConsulSettings.model_validate({"host": "127.0.0.1", "port": consul_agent.http_port})
    registrar = Registrar(ServiceSettings(name="moving", port=8002), consul)
    monkeypatch.setattr(registrar, "answers", AsyncMock(return_value=True))
    monkeypatch.setattr(presence, "LOOK", 0.05)
    registrar.start()
    await asyncio.to_thread(wait_until, lambda: found(consul_agent, "moving") == ["moving-127.0.0.1-8002"])
    monkeypatch.setattr(presence, "is_ours", lambda address: address == "127.0.0.2")
    monkeypatch.setattr(presence, "address_towards", AsyncMock(return_value="127.0.0.2"))
    await asyncio.to_thread(wait_until, lambda: found(consul_agent, "moving") == ["moving-127.0.0.2-8002"])
    assert found(consul_agent, "moving", passing=False) == ["moving-127.0.0.2-8002"]
    assert registrar.serves("moving-127.0.0.2-8002")
    assert not registrar.serves("moving-127.0.0.1-8002")
    await registrar.withdraw()
    await registrar.aclose()
    assert found(consul_agent, "moving", passing=False) == []


async def test_an_address_that_was_given_is_never_given_up(
    consul_agent: ConsulAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``SERVICE_ADDRESS`` may be one that this host does not have, behind a NAT: it stays registered."""
    consul = ConsulSettings.model_validate({"host": "127.0.0.1", "port": consul_agent.http_port})
    registrar = Registrar(ServiceSettings(name="behind-nat", port=8002, address="192.0.2.7"), consul)
    monkeypatch.setattr(registrar, "answers", AsyncMock(return_value=True))
    monkeypatch.setattr(presence, "LOOK", 0.01)
    registrar.start()
    await asyncio.to_thread(wait_until, lambda: found(consul_agent, "behind-nat") == ["behind-nat-192.0.2.7-8002"])
    monkeypatch.setattr(presence, "address_towards", AsyncMock(side_effect=AssertionError("looked for another")))
    await asyncio.sleep(0.1)
    assert found(consul_agent, "behind-nat") == ["behind-nat-192.0.2.7-8002"]
    await registrar.withdraw()
    await registrar.aclose()


@pytest.mark.parametrize(
    ("address", "towards_consul", "warned"),
    [
        ("127.0.0.1", "10.0.0.7", True),
        ("localhost", "2001:db8::7", True),
        ("127.0.0.1", "127.0.0.1", False),
        ("10.0.0.7", "10.0.0.7", False),
        ("127.0.0.1", OSError("no route"), False),
    ],
)
async def test_an_address_that_misleads_callers_is_told(
    address: str,
    towards_consul: str | OSError,
    warned: bool,
    consul_agent: ConsulAgent,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A loopback address with an agent elsewhere is one warning that names the way out; else there is none."""
    answer = AsyncMock(side_effect=towards_consul if isinstance(towards_consul, OSError) else [towards_consul] * 9)
    monkeypatch.setattr(addresses, "address_towards", answer)
    consul = ConsulSettings.model_validate({"host": "127.0.0.1", "port": consul_agent.http_port})
    registrar = Registrar(ServiceSettings(name="misleading", port=8002, address=address), consul)
    monkeypatch.setattr(registrar, "answers", AsyncMock(return_value=True))
    registered = asyncio.Event()

    async def stay(_: object) -> None:
        registered.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(registrar, "_until_outdated", stay)
    registrar.start()
    await asyncio.wait_for(registered.wait(), 10)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert ["SERVICE_ADDRESS" in record.message for record in warnings] == [True] * warned
    await registrar.withdraw()
    await registrar.aclose()


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "LOCALHOST", "localhost."])
def test_loopback_is_known(address: str) -> None:
    """Every way to write loopback is recognised."""
    assert is_loopback(address)
    assert not is_loopback("127.example")


def test_a_host_knows_its_own_addresses() -> None:
    """Loopback is ours, an address of a documentation network is not, whichever the family."""
    assert is_ours("127.0.0.1")
    assert not is_ours("192.0.2.7")
    assert not is_ours("2001:db8::7")
