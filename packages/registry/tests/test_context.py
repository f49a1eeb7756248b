"""A request's deadline and retry marker: read by the middleware, obeyed, and handed on by calls on its behalf."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import BackgroundTasks, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from registry import Instance, ServiceDiscoveryClient, StaticResolver
from registry.discovery import context
from registry.discovery.context import DEADLINE_HEADER, RETRY_HEADER
from registry.fastapi import DiscoveryClient, RegistryMiddleware
from tests.support.command import wait_until


class Service:
    """One app that a real uvicorn serves in this process, and what it has seen."""

    def __init__(self, name: str, *upstreams: "Service") -> None:
        self.app = FastAPI()
        self.app.add_middleware(RegistryMiddleware)
        self.app.state.registrar = SimpleNamespace(instance_id=f"{name}-1", leaving=False)
        self.seen: list[tuple[float | None, bool, float]] = []
        """The deadline, the marker and the time, per request that reached a handler."""
        self.name = name
        self.upstreams = upstreams
        self.instance: Instance
        self._listener = socket.socket()

    def note(self) -> None:
        self.seen.append((context.deadline(), context.is_retry(), time.time()))

    def listen(self) -> None:
        """Takes a port."""
        self._listener.bind(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.instance = Instance(f"{self.name}-{port}", self.name, "127.0.0.1", port)

    async def serve(self, stack: AsyncExitStack) -> None:
        """Serves until the stack is left."""
        server = uvicorn.Server(uvicorn.Config(self.app, log_level="critical", lifespan="on"))
        running = asyncio.create_task(server.serve([self._listener]))

        async def stop() -> None:
            server.should_exit = True
            await running

        stack.push_async_callback(stop)
        if self.upstreams:
            client = client_of(*self.upstreams, retry_delay=0.01)
            self.app.state.discovery_client = await stack.enter_async_context(client)
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def client_of(*services: Service, **options: Any) -> ServiceDiscoveryClient:
    found: dict[str, list[Instance]] = {}
    for service in services:
        found.setdefault(service.name, []).append(service.instance)
    return ServiceDiscoveryClient(StaticResolver(found), **{"policy": "round_robin"} | options)


@asynccontextmanager
async def serving(*services: Service) -> AsyncIterator[None]:
    """All of them, side by side, until the context ends."""
    async with AsyncExitStack() as stack:
        for service in services:
            service.listen()
        for service in services:
            await service.serve(stack)
        yield


def backend() -> Service:
    """Answers with what it inherited."""
    service = Service("backend")

    @service.app.get("/")
    async def answer() -> dict[str, Any]:
        service.note()
        return {"deadline": context.deadline(), "is_retry": context.is_retry()}

    @service.app.get("/in-a-thread")
    def answer_in_a_thread() -> dict[str, Any]:
        return {"deadline": context.deadline(), "is_retry": context.is_retry()}

    return service


def front(*backends: Service, seconds: float = 0.0) -> Service:
    """Asks the backend on behalf of each request, after so many ``seconds``; 502 when that fails."""
    service = Service("front", *backends)

    @service.app.get("/")
    async def answer(client: DiscoveryClient) -> Any:
        service.note()
        await asyncio.sleep(seconds)
        try:
            return (await client.get("backend", "/")).json()
        except httpx.HTTPError as error:
            return JSONResponse({"detail": repr(error)}, status_code=502)

    return service


async def test_deadline_shrinks_along_the_chain() -> None:
    """What one service has used up, the next one has no more: the moment stays, whatever each client's own deadline."""
    back = backend()
    middle = front(back, seconds=0.2)
    async with serving(back, middle), client_of(middle, timeout=2.0) as client:
        began = time.time()
        answer = await client.get("front", "/")
    (at_front, _, front_time), (at_back, _, back_time) = middle.seen[0], back.seen[0]
    assert at_front is not None
    assert at_front == at_back == answer.json()["deadline"]
    assert at_front == pytest.approx(began + 4.0, abs=0.5)  # twice the time-out
    assert (at_front - front_time) - (at_front - back_time) >= 0.2


async def test_chain_ends_at_the_deadline() -> None:
    """Nobody works on for a caller that has gone: the call below is given up in time, and answered by no attempt."""
    back = backend()
    middle = front(back, seconds=0.3)
    async with serving(back, middle), httpx.AsyncClient(base_url=f"http://{middle.instance.netloc}") as http:
        answer = await http.get("/", headers={DEADLINE_HEADER: f"{time.time() + 0.2:.3f}"})
    assert answer.status_code == 502
    assert "deadline" in answer.json()["detail"]
    assert (len(middle.seen), len(back.seen)) == (1, 0)


async def test_expired_request_is_answered_504_at_once() -> None:
    """In words, signed like every response, and the handler never runs."""
    back = backend()
    async with serving(back), httpx.AsyncClient(base_url=f"http://{back.instance.netloc}") as http:
        for method, path in (("GET", "/"), ("POST", "/"), ("GET", "/nowhere")):
            deadline = round(time.time() - 2.5, 3)
            headers = {DEADLINE_HEADER: f"{deadline:.3f}"}
            answer = await http.request(method, path, headers=headers, content=b"x" * 100_000)
            assert (answer.status_code, answer.headers["Content-Type"]) == (504, "application/problem+json")
            detail = answer.json()["detail"]
            told = re.fullmatch(r"the deadline in X-Request-Deadline passed (\d+\.\d{3}) s ago", detail)
            assert told
            assert 2.499 < float(told[1]) <= time.time() - deadline + 0.001
            assert answer.headers["X-Service-Instance"] == "backend-1"
    assert back.seen == []


SENSELESS = [
    "",
    "soon",
    "nan",
    "inf",
    "-1",
    "30",  # a duration
    "1e30",
    "1_700_000_000",
    "0x7fffffff",
    "1" * 400,
    "1700000000.",
    "1700000000,5",
    str(int(time.time() * 1000)),
    str(time.time() + 2 * 86_400),
    "١٧٠٠٠٠٠٠٠٠",
]


@pytest.mark.parametrize("value", SENSELESS, ids=range(len(SENSELESS)))
async def test_senseless_deadline_is_ignored(value: str) -> None:
    """What no caller can mean neither stops a request nor gives it time without end."""
    back = backend()
    async with serving(back), httpx.AsyncClient(base_url=f"http://{back.instance.netloc}") as http:
        answer = await http.get("/", headers=[(DEADLINE_HEADER.encode(), value.encode())])
    assert answer.json() == {"deadline": None, "is_retry": False}


@pytest.mark.parametrize(
    ("value", "is_retry"),
    [("2", True), ("17", True), ("1", False), ("0", False), ("-2", False), ("", False), ("2.0", False), ("x", False)],
)
async def test_retry_marker_is_a_number_from_two_on(value: str, is_retry: bool) -> None:
    """A first attempt, and anything that is no attempt's number, is no retry."""
    back = backend()
    async with serving(back), httpx.AsyncClient(base_url=f"http://{back.instance.netloc}") as http:
        for path in ("/", "/in-a-thread"):
            assert (await http.get(path, headers={RETRY_HEADER: value})).json()["is_retry"] is is_retry


async def test_downstream_of_a_retry_is_not_multiplied() -> None:
    """Two attempts above and three below are four requests at a failing backend, not six."""
    seen: list[str | None] = []

    def failing() -> Service:
        service = Service("backend")

        @service.app.get("/")
        async def fail(request: Request) -> JSONResponse:
            seen.append(request.headers.get(RETRY_HEADER))
            return JSONResponse({}, status_code=500)

        return service

    backs = [failing() for _ in range(3)]
    middles = [front(*backs), front(*backs)]
    async with serving(*backs, *middles), client_of(*middles, max_retries=2, retry_delay=0.01) as client:
        with pytest.raises(httpx.HTTPStatusError):
            await client.get("front", "/")
    assert [is_retry for middle in middles for _, is_retry, _ in middle.seen].count(True) == 1
    assert seen == [None, "2", "3", None]


async def test_nothing_is_left_in_the_caller_of_an_app_in_process() -> None:
    """Over httpx.ASGITransport the app runs in its caller's own task: what that had inherited is back afterwards."""
    back = backend()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(back.app), base_url="http://backend") as http:
        own = time.time() + 100
        token = context.inherited.set(context.Inherited(own, False))
        inside = (await http.get("/", headers={RETRY_HEADER: "2"})).json()
        assert inside == {"deadline": None, "is_retry": True}
        assert (context.deadline(), context.is_retry()) == (own, False)
        context.inherited.reset(token)


async def test_background_tasks_have_no_deadline() -> None:
    """The request is answered, nobody waits: they may take their time, and retry. So may the rest of a stream."""
    service = Service("backend")
    later: asyncio.Queue[tuple[float | None, bool]] = asyncio.Queue()

    async def note() -> None:
        later.put_nowait((context.deadline(), context.is_retry()))

    @service.app.get("/")
    async def answer(tasks: BackgroundTasks) -> dict[str, Any]:
        tasks.add_task(note)
        return {"deadline": context.deadline()}

    @service.app.get("/stream")
    async def stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            for _ in range(3):
                yield f"{context.deadline()} {context.is_retry()}\n"

        return StreamingResponse(pieces())

    async with serving(service), httpx.AsyncClient(base_url=f"http://{service.instance.netloc}") as http:
        deadline = round(time.time() + 5, 3)
        headers = {DEADLINE_HEADER: f"{deadline:.3f}", RETRY_HEADER: "2"}
        assert (await http.get("/", headers=headers)).json() == {"deadline": deadline}
        async with asyncio.timeout(5):
            assert await later.get() == (None, False)
        assert (await http.get("/stream", headers=headers)).text.splitlines() == ["None True"] * 3


EXECUTES = """
import os, sys
import uvicorn
from fastapi import FastAPI
from registry.fastapi import RegistryMiddleware

app = FastAPI()
app.add_middleware(RegistryMiddleware)

@app.get("/{name}")
async def execute(name: str):
    with open(sys.argv[2], "a") as journal:
        journal.write(name + "\\n")
    return {"pid": os.getpid()}

uvicorn.run(app, fd=int(sys.argv[1]), log_level="critical")
"""


@contextmanager
def executing(journal: Path) -> Iterator[tuple[Instance, subprocess.Popen[bytes]]]:
    """A process that writes down what it executes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [sys.executable, "-c", EXECUTES, str(listener.fileno()), str(journal)], pass_fds=[listener.fileno()]
        )
        try:
            port = listener.getsockname()[1]
            yield Instance("cards-1", "cards", "127.0.0.1", port), process
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait(10)


def ask(instance: Instance, name: str, deadline: float) -> socket.socket:
    connection = socket.create_connection((instance.address, instance.port))
    connection.sendall(f"GET /{name} HTTP/1.1\r\nHost: cards\r\n{DEADLINE_HEADER}: {deadline:.3f}\r\n\r\n".encode())
    return connection


def answer_to(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    with connection:
        connection.settimeout(10)
        response = b""
        while b"}" not in response:
            response += connection.recv(65536)
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.real
def test_stopped_instance_does_not_work_off_what_queued_up(tmp_path: Path) -> None:
    """Resumed after the deadlines, it answers 504 to what waited and executes none of it, but what is in time."""
    journal = tmp_path / "journal"
    journal.touch()
    with executing(journal) as (instance, process):
        assert answer_to(ask(instance, "before", time.time() + 10))[0] == 200
        process.send_signal(signal.SIGSTOP)
        late = [ask(instance, f"late-{n}", time.time() + 0.3) for n in range(20)]
        in_time = ask(instance, "in-time", time.time() + 60)
        passed = time.time() + 0.4
        wait_until(lambda: time.time() > passed)
        process.send_signal(signal.SIGCONT)
        for connection in late:
            status, body = answer_to(connection)
            assert (status, body["detail"].startswith("the deadline in X-Request-Deadline passed")) == (504, True)
        assert answer_to(in_time)[0] == 200
        assert journal.read_text().split() == ["before", "in-time"]


@pytest.mark.real
async def test_calls_that_timed_out_on_a_stopped_instance_are_never_executed(tmp_path: Path) -> None:
    """The client's own calls: given up after their deadline, and thrown away by the instance when it comes to them."""
    journal = tmp_path / "journal"
    journal.touch()
    with executing(journal) as (instance, process):
        resolver = StaticResolver({"cards": [instance]})
        async with ServiceDiscoveryClient(resolver) as client:
            await client.get("cards", "/before")
        async with ServiceDiscoveryClient(resolver, timeout=0.3, deadline=0.3, max_retries=1) as client:
            process.send_signal(signal.SIGSTOP)
            calls = (client.get("cards", f"/late-{n}") for n in range(4))
            errors = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(error) for error in errors} <= {httpx.ReadTimeout, httpx.ConnectTimeout}
            process.send_signal(signal.SIGCONT)
        async with ServiceDiscoveryClient(resolver) as client:
            await client.get("cards", "/after")
        process.terminate()
        await asyncio.to_thread(process.wait, 10)
    assert journal.read_text().split() == ["before", "after"]


# -- clocks that differ ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [-3_600.0, -5.0, 0.0, 5.0, 3_600.0])
async def test_callers_clock_may_be_wrong(behind: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a caller's clock says, it has the time that it asked for, and its deadline reaches no further."""
    service = Service("backend")

    @service.app.get("/")
    async def answer() -> dict[str, Any]:
        return {"left": (context.deadline() or 0.0) - time.time()}

    async with serving(service), httpx.AsyncClient(base_url=f"http://{service.instance.netloc}") as http:
        monkeypatch.setattr(context, "_clocks", context.Clocks())
        for _ in range(3):
            headers = {DEADLINE_HEADER: f"{time.time() - behind + 2.0:.3f}; left=2.000"}
            answered = await http.get("/", headers=headers)
            assert answered.status_code == 200
            assert 1.0 < answered.json()["left"] <= 2.5


def test_queue_is_told_from_a_clock() -> None:
    """A request that waited is late for its caller, whose other requests came in time; a clock is always off."""
    clocks, now = context.Clocks(), 1_700_000_000.0
    for behind in (0.0, 100.0):
        caller = f"10.0.0.{behind:g}"
        for waited in (0.01, 0.2, 20.0, 0.01, 20.0):
            now += 60.0
            sent = now - waited
            stamp = sent - behind + 2.0
            assert (clocks.ours(stamp, 2.0, caller, now) > now) is (waited < 2.0)


def test_clock_that_was_set_right_is_believed_again() -> None:
    """A caller whose clock was an hour behind and is right now is not given an hour."""
    clocks, now = context.Clocks(), 1_700_000_000.0
    clocks.ours(now - 3_600.0 + 2.0, 2.0, "a", now)
    assert clocks.ours(now + 1 + 2.0, 2.0, "a", now + 1) == now + 3.0


async def test_front_door_takes_no_deadline_from_strangers() -> None:
    """With ``trust_caller=False`` neither a tiny deadline nor a retry marker from outside does anything."""
    service = Service("backend")
    service.app.user_middleware.clear()
    service.app.add_middleware(RegistryMiddleware, trust_caller=False)

    @service.app.get("/")
    async def answer() -> dict[str, Any]:
        return {"deadline": context.deadline(), "is_retry": context.is_retry()}

    async with serving(service), httpx.AsyncClient(base_url=f"http://{service.instance.netloc}") as http:
        answered = await http.get("/", headers={DEADLINE_HEADER: f"{time.time() - 5:.3f}", RETRY_HEADER: "2"})
    assert answered.json() == {"deadline": None, "is_retry": False}
    assert answered.headers["X-Service-Instance"] == "backend-1"
