"""How an instance leaves: out of Consul first, serving on, and only then gone; whoever stops it, and how."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import pytest

from registry import ConsulResolver, ConsulSettings, Registrar, ServiceDiscoveryClient, ServiceSettings
from registry.presence.drain import DrainOnSigterm
from registry.testing.fixtures import ConsulAgent, Instances
from registry.testing.instances import RunningInstance, received
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


# On a busy machine a worker may need longer to start than the five seconds after which uvicorn gives it up.
TWO_WORKERS = "--workers=2", "--timeout-worker-healthcheck=30"


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_withdraws_then_drains_then_stops(service: Start, consul_agent: ConsulAgent, workers: int) -> None:
    """Gone from Consul at once, served and told to reconnect for the drain time, then ended; with workers too."""
    name = f"drained-{workers}"
    one = service(name, consul_agent, f"--workers={workers}", SERVICE_DRAIN_SECONDS="1.5")
    wait_until(one.is_found)
    assert "Connection" not in one.http.get("/pid").headers
    begun = time.monotonic()
    one.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not one.is_found(), 2)
    withdrawn = time.monotonic()
    while time.monotonic() < withdrawn + 0.8:
        answer = one.http.get("/pid")
        assert (answer.status_code, answer.headers["Connection"]) == (200, "close")
        assert not one.is_found()
    health = one.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "leaving")
    one.process.wait(10)
    assert 1.5 <= time.monotonic() - begun < 6
    assert found(consul_agent, name, passing=False) == []
    assert "own lifespan left" in one.log


def test_second_sigterm_stops_at_once(service: Start, consul_agent: ConsulAgent) -> None:
    """Nobody has to wait for a long drain: the second signal is the server's own."""
    one = service("impatient", consul_agent, SERVICE_DRAIN_SECONDS="60")
    wait_until(one.is_found)
    one.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not one.is_found())
    assert one.end(signal.SIGTERM) < 2
    assert "own lifespan left" in one.log
    assert "Traceback" not in one.log


@pytest.mark.parametrize("workers", [1, 2])
def test_sigint_withdraws(service: Start, consul_agent: ConsulAgent, workers: int) -> None:
    """Ctrl-C, which reaches the whole process group, leaves nothing in Consul and waits for no drain."""
    one = service(f"interrupted-{workers}", consul_agent, f"--workers={workers}", SERVICE_DRAIN_SECONDS="60")
    wait_until(one.is_found)
    begun = time.monotonic()
    os.killpg(one.process.pid, signal.SIGINT)
    one.process.wait(10)
    assert time.monotonic() - begun < 5
    assert found(consul_agent, one.name, passing=False) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_hung_consul_delays_the_exit_by_two_seconds(
    service: Start, private_consul_agent: ConsulAgent, number: signal.Signals
) -> None:
    """With the agent frozen, the exit takes 2 s more at most; with the agent dead, none."""
    one, two = (service(f"stuck-{n}", private_consul_agent, SERVICE_DRAIN_SECONDS="0") for n in (1, 2))
    wait_until(lambda: one.is_found() and two.is_found())
    private_consul_agent.pause()
    assert 1.9 < one.end(number) < 3.5
    assert "WARNING could not deregister" in one.log
    private_consul_agent.kill()
    assert two.end(number) < 1.5


def test_sigterm_during_startup_leaves_nothing_behind(service: Start, consul_agent: ConsulAgent) -> None:
    """A signal that comes before the app has started is obeyed, and Consul never hears of the instance."""
    one = service("aborted", consul_agent, wait=False, STARTUP_SECONDS="1")
    wait_until(lambda: "Waiting for application startup" in one.log, 20)
    assert one.end(signal.SIGTERM) < 4
    assert "own lifespan left" in one.log
    assert found(consul_agent, "aborted", passing=False) == []


def test_a_worker_that_still_starts_brings_nothing_back(service: Start, consul_agent: ConsulAgent) -> None:
    """SIGTERM reaches one worker at work and one that is starting: the late one does not undo what the other did."""
    one = service("late", consul_agent, *TWO_WORKERS, LATER_STARTUP_SECONDS="1.5", SERVICE_DRAIN_SECONDS="4")
    wait_until(lambda: one.is_found() and one.log.count("Waiting for application startup") == 2)
    one.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not one.is_found(), 2)
    while one.log.count("Application startup complete") < 2 or one.log.count("own lifespan left") < 1:
        assert not one.is_found()
    assert one.log.count("INFO registered") == 1
    one.process.wait(10)
    assert found(consul_agent, "late", passing=False) == []


async def test_rolling_restarts_under_load_lose_and_double_nothing(
    consul_agent: ConsulAgent, instances: Instances
) -> None:
    """Five rolling restarts of three instances under 200 POST/s: every request arrives exactly once."""
    replicas = await asyncio.to_thread(
        instances, "rolled", 3, consul=consul_agent, registers_itself=True, drain_seconds=0.5
    )

    def all_are_found() -> bool:
        return len(found(consul_agent, "rolled")) == 3

    def roll(replica: RunningInstance) -> None:
        replica.terminate()
        replica.start()
        replica.set(delay=0.05)
        wait_until(all_are_found)

    await asyncio.to_thread(wait_until, all_are_found)
    for replica in replicas:
        replica.set(delay=0.05)
    async with Posting("rolled", consul_agent) as posting:
        for n in range(5):
            await asyncio.to_thread(roll, replicas[n % 3])
    stats = received(replicas)
    assert posting.failures == {}
    assert len(posting.ids) > 500
    assert stats.duplicated == {}
    assert set(stats.ids) == posting.ids


async def test_rolling_workers_under_load_loses_nothing(service: Start, consul_agent: ConsulAgent) -> None:
    """SIGHUP replaces both workers of the only instance under load: it never leaves Consul, and no POST is lost."""
    one = await asyncio.to_thread(service, "hung-up", consul_agent, *TWO_WORKERS)
    await asyncio.to_thread(wait_until, lambda: one.log.count("INFO registered") == 2)
    before = set(one.workers())

    def replaced() -> bool:
        assert one.is_found()
        return len(set(one.workers()) - before) == 2 == len(one.workers())

    async with Posting("hung-up", consul_agent) as posting:
        one.process.send_signal(signal.SIGHUP)
        await asyncio.to_thread(wait_until, replaced, 40)
    assert posting.failures == {}
    assert "deregistered" not in one.log
    assert len(posting.ids) > 200
    assert sorted((one.directory / "journal").read_text().split()) == sorted(posting.ids)
    one.process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(wait_until, lambda: not one.is_found(), 2)
    assert one.answers()


class Posting:
    """Twelve callers that post without pause, each request with an id of its own, while the context lasts.

    Without pause, because a connection breaks when it is used again just when its server has decided to close it.
    """

    def __init__(self, service: str, consul: ConsulAgent) -> None:
        self._service = service
        self._settings = ConsulSettings(host="127.0.0.1", port=consul.http_port)
        self._stopping = False
        self.ids: set[str] = set()
        self.failures: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        await self._task

    async def _run(self) -> None:
        async with ServiceDiscoveryClient(ConsulResolver(self._settings)) as client, asyncio.TaskGroup() as group:
            for caller in range(12):
                group.create_task(self._call(client, caller))

    async def _call(self, client: ServiceDiscoveryClient, caller: int) -> None:
        while not self._stopping:
            id_ = f"{caller}-{len(self.ids)}"
            self.ids.add(id_)
            try:
                await client.post(self._service, "/work", headers={"X-Request-Id": id_})
            except Exception as error:
                self.failures[id_] = repr(error)
                await asyncio.sleep(0.01)


def test_a_killed_worker_takes_nothing_with_it(service: Start, consul_agent: ConsulAgent) -> None:
    """kill -9 of one of two workers: the instance stays in Consul without a gap, while the worker is replaced."""
    one = service("survivor", consul_agent, *TWO_WORKERS, SERVICE_HEALTH_CHECK_INTERVAL="1")
    wait_until(lambda: one.log.count("INFO registered") == 2)
    before = one.workers()
    os.kill(before[0], signal.SIGKILL)
    # uvicorn gives a worker that dies in the moment of its health check those 30 seconds to answer.
    deadline = time.monotonic() + 60
    while one.log.count("INFO registered") < 3:
        assert one.is_found()
        assert time.monotonic() < deadline
    assert before[1] in one.workers()
    assert before[0] not in one.workers()
    assert "forgot" not in one.log


async def test_no_registration_overtakes_its_withdrawal(consul_agent: ConsulAgent) -> None:
    """Closed at any moment of its registration, an instance is not in Consul afterwards."""
    consul = ConsulSettings(host="127.0.0.1", port=consul_agent.http_port)
    for n in range(25):
        registrar = Pretending(ServiceSettings(name="overtaken", port=1, address="127.0.0.1"), consul)
        registrar.start()
        await asyncio.sleep(n * 0.0005)
        await registrar.aclose()
        assert found(consul_agent, "overtaken", passing=False) == []


async def test_a_begun_withdrawal_is_carried_through(consul_agent: ConsulAgent) -> None:
    """Cancelling the one who waits for it does not stop a withdrawal, and closing waits for it."""
    consul = ConsulSettings(host="127.0.0.1", port=consul_agent.http_port)
    registrar = Pretending(ServiceSettings(name="carried", port=1, address="127.0.0.1"), consul)
    registrar.start()
    await asyncio.to_thread(wait_until, lambda: found(consul_agent, "carried"))
    waiting = asyncio.create_task(registrar.withdraw())
    await asyncio.sleep(0)
    waiting.cancel()
    await registrar.aclose()
    assert found(consul_agent, "carried", passing=False) == []


async def test_the_last_of_two_workers_takes_the_instance_out(consul_agent: ConsulAgent) -> None:
    """While the other one serves, one that leaves keeps answering Consul's check; when both have left, neither does."""
    consul = ConsulSettings(host="127.0.0.1", port=consul_agent.http_port)
    one, two = (Pretending(ServiceSettings(name="shared", port=1, address="127.0.0.1"), consul) for _ in range(2))
    one.start()
    two.start()
    await asyncio.to_thread(wait_until, lambda: found(consul_agent, "shared"))
    await one.withdraw()
    assert (one.leaving, one.withdrawn, one.serves("shared-127.0.0.1-1")) == (True, False, True)
    assert found(consul_agent, "shared") == ["shared-127.0.0.1-1"]
    await two.withdraw()
    assert found(consul_agent, "shared", passing=False) == []
    await asyncio.to_thread(wait_until, lambda: one.withdrawn)
    assert not one.serves("shared-127.0.0.1-1")
    await one.aclose()
    await two.aclose()


class Pretending(Registrar):
    """Of an instance that nobody serves, but that seems to answer until it closes."""

    async def answers(self) -> bool:
        return not self._closing


class Server:
    """Stands for uvicorn: notes in which order it was told to stop, and what came before."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.stopped = asyncio.Event()

    def handle_exit(self, number: int, frame: object) -> None:
        self.events.append("stop")
        self.stopped.set()

    async def withdraw(self) -> None:
        self.events.append("withdraw")

    async def fail(self) -> None:
        raise RuntimeError("unforeseen")

    async def close(self) -> None:
        self.events.append("close")


@pytest.fixture
def server() -> Iterator[Server]:
    """A server whose handler is the process's SIGTERM handler for the test."""
    server = Server()
    previous = signal.signal(signal.SIGTERM, server.handle_exit)
    yield server
    signal.signal(signal.SIGTERM, previous)


async def until_stopped(server: Server) -> None:
    """Return once the server was told to stop."""
    async with asyncio.timeout(5):
        await server.stopped.wait()


async def test_the_server_is_told_after_the_drain(server: Server) -> None:
    """One signal withdraws, waits and then calls the server's handler once; afterwards that handler is back."""
    async with DrainOnSigterm(server.withdraw, server.close, 0.2):
        begun = time.monotonic()
        signal.raise_signal(signal.SIGTERM)
        assert server.events == []
        await until_stopped(server)
        assert time.monotonic() - begun >= 0.2
    assert server.events == ["withdraw", "stop", "close"]
    assert signal.getsignal(signal.SIGTERM) == server.handle_exit


async def test_two_signals_in_one_breath_stop_at_once(server: Server) -> None:
    """The second signal goes straight to the server, even before the loop has seen the first."""
    async with DrainOnSigterm(server.withdraw, server.close, 60):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert server.events == ["stop"]
        await asyncio.sleep(0.01)
    assert server.events == ["stop", "withdraw", "close"]


async def test_whatever_fails_the_server_is_stopped(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """An error while withdrawing does not make a process that can't be stopped."""
    async with DrainOnSigterm(server.fail, server.close, 60):
        signal.raise_signal(signal.SIGTERM)
        await until_stopped(server)
    assert "draining failed" in caplog.text


async def test_a_server_that_stops_by_itself_cuts_the_drain(server: Server) -> None:
    """When the server has stopped for another reason, no drain goes on and no handler is called."""
    async with DrainOnSigterm(server.withdraw, server.close, 60):
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.01)
    assert server.events == ["withdraw", "close"]
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "registry drain"]


async def test_a_handler_of_the_loop_is_told_after_the_drain(server: Server) -> None:
    """Servers on ``loop.add_signal_handler`` are held back as well, and told once; other signals reach the loop."""
    loop = asyncio.get_running_loop()
    other = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, server.handle_exit, signal.SIGTERM, None)
    loop.add_signal_handler(signal.SIGUSR1, other.set)
    async with DrainOnSigterm(server.withdraw, server.close, 0.2):
        begun = time.monotonic()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        await asyncio.wait_for(other.wait(), 5)
        assert "stop" not in server.events
        await until_stopped(server)
        assert time.monotonic() - begun >= 0.2
    assert server.events == ["withdraw", "stop", "close"]
    server.stopped.clear()
    signal.raise_signal(signal.SIGTERM)
    await until_stopped(server)
    assert server.events == ["withdraw", "stop", "close", "stop"]
    assert loop.remove_signal_handler(signal.SIGTERM)
    assert loop.remove_signal_handler(signal.SIGUSR1)


async def test_a_second_signal_reaches_the_handler_of_the_loop(server: Server) -> None:
    """There too nobody waits for a long drain: the second SIGTERM is the server's own."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, server.handle_exit, signal.SIGTERM, None)
    async with DrainOnSigterm(server.withdraw, server.close, 60):
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.01)
        assert server.events == ["withdraw"]
        signal.raise_signal(signal.SIGTERM)
        await until_stopped(server)
    assert server.events == ["withdraw", "stop", "close"]
    assert loop.remove_signal_handler(signal.SIGTERM)


async def test_no_signal_ends_a_process_that_is_closing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody handles SIGTERM, one that comes while the instance withdraws ends the process only afterwards."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Only what would end the process is replaced: the signal itself is a real one.
    monkeypatch.setattr(signal, "raise_signal", lambda number: server.events.append(f"ended by {number}"))

    async def close() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.01)
        server.events.append("close")

    async with DrainOnSigterm(server.withdraw, close, 0):
        pass
    assert server.events == ["close", "ended by 15"]


@pytest.mark.parametrize("handler", [None, signal.SIG_IGN])
async def test_what_is_not_ours_to_handle_is_left_alone(
    server: Server, monkeypatch: pytest.MonkeyPatch, handler: object
) -> None:
    """A handler that is not Python's can't be put back, and an ignored signal is ignored on purpose."""
    monkeypatch.setattr(signal, "getsignal", lambda number: handler)
    async with DrainOnSigterm(server.withdraw, server.close, 0):
        signal.raise_signal(signal.SIGTERM)
    assert server.events == ["stop", "close"]


async def test_a_handler_put_in_front_of_ours_stays(server: Server) -> None:
    """Whoever took SIGTERM over while the app ran keeps it, and reaches the server through us."""
    async with DrainOnSigterm(server.withdraw, server.close, 0):
        ours = signal.getsignal(signal.SIGTERM)
        assert callable(ours)
        signal.signal(signal.SIGTERM, lambda number, frame: ours(number, frame))
        theirs = signal.getsignal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is theirs
    signal.raise_signal(signal.SIGTERM)
    assert server.events == ["close", "stop"]


async def test_other_threads_have_no_signals(server: Server) -> None:
    """An app that runs in another thread starts and stops without touching the process's signals."""

    async def run() -> object:
        async with DrainOnSigterm(server.withdraw, server.close, 0):
            assert threading.current_thread() is not threading.main_thread()
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor() as pool:
        assert await asyncio.wrap_future(pool.submit(asyncio.run, run())) == server.handle_exit
