"""What holds under each program that runs an app; the same table for readers: docs/howto/runners.md."""

import asyncio
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest

from registry import ConsulResolver, ConsulSettings, ServiceDiscoveryClient
from registry.testing.fixtures import ConsulAgent, Instances
from registry.testing.ports import free_ports
from tests.support.command import ServiceProcess, found, wait_until
from tests.support.load import Load

HERE = Path(__file__).parent
APP = "presence_app:app"
# On a busy machine a worker may need longer to start than the five seconds after which uvicorn gives it up.
WORKERS = ["--workers=2", "--timeout-worker-healthcheck=30"]
GUNICORN = ["gunicorn", APP, "--worker-class=uvicorn_worker.UvicornWorker", "--bind=127.0.0.1:{port}"]
HYPERCORN = ["hypercorn", APP, "--bind=127.0.0.1:{port}"]
GRANIAN = ["granian", APP, "--interface=asgi", "--port={port}"]

DRAIN = {
    "uvicorn, h11": ["uvicorn", APP, "--port={port}", "--http=h11", "--loop=asyncio"],
    "uvicorn, httptools": ["uvicorn", APP, "--port={port}", "--http=httptools", "--loop=uvloop"],
    "uvicorn, two workers": ["uvicorn", APP, "--port={port}", *WORKERS],
    "uvicorn, reload": ["uvicorn", APP, "--port={port}", "--reload", "--reload-dir={directory}"],
    "fastapi run": ["fastapi", "run", "presence_app.py", "--port={port}"],
    "gunicorn, two workers": [*GUNICORN, "--workers=2"],
    "gunicorn, its own asgi worker": ["gunicorn", APP, "--worker-class=asgi", "--bind=127.0.0.1:{port}"],
    "hypercorn, one process": [*HYPERCORN, "--workers=0"],
    "hypercorn, one process, uvloop": [*HYPERCORN, "--workers=0", "--worker-class=uvloop"],
    "granian": [*GRANIAN, "--loop=asyncio"],
    "granian, two workers, uvloop": [*GRANIAN, "--workers=2", "--loop=uvloop"],
}
"""Command lines under which SIGTERM costs no call."""


class Runner(ServiceProcess):
    """`presence_app` under another program than uvicorn."""

    def __init__(self, name: str, command: list[str], consul: ConsulAgent) -> None:
        super().__init__(APP, name, consul=consul, port=free_ports(1)[0], cwd=HERE, env={"PYTHONPATH": str(HERE)})
        program = str(Path(sys.executable).with_name(command[0]))
        options = [part.format(port=self.port, directory=self.directory) for part in command[1:]]
        self._command = [program, *options]


Start = Callable[[list[str]], Runner]


@pytest.fixture
def start(service_name: str, consul_agent: ConsulAgent) -> Iterator[Start]:
    """Starts a service with this command line, and returns when it is found."""
    with ExitStack() as stack:

        def run(command: list[str]) -> Runner:
            runner = Runner(service_name, command, consul_agent)
            stack.callback(runner.close)
            runner.start()
            wait_until(runner.is_found, 3)
            return runner

        yield run


@pytest.fixture
def client(consul_agent: ConsulAgent) -> ServiceDiscoveryClient:
    """A caller that learns of instances from the agent."""
    return ServiceDiscoveryClient(ConsulResolver(ConsulSettings(host="127.0.0.1", port=consul_agent.http_port)))


def posting(client: ServiceDiscoveryClient, service: str) -> Load:
    """Four callers that post without pause; a POST that was sent may not be repeated."""

    async def post(id_: str) -> httpx.Response:
        return await client.post(service, "/work", headers={"X-Request-Id": id_})

    return Load(post, callers=4)


@pytest.mark.parametrize("command", DRAIN.values(), ids=DRAIN)
async def test_sigterm_under_load_costs_no_call(
    start: Start,
    command: list[str],
    consul_agent: ConsulAgent,
    instances: Instances,
    client: ServiceDiscoveryClient,
    service_name: str,
) -> None:
    """Registered at once; on SIGTERM out of Consul while it still answers; no POST is lost, and nothing is left."""
    one = await asyncio.to_thread(start, command)
    (other,) = await asyncio.to_thread(instances, service_name, 1, consul=consul_agent)
    async with client, posting(client, service_name) as load:
        await load.until(lambda: one.id in load.report.shares, 10)
        one.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(wait_until, lambda: not one.is_found(), 2)
        assert one.answers()
        await asyncio.to_thread(one.process.wait, 20)
        await load.reached(load.calls + 20)
    assert [(failure.instance, failure.message) for failure in load.report.failures] == []
    assert "use --workers 0" not in one.log
    assert found(consul_agent, service_name, passing=False) == [other.instance.id]
    assert one.log.count("INFO deregistered") == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_hypercorn_with_workers_withdraws_late_but_leaves_nothing(
    start: Start, consul_agent: ConsulAgent, service_name: str, workers: int
) -> None:
    """Its workers learn of SIGTERM when they have stopped serving: told at start; then at once, by the last one."""
    one = start([*HYPERCORN, f"--workers={workers}"])
    wait_until(lambda: one.log.count("INFO registered") == workers)
    one.process.send_signal(signal.SIGTERM)
    # A worker looks every 0.1 s whether it was told to stop; it used to ask for a sibling for a second then.
    assert wait_until(lambda: not one.is_found(), 5) < 0.8
    one.process.wait(20)
    assert found(consul_agent, service_name, passing=False) == []
    assert one.log.count("INFO deregistered") == 1
    assert one.log.count("use --workers 0") == workers


async def test_granian_replaces_its_workers_unnoticed(
    start: Start, client: ServiceDiscoveryClient, service_name: str
) -> None:
    """SIGHUP starts each new worker before the old one goes: the only instance never leaves Consul, nothing fails."""
    one = await asyncio.to_thread(start, [*GRANIAN, "--workers=2", "--respawn-interval=4"])

    def replaced() -> bool:
        assert one.is_found()
        return one.log.count("Stopped old worker") == 2

    async with client, posting(client, service_name) as load:
        await load.reached(20)
        one.process.send_signal(signal.SIGHUP)
        await asyncio.to_thread(wait_until, replaced, 30)
    assert [(failure.instance, failure.message) for failure in load.report.failures] == []
    assert one.log.count("INFO registered") >= 4
    assert "deregistered" not in one.log


RESTARTS: dict[str, tuple[list[str], Callable[[Runner], None]]] = {
    "gunicorn, SIGHUP": ([*GUNICORN, "--workers=2"], lambda one: one.process.send_signal(signal.SIGHUP)),
    "uvicorn, reload": (DRAIN["uvicorn, reload"], lambda one: (one.directory / "changed.py").touch()),
}
"""Command lines and what makes them stop all old workers before a new one serves."""


@pytest.mark.parametrize(("command", "restart"), RESTARTS.values(), ids=RESTARTS)
def test_a_restart_without_overlap_leaves_and_comes_back(
    start: Start, command: list[str], restart: Callable[[Runner], None], consul_agent: ConsulAgent, service_name: str
) -> None:
    """While nobody serves, nobody is offered; the new workers register, and a later SIGTERM leaves nothing."""
    one = start(command)
    workers = 2 if "--workers=2" in command else 1
    wait_until(lambda: one.log.count("INFO registered") == workers)
    restart(one)
    wait_until(lambda: not one.is_found())
    wait_until(one.is_found, 20)
    wait_until(lambda: one.log.count("INFO registered") == 2 * workers)
    wait_until(lambda: one.log.count("own lifespan left") == workers)
    one.end(signal.SIGTERM)
    assert found(consul_agent, service_name, passing=False) == []


def test_a_killed_worker_takes_nothing_with_it(start: Start) -> None:
    """kill -9 of one of gunicorn's workers: its share of the instance is free at once, and the others keep theirs."""
    one = start([*GUNICORN, "--workers=2"])
    wait_until(lambda: one.log.count("INFO registered") == 2)
    worker, survivor = psutil.Process(one.process.pid).children()
    worker.kill()
    wait_until(lambda: one.log.count("INFO registered") == 3, 20)
    assert one.is_found()
    assert survivor.is_running()
    one.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not one.is_found(), 2)
    assert one.answers()
