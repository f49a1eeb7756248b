"""The synchronous control plane against a real agent: register, deregister, discover, URL and health."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from registry import Instance, ServiceHealth, ServiceRegistry
from registry.testing.fixtures import ConsulAgent
from tests.support.server import Answer, Request, Serve

SECOND = 1_000_000_000  # Consul counts nanoseconds


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Return once the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.01)


@pytest.fixture
def register(service_registry: ServiceRegistry, service_name: str) -> Iterator[Callable[..., str]]:
    """``register_service`` with a name and an address filled in; what was registered goes away after the test."""
    ids: list[str] = []

    def register(name: str = service_name, address: str = "10.1.1.1", port: int = 8000, **kwargs: Any) -> str:
        ids.append(service_registry.register_service(name, address, port, **kwargs))
        return ids[-1]

    yield register
    for service_id in ids:
        service_registry.deregister_service(service_id)


@pytest.fixture
def pass_check(consul_agent: ConsulAgent) -> Callable[[str], None]:
    """Makes an instance pass at once by taking its HTTP check away, as if it had just been checked."""

    def pass_check(service_id: str) -> None:
        answer = httpx.put(f"{consul_agent.url}/v1/agent/check/deregister/service:{service_id}")
        assert answer.is_success

    return pass_check


def entries(agent: ConsulAgent, name: str) -> list[dict[str, Any]]:
    """What Consul itself answers about a service."""
    answer: list[dict[str, Any]] = httpx.get(f"{agent.url}/v1/health/service/{name}").raise_for_status().json()
    return answer


def definition(agent: ConsulAgent, service_id: str) -> dict[str, Any]:
    """What the agent remembers of an instance's check: its API shows neither the URL nor when it deregisters."""
    for file in (agent._data / "checks").iterdir():
        check: dict[str, Any] = json.loads(file.read_text())["ChkType"]
        if check["CheckID"] == f"service:{service_id}":
            return check
    raise AssertionError(f"{service_id} has no check")


# -- registration ------------------------------------------------------------------------------------------------------


def test_default_id_is_name_address_port(service_registry: ServiceRegistry) -> None:
    """Without an id of its own an instance is called by its name, address and port, as documented."""
    try:
        assert service_registry.register_service("backend-api", "localhost", 8000) == "backend-api-localhost-8000"
    finally:
        assert service_registry.deregister_service("backend-api-localhost-8000")


def test_registration_arrives_whole(register: Callable[..., str], consul_agent: ConsulAgent, service_name: str) -> None:
    """Name, address, port, tags and metadata stand in Consul as they were given."""
    register(address="10.9.8.7", port=1234, tags=["v1", "blue"], meta={"a": "ü"})
    (entry,) = entries(consul_agent, service_name)
    service = entry["Service"]
    assert (service["Service"], service["Address"], service["Port"]) == (service_name, "10.9.8.7", 1234)
    assert (service["Tags"], service["Meta"]) == (["v1", "blue"], {"a": "ü"})


def test_custom_id_names_the_instance(
    register: Callable[..., str], service_registry: ServiceRegistry, service_name: str
) -> None:
    """A given id is returned, found again, and is what deregistering takes, whatever safe characters it holds."""
    service_id = f"{service_name}.A_1:2+3=4@home-5"
    assert register(service_id=service_id) == service_id
    assert [instance.id for instance in service_registry.discover_service(service_name, passing=False)] == [service_id]
    assert service_registry.get_service_health(service_id) is not None
    assert service_registry.deregister_service(service_id) is True
    assert service_registry.discover_service(service_name, passing=False) == []


def test_check_settings_arrive(register: Callable[..., str], consul_agent: ConsulAgent) -> None:
    """Custom check path, interval, time-out and deregistration reach Consul; three failures make it critical."""
    service_id = register(
        health_check_path="/deep/status?full=1",
        health_check_interval="17s",
        health_check_timeout="1500ms",
        deregister_critical_service_after="1h30m",
    )
    check = definition(consul_agent, service_id)
    assert check["HTTP"] == "http://10.1.1.1:8000/deep/status?full=1"
    assert (check["Interval"], check["Timeout"]) == (17 * SECOND, 1.5 * SECOND)
    assert check["DeregisterCriticalServiceAfter"] == 5400 * SECOND
    assert check["FailuresBeforeCritical"] == 3


def test_check_defaults_arrive(register: Callable[..., str], consul_agent: ConsulAgent) -> None:
    """Unless told otherwise Consul asks /health every 10 s, for at most 5 s, and removes after a minute."""
    check = definition(consul_agent, register())
    assert check["HTTP"] == "http://10.1.1.1:8000/health"
    assert (check["Interval"], check["Timeout"]) == (10 * SECOND, 5 * SECOND)
    assert check["DeregisterCriticalServiceAfter"] == 60 * SECOND


def test_never_deregistering_is_possible(register: Callable[..., str], consul_agent: ConsulAgent) -> None:
    """``deregister_critical_service_after=None`` leaves a sick instance in the catalog for ever."""
    service_id = register(deregister_critical_service_after=None)
    assert definition(consul_agent, service_id)["DeregisterCriticalServiceAfter"] == 0


def test_the_custom_path_is_what_consul_asks(
    register: Callable[..., str], service_registry: ServiceRegistry, serve: Serve, service_name: str
) -> None:
    """Consul really asks the path that was given, query included, and no other."""
    server = serve(lambda request: Answer(200 if request.target == "/deep/status?full=1" else 500))
    register(
        service_name, "127.0.0.1", server.port, health_check_path="/deep/status?full=1", health_check_interval="1s"
    )
    wait_until(lambda: bool(service_registry.discover_service(service_name)))
    assert {request.target for request in server.requests} == {"/deep/status?full=1"}


def test_ipv6_address_is_bracketed_in_urls(
    register: Callable[..., str],
    consul_agent: ConsulAgent,
    service_registry: ServiceRegistry,
    pass_check: Callable[[str], None],
    service_name: str,
) -> None:
    """An IPv6 instance is checked and called at a URL with brackets, and registered without."""
    service_id = register(address="fd00::17")
    assert service_id == f"{service_name}-fd00::17-8000"
    assert definition(consul_agent, service_id)["HTTP"] == "http://[fd00::17]:8000/health"
    pass_check(service_id)
    assert service_registry.get_service_url(service_name) == "http://[fd00::17]:8000"


def test_registering_again_replaces(
    register: Callable[..., str], service_registry: ServiceRegistry, service_name: str
) -> None:
    """The same id registered twice is one instance, with the newer data."""
    register(tags=["old"])
    register(tags=["new"])
    (instance,) = service_registry.discover_service(service_name, passing=False)
    assert instance.tags == ("new",)


# -- deregistration ----------------------------------------------------------------------------------------------------


def test_deregistered_is_gone(
    register: Callable[..., str], service_registry: ServiceRegistry, service_name: str
) -> None:
    """After deregistering, which says True, nobody finds the instance, healthy or not."""
    service_id = register()
    assert service_registry.deregister_service(service_id) is True
    assert service_registry.discover_service(service_name, passing=False) == []
    assert service_name not in service_registry.discover_all_services()


def test_deregistering_unknown_is_false(service_registry: ServiceRegistry) -> None:
    """An id that the agent does not know is no error, but False."""
    assert service_registry.deregister_service("nobody-10.0.0.1-1") is False


def test_deregistering_leaves_siblings(
    register: Callable[..., str], service_registry: ServiceRegistry, service_name: str
) -> None:
    """Only the named instance goes; another one of the same service stays."""
    first, second = register(port=8001), register(port=8002)
    service_registry.deregister_service(first)
    assert [instance.id for instance in service_registry.discover_service(service_name, passing=False)] == [second]


# -- discovery ---------------------------------------------------------------------------------------------------------


def test_discovery_filters_by_tag(
    register: Callable[..., str], service_registry: ServiceRegistry, service_name: str
) -> None:
    """With a tag only the instances that carry it are found; with an unused tag none."""
    register(port=1, tags=["v1", "blue"])
    register(port=2, tags=["v2", "blue"])

    def ports(tag: str | None) -> list[int]:
        return [instance.port for instance in service_registry.discover_service(service_name, tag, passing=False)]

    assert (ports(None), ports("v2"), ports("blue"), ports("v3")) == ([1, 2], [2], [1, 2], [])


def test_discovery_filters_by_health(
    register: Callable[..., str],
    service_registry: ServiceRegistry,
    pass_check: Callable[[str], None],
    service_name: str,
) -> None:
    """Only passing instances are found, unless ``passing=False`` asks for all."""
    register(port=1)
    pass_check(register(port=2))
    assert [instance.port for instance in service_registry.discover_service(service_name)] == [2]
    assert [instance.port for instance in service_registry.discover_service(service_name, passing=False)] == [1, 2]


def test_all_services_with_all_tags(
    register: Callable[..., str], service_registry: ServiceRegistry, service_name: str
) -> None:
    """Every service is listed, each with the tags of all its instances, Consul itself too."""
    register(port=1, tags=["v1"])
    register(port=2, tags=["v2"])
    services = service_registry.discover_all_services()
    assert sorted(services[service_name]) == ["v1", "v2"]
    assert services["consul"] == []


def test_unknown_service_is_empty(service_registry: ServiceRegistry, service_name: str) -> None:
    """Nobody by that name is an empty list, not an error."""
    assert service_registry.discover_service(service_name) == []
    assert service_registry.discover_service(service_name, passing=False) == []


def test_instance_reads_as_attributes_and_items(
    register: Callable[..., str], service_registry: ServiceRegistry, service_name: str
) -> None:
    """What is found is an Instance, whose fields are attributes and items alike; there is no other item."""
    service_id = register(tags=["v1"], meta={"team": "cards"})
    (instance,) = service_registry.discover_service(service_name, passing=False)
    assert instance == Instance(service_id, service_name, "10.1.1.1", 8000, ("v1",), {"team": "cards"}, 1)
    assert (instance["address"], instance["port"], instance["meta"]) == ("10.1.1.1", 8000, {"team": "cards"})
    with pytest.raises(KeyError):
        instance["netloc"]


def test_instances_are_sorted_by_id(
    register: Callable[..., str], service_registry: ServiceRegistry, service_name: str
) -> None:
    """The order does not depend on Consul: sorted by id."""
    for service_id in ("c", "a", "d", "b"):
        register(service_id=f"{service_name}-{service_id}")
    found = [instance.id for instance in service_registry.discover_service(service_name, passing=False)]
    assert found == [f"{service_name}-{service_id}" for service_id in "abcd"]


def test_instance_without_address_is_at_its_node(
    consul_agent: ConsulAgent, service_registry: ServiceRegistry, service_name: str
) -> None:
    """An instance that others registered without an address is found at the address of its node."""
    httpx.put(
        f"{consul_agent.url}/v1/agent/service/register", json={"Name": service_name, "Port": 7}
    ).raise_for_status()
    try:
        assert service_registry.get_service_url(service_name) == "http://127.0.0.1:7"
    finally:
        assert service_registry.deregister_service(service_name)


# -- URL and health ----------------------------------------------------------------------------------------------------


def test_url_of_unknown_is_none(service_registry: ServiceRegistry) -> None:
    """A service that does not exist has no URL."""
    assert service_registry.get_service_url("nonexistent-service") is None


def test_url_of_unhealthy_is_none(
    register: Callable[..., str], service_registry: ServiceRegistry, service_name: str
) -> None:
    """A service without a healthy instance has no URL either."""
    register()
    assert service_registry.get_service_url(service_name) is None


def test_url_honours_tag_and_scheme(
    register: Callable[..., str],
    service_registry: ServiceRegistry,
    pass_check: Callable[[str], None],
    service_name: str,
) -> None:
    """The URL leads to an instance with the tag, in the scheme that was asked for."""
    pass_check(register(port=1, tags=["v1"]))
    pass_check(register(port=2, tags=["v2"]))
    assert service_registry.get_service_url(service_name, tag="v2", scheme="https") == "https://10.1.1.1:2"
    assert service_registry.get_service_url(service_name, tag="v3") is None


def test_load_balancing_spreads(
    register: Callable[..., str],
    service_registry: ServiceRegistry,
    pass_check: Callable[[str], None],
    service_name: str,
) -> None:
    """Over many questions every instance gets its share; in 300 of three, each at least 50."""
    for port in (1, 2, 3):
        pass_check(register(port=port))
    shares = Counter(service_registry.get_service_url(service_name) for _ in range(300))
    assert set(shares) == {f"http://10.1.1.1:{port}" for port in (1, 2, 3)}
    assert min(shares.values()) >= 50


def test_without_load_balancing_always_the_first(
    register: Callable[..., str],
    service_registry: ServiceRegistry,
    pass_check: Callable[[str], None],
    service_name: str,
) -> None:
    """``load_balance=False`` gives the same instance each time: the first by id."""
    for port in (3, 1, 2):
        pass_check(register(port=port))
    urls = {service_registry.get_service_url(service_name, load_balance=False) for _ in range(20)}
    assert urls == {"http://10.1.1.1:1"}


def test_health_follows_the_check(
    register: Callable[..., str], service_registry: ServiceRegistry, serve: Serve, service_name: str
) -> None:
    """An instance is critical until its first check, and passing at once after it."""
    server = serve()
    service_id = register(address="127.0.0.1", port=server.port, health_check_interval="1s")
    if not server.requests:
        health = service_registry.get_service_health(service_id)
        assert health is not None
        assert health.status == "critical" or server.requests
    wait_until(lambda: bool(service_registry.discover_service(service_name)))
    health = service_registry.get_service_health(service_id)
    assert isinstance(health, ServiceHealth)
    assert health.status == "passing"
    assert health.checks == {f"service:{service_id}": "passing"}
    assert "200" in health.outputs[f"service:{service_id}"]


def test_warning_is_told_apart(
    register: Callable[..., str], service_registry: ServiceRegistry, serve: Serve, service_name: str
) -> None:
    """A health endpoint that answers 429 makes its instance warning: known, told so, and not discovered."""
    server = serve(lambda _: Answer(429))
    service_id = register(address="127.0.0.1", port=server.port, health_check_interval="1s")

    def status() -> str:
        health = service_registry.get_service_health(service_id)
        assert health is not None
        return health.status

    wait_until(lambda: status() == "warning")
    assert service_registry.discover_service(service_name) == []


def test_health_of_unknown_is_none(service_registry: ServiceRegistry) -> None:
    """An id that the agent does not know has no health."""
    assert service_registry.get_service_health("nobody-10.0.0.1-1") is None


def test_is_healthy_with_a_leader(service_registry: ServiceRegistry) -> None:
    """A running agent whose cluster has a leader is healthy."""
    assert service_registry.is_healthy() is True


# -- failing checks ----------------------------------------------------------------------------------------------------


def test_out_of_discovery_on_exactly_the_third_failure(
    register: Callable[..., str], service_registry: ServiceRegistry, serve: Serve, service_name: str
) -> None:
    """Two failing checks change nothing, the third takes the instance out of discovery, and one good one back in."""
    plan, third, fifth = [200, 503, 503, 503], threading.Event(), threading.Event()

    def answer(_: Request) -> Answer:
        arrived = len(server.requests)
        if arrived == len(plan):
            assert third.wait(10)
        elif arrived > len(plan):
            assert fifth.wait(20)
            return Answer([200, 503, 503][(arrived - len(plan) - 1) % 3])  # Never more than one good one in a row.
        return Answer(plan[arrived - 1])

    server = serve(answer)
    service_id = register(address="127.0.0.1", port=server.port, health_check_interval="1s")

    def found() -> bool:
        return bool(service_registry.discover_service(service_name))

    wait_until(found)
    while len(server.requests) < len(plan):
        assert found()
        time.sleep(0.05)
    assert found()
    third.set()
    wait_until(lambda: not found(), seconds=5)  # Before Consul gives up the next check, which is held.
    health = service_registry.get_service_health(service_id)
    assert health is not None
    assert health.status == "critical"
    assert [i.id for i in service_registry.discover_service(service_name, passing=False)] == [service_id]
    fifth.set()
    wait_until(found)


def test_a_failure_in_between_does_not_count_on(
    register: Callable[..., str], service_registry: ServiceRegistry, serve: Serve, service_name: str
) -> None:
    """Only failures in a row count: two failures, one success and two failures leave the instance discovered."""
    plan = [200, 503, 503]

    def answer(_: Request) -> Answer:
        return Answer(plan[(len(server.requests) - 1) % len(plan)])

    server = serve(answer)
    register(address="127.0.0.1", port=server.port, health_check_interval="1s")
    wait_until(lambda: bool(service_registry.discover_service(service_name)))
    while len(server.requests) < 2 * len(plan):
        assert service_registry.discover_service(service_name)
        time.sleep(0.05)
    assert service_registry.discover_service(service_name)


def test_first_check_decides_alone(
    register: Callable[..., str], service_registry: ServiceRegistry, serve: Serve, service_name: str
) -> None:
    """The very first check needs no company: one failure and the check says why it is critical."""
    server = serve(lambda _: Answer(503, b"database is gone"))
    service_id = register(address="127.0.0.1", port=server.port, health_check_interval="1s")

    def output() -> str:
        health = service_registry.get_service_health(service_id)
        assert health is not None
        assert health.status == "critical"
        return health.outputs[f"service:{service_id}"]

    wait_until(lambda: "database is gone" in output())
    assert len(server.requests) == 1


@pytest.mark.parametrize("consistency", ["default", "consistent", "stale"])
def test_consistency_reaches_consul(
    consul_agent: ConsulAgent, consistency: Any, serve: Serve, service_name: str
) -> None:
    """Discovery asks with the consistency that the registry was made with, and a real agent accepts it."""
    with ServiceRegistry("127.0.0.1", consul_agent.http_port, consistency=consistency) as registry:
        assert registry.discover_service(service_name) == []
    recorder = serve(lambda _: Answer(200, b"[]", {"X-Consul-Index": "7", "X-Consul-Default-ACL-Policy": "allow"}))
    with ServiceRegistry("127.0.0.1", recorder.port, consistency=consistency) as registry:
        registry.discover_service(service_name)
    asked = httpx.URL(recorder.requests[0].target).params
    assert {"consistent", "stale"} & set(asked) == {consistency} - {"default"}
