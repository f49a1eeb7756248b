"""The instances that failover tests run on: they count truly, misbehave on command, and nothing stays of them."""

import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest

from registry import ServiceRegistry
from registry.testing.fixtures import ConsulAgent, Instances
from registry.testing.instances import Mode, received, running_instance, running_instances
from tests.support.command import wait_until


def passing(agent: ConsulAgent, service: str) -> set[str]:
    """The ids that discovery finds."""
    with ServiceRegistry(port=agent.http_port) as registry:
        return {instance.id for instance in registry.discover_service(service)}


def test_counts_what_arrived_even_after_a_kill(instances: Instances) -> None:
    """Requests, methods, bodies and repeated ids are counted at the server, and a kill loses none of them."""
    one, two = instances("counting", 2)
    httpx.get(f"{one.url}/cards", headers={"X-Request-Id": "a"})
    httpx.post(f"{one.url}/cards", json={"title": "x"}, headers={"Idempotency-Key": "b"})
    httpx.post(f"{two.url}/cards", json={"title": "x"}, headers={"Idempotency-Key": "b"})
    assert httpx.get(f"{one.url}/health").status_code == 200
    one.kill()
    stats = one.stats()
    assert (stats.requests, stats.methods, stats.bodies) == (2, {"GET": 1, "POST": 1}, 1)
    assert stats.duplicated == {}
    assert received([one, two]).duplicated == {"b": 2}
    one.start()
    answer = httpx.get(f"{one.url}/")
    assert answer.json() == {"instance": one.instance.id, "pid": one.pid}
    assert answer.headers["X-Service-Instance"] == one.instance.id
    assert one.stats().requests == 3


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("cut", httpx.RemoteProtocolError), ("half", httpx.RemoteProtocolError), ("hang", httpx.ReadTimeout)],
)
def test_breaks_on_command(instances: Instances, mode: Mode, expected: type[Exception]) -> None:
    """A request that is cut, half answered or left hanging fails at the caller but is counted, with its body."""
    (one,) = instances("breaking")
    one.set(mode)
    with pytest.raises(expected):
        httpx.post(one.url, content=b"body", timeout=0.3)
    one.set()
    assert httpx.post(one.url, content=b"body").status_code == 200
    assert (one.stats().bodies, one.stats().modes) == (2, {mode: 1, "ok": 1})


def test_errs_and_slows_on_command(instances: Instances) -> None:
    """Status, share of errors, Retry-After, delay and health are what the test asked for."""
    (one,) = instances("erring")
    one.set("error", status=503, retry_after=7, healthy=False)
    answer = httpx.get(one.url)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "7")
    assert httpx.get(f"{one.url}/health").status_code == 503
    one.set("error", rate=0.5)
    assert {httpx.get(one.url).status_code for _ in range(40)} == {200, 500}
    one.set(delay=0.2)
    begun = time.monotonic()
    assert httpx.get(one.url).status_code == 200
    assert time.monotonic() - begun >= 0.2
    assert httpx.get(f"{one.url}/health?instance=another").status_code == 404


def test_a_paused_instance_is_silent_and_goes_on(instances: Instances) -> None:
    """SIGSTOP leaves the port open and the caller waiting, and can be undone."""
    (one,) = instances("pausing")
    one.pause()
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(one.url, timeout=0.2)
    one.resume()
    assert httpx.get(one.url).status_code == 200


def test_is_found_while_it_lives_and_gone_afterwards(consul_agent: ConsulAgent) -> None:
    """Registered as passing with tags and weight from the start, still there after a kill, gone after the context."""
    with running_instances("found", 2, consul=consul_agent, tags=["v2"], weight=3) as (one, two):
        with ServiceRegistry(port=consul_agent.http_port) as registry:
            assert registry.discover_service("found") == sorted([one.instance, two.instance], key=lambda i: i.id)
        one.kill()
        assert passing(consul_agent, "found") == {one.instance.id, two.instance.id}
        one.deregister()
        assert passing(consul_agent, "found") == {two.instance.id}
        one.start()
        one.register()
        assert passing(consul_agent, "found") == {one.instance.id, two.instance.id}
    assert passing(consul_agent, "found") == set()


def test_registers_itself_and_drains(consul_agent: ConsulAgent) -> None:
    """The self-registering flavour has the same id, leaves Consul on SIGTERM and serves on while it drains."""
    with running_instance("itself", consul=consul_agent, registers_itself=True, drain_seconds=1.0) as one:
        wait_until(lambda: passing(consul_agent, "itself") == {one.instance.id})
        one.terminate(wait=False)
        wait_until(lambda: not passing(consul_agent, "itself"))
        assert httpx.get(one.url).json()["instance"] == one.instance.id
        one.wait()
        with pytest.raises(httpx.ConnectError):
            httpx.get(one.url)


def test_one_that_does_not_start_says_why(instances: Instances) -> None:
    """The end of the process's log is in the error."""
    (one,) = instances("unable")
    one.kill()
    one._env["PYTHONHOME"] = "/nowhere"
    with pytest.raises(RuntimeError, match=r"did not start:\n(.|\n)*No module named"):
        one.start()


PARENT = """
import sys, time
from tests.support.command import wait_until
from registry.testing.instances import running_instances
with running_instances("orphan", 2) as (one, two):
    one.pause()
    print(one.pid, two.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.real
def test_nothing_outlives_a_killed_parent() -> None:
    """Instances die with the process that started them, paused ones too."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(alive(pid) for pid in pids))


def alive(pid: int) -> bool:
    """Whether the process runs or is stopped; a zombie that nobody collects is dead."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
