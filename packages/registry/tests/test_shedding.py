"""What a service declines: when its event loop is late, when too much is in progress, and what one caller sends."""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import uvicorn
import uvloop
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError
from starlette.datastructures import State
from starlette.types import ASGIApp, Receive, Scope, Send

from registry import ConsulSettings, InvalidInputError, ServiceSettings
from registry.discovery.advice import NOT_EXECUTED_HEADER
from registry.fastapi import RegistryMiddleware, health_router, lifespan, state_router
from registry.metrics import metrics_router
from registry.shedding import Shedding, _Bucket, _Lag, caller_of, shedding
from registry.testing.fixtures import ConsulAgent
from registry.testing.ports import free_ports
from tests.support.command import found, wait_until

DECLINED = {"rate": 429, "lag": 503, "in-flight": 503}


def settings(**fields: Any) -> ServiceSettings:
    return ServiceSettings.model_validate({"name": "cards", "port": 8000} | fields)


class App:
    """Answers when the test says so, and counts."""

    def __init__(self) -> None:
        self.begun = 0
        self.may_end = asyncio.Event()
        self.fails = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun += 1
        await self.may_end.wait()
        if self.fails:
            raise LookupError
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


def client(shedding: Shedding, app: ASGIApp, caller: str | None = None, root: str = "") -> httpx.AsyncClient:
    """One whose certificate names this caller, as ``registry.mesh`` says it."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = {} if caller is None else {"caller": caller}
        await shedding.serve(app, scope, receive, send)

    return httpx.AsyncClient(transport=httpx.ASGITransport(guarded, root_path=root), base_url="http://cards")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def check_declined(answer: httpx.Response, reason: str) -> None:
    assert answer.status_code == DECLINED[reason]
    assert answer.headers[NOT_EXECUTED_HEADER] == reason
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["status"] == answer.status_code


# -- too much in progress ----------------------------------------------------------------------------------------------


async def test_beyond_so_many_in_progress_requests_are_declined() -> None:
    """The app never sees those above the limit; once one has ended, however it did, there is room again."""
    app = App()
    with Shedding(settings(max_in_flight=2)) as shedding:
        async with client(shedding, app) as caller:
            waiting = [asyncio.create_task(caller.get("/")) for _ in range(2)]
            await until(lambda: app.begun == 2)
            for method in ("GET", "POST"):
                check_declined(await caller.request(method, "/"), "in-flight")
            assert (app.begun, shedding.in_flight, shedding.counts) == (2, 2, {"in-flight": 2})
            app.fails = True
            app.may_end.set()
            assert {type(each) for each in await asyncio.gather(*waiting, return_exceptions=True)} == {LookupError}
            app.fails = False
            assert (await caller.get("/")).status_code == 200
            assert shedding.in_flight == 0


@pytest.mark.parametrize("path", ["/health", "/health?instance=cards-1", "/metrics", "/registry/state", "/v1/health"])
@pytest.mark.parametrize("root", ["", "/behind"])
async def test_what_machines_ask_is_always_answered(path: str, root: str) -> None:
    """Consul's check above all: an instance that is overloaded must not be taken for one that is ill."""
    app = App()
    app.may_end.set()
    with Shedding(settings(max_in_flight=1, health_check_path="/v1/health")) as shedding:
        shedding.in_flight = 1
        async with client(shedding, app, root=root) as caller:
            assert (await caller.get(root + path)).status_code == 200
            check_declined(await caller.get(root + path + "x" if "?" not in path else "/"), "in-flight")


# -- a late event loop -------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when a test says so, and one timer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.timer: tuple[float, Callable[[], None]] = (math.inf, lambda: None)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(asyncio, "get_running_loop", lambda: self)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        self.timer = (self.now + seconds, callback)

    def turn(self, seconds: float) -> None:
        """The loop is busy for so long, and then looks for timers."""
        self.now += seconds
        if self.timer[0] <= self.now:
            self.timer[1]()


@pytest.mark.parametrize(
    ("turns", "exceeded"),
    [
        ([0.001] * 1_000, False),
        ([0.09] * 100, False),  # late by less than the limit, for whatever time
        ([1.0], False),  # one late turn, however late
        ([1.0, 0.03] * 20, False),
        ([0.2, 0.2], True),
        ([0.14] * 3, True),
        ([0.2, 0.2, 0.03], False),
        ([0.2, 0.2, 0.03, 0.2], False),
        ([0.2, 0.2, 0.03, 0.2, 0.2], True),
    ],
)
def test_late_for_as_long_again(monkeypatch: pytest.MonkeyPatch, turns: list[float], exceeded: bool) -> None:
    """By 100 ms and more, for 100 ms and more: one pause is no overload, and the first turn in time ends it."""
    clock, lag = Clock(monkeypatch), _Lag(0.1)
    lag.start()
    for seconds in turns:
        clock.turn(seconds)
    assert lag.exceeded is exceeded


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("tasks", [1, 50])
def test_a_busy_loop_is_late(run: Callable[[Any], None], tasks: int) -> None:
    """On either loop, with one long turn after the other or many short ones in each; and it recovers."""

    async def busy(until: asyncio.Event) -> None:
        while not until.is_set():
            time.sleep(0.15 / tasks)  # noqa: ASYNC251
            await asyncio.sleep(0)

    async def measure() -> None:
        lag, over = _Lag(0.1), asyncio.Event()
        lag.start()
        working = [asyncio.create_task(busy(over)) for _ in range(tasks)]
        async with asyncio.timeout(20):
            await until(lambda: lag.exceeded)
            over.set()
            await asyncio.gather(*working)
            await until(lambda: not lag.exceeded)
        lag.stop()

    run(measure())


async def test_while_the_loop_is_late_requests_are_declined() -> None:
    """And its timer goes with it."""
    app = App()
    app.may_end.set()
    shedding = Shedding(settings(shed_lag=0.1))
    with shedding:
        lag = shedding._lag
        assert lag is not None
        assert lag._timer is not None
        async with client(shedding, app) as caller:
            assert (await caller.get("/")).status_code == 200
            lag.exceeded = True
            check_declined(await caller.post("/"), "lag")
            assert (await caller.get("/health")).status_code == 200
    assert lag._timer.cancelled()
    assert (app.begun, shedding.counts) == (2, {"lag": 1})


# -- one caller too many -----------------------------------------------------------------------------------------------


def test_a_bucket_holds_a_second() -> None:
    """So many a second, a second's worth at once, however long it was quiet; and it says how long to wait."""
    bucket = _Bucket(4.0)
    for moment in (100.0, 200.0):
        assert [bucket.take(moment) for _ in range(5)] == [0.0] * 4 + [0.25]
    assert bucket.take(200.125) == 0.125
    assert bucket.take(200.25) == 0.0
    assert sum(not bucket.take(300 + n / 100) for n in range(1_000)) == pytest.approx(4 + 4 * 10, abs=1)


def test_a_slow_bucket_holds_one() -> None:
    """Less than one a second is possible."""
    bucket = _Bucket(0.1)
    assert [bucket.take(0.0), bucket.take(5.0), bucket.take(10.0)] == [0.0, pytest.approx(5.0), 0.0]


async def test_a_caller_gets_its_rate_and_others_theirs() -> None:
    """By the name in its certificate, in whatever case; who has no rate, and who has no name, has no limit here."""
    app = App()
    app.may_end.set()
    limits = settings(caller_rate={"Orchestrator-api": 0.001, "research-api": 100})
    with Shedding(limits) as shedding:
        async with client(shedding, app, "orchestrator-API") as limited:
            assert (await limited.post("/")).status_code == 200
            declined = await limited.post("/")
            check_declined(declined, "rate")
            assert 900 < int(declined.headers["Retry-After"]) <= 1_000
            assert "orchestrator-API sends more than the 0.001 requests a second" in declined.json()["detail"]
            assert (await limited.get("/health")).status_code == 200
        for other in ("research-api", "backend-api", None):
            async with client(shedding, app, other) as caller:
                assert {(await caller.get("/")).status_code for _ in range(10)} == {200}
    assert shedding.counts == {"rate": 1}


async def test_a_limit_that_limits_nobody_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Once: without certificates no caller has a name, and an operator would think that the limit holds."""
    app = App()
    app.may_end.set()
    with Shedding(settings(caller_rate={"a": 1})) as shedding, caplog.at_level(logging.WARNING, "registry"):
        async with client(shedding, app) as caller:
            await caller.get("/health")
            assert caplog.records == []
            for _ in range(3):
                await caller.get("/")
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == ["SERVICE_CALLER_RATE limits nobody"]


@pytest.mark.parametrize("scope", [{}, {"state": None}, {"state": {}}, {"state": {"caller": None}}])
def test_no_name_is_none(scope: dict[str, Any]) -> None:
    """Whatever the server, a request that nobody has verified has no caller."""
    assert caller_of(scope) is None


# -- the settings ------------------------------------------------------------------------------------------------------


def test_nothing_is_shed_unless_asked_for() -> None:
    """By default requests are not even counted."""
    state = State()
    with shedding(state, settings()):
        assert state.shedding is None
    assert not hasattr(state, "shedding")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SERVICE_SHED_LAG", "0.1"),
        ("SERVICE_MAX_IN_FLIGHT", "1000"),
        ("SERVICE_CALLER_RATE", "orchestrator-api=100, research-api=0.5"),
        ("SERVICE_CALLER_RATE", "orchestrator-api=1,"),
    ],
)
def test_variables_ask_for_it(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    """Each of them alone."""
    monkeypatch.setenv(variable, value)
    state = State()

    async def run() -> None:
        with shedding(state, settings()):
            assert isinstance(state.shedding, Shedding)

    asyncio.run(run())


def test_rates_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs, separated by commas; blanks don't matter."""
    monkeypatch.setenv("SERVICE_CALLER_RATE", " orchestrator-api = 100, research-api=0.5")
    assert settings().caller_rate == {"orchestrator-api": 100.0, "research-api": 0.5}
    monkeypatch.setenv("SERVICE_CALLER_RATE", "")
    assert settings().caller_rate == {}


@pytest.mark.parametrize(
    "value", ["orchestrator-api", "=100", "a_b=1", "a=0", "a=-1", "a=nan", "a=inf", "a=1e9", "a=1=2", "100", "a=ten"]
)
def test_rates_that_are_none_say_so(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """The app does not start with a limit that nobody meant."""
    monkeypatch.setenv("SERVICE_CALLER_RATE", value)
    with pytest.raises((InvalidInputError, ValidationError), match=r"is not a (rate|service name)"):
        settings()


@pytest.mark.parametrize("fields", [{"shed_lag": -1}, {"shed_lag": "nan"}, {"max_in_flight": -1}])
def test_limits_that_are_none_say_so(fields: dict[str, Any]) -> None:
    """Likewise."""
    with pytest.raises(ValidationError):
        settings(**fields)


# -- in a service ------------------------------------------------------------------------------------------------------


async def test_one_record_for_many_declined(caplog: pytest.LogCaptureFixture) -> None:
    """Overload must not fill the log, too."""
    with Shedding(settings(max_in_flight=1)) as shedding, caplog.at_level(logging.WARNING, "registry"):
        shedding.in_flight = 1
        async with client(shedding, App()) as caller:
            for _ in range(20):
                await caller.get("/")
    assert [record.getMessage() for record in caplog.records] == [
        "declining requests, for too many come (in-flight); this is said once in 10 s"
    ]


@pytest.mark.parametrize("around", [False, True], ids=["added", "around the app"])
async def test_a_service_sheds(consul_agent: ConsulAgent, service_name: str, around: bool) -> None:
    """In a real server with the middleware: signed, counted for Prometheus, and Consul's check goes on passing."""
    limits = settings(
        name=service_name, port=free_ports(1)[0], address="127.0.0.1", max_in_flight=1, health_check_interval=0.5
    )
    consul = ConsulSettings(host="127.0.0.1", port=consul_agent.http_port)
    service, may_end = FastAPI(lifespan=lifespan(limits, consul=consul)), asyncio.Event()
    for router in (health_router(), metrics_router(), state_router()):
        service.include_router(router)

    @service.get("/slow")
    async def slow() -> str:
        await may_end.wait()
        return "done"

    if not around:
        service.add_middleware(RegistryMiddleware)
    server = uvicorn.Server(
        uvicorn.Config(RegistryMiddleware(service) if around else service, port=limits.port, log_level="error")
    )
    running = asyncio.create_task(server.serve())
    await asyncio.to_thread(wait_until, lambda: server.started and found(consul_agent, service_name))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{limits.port}", trust_env=False) as caller:
        waiting = asyncio.create_task(caller.get("/slow"))
        await asyncio.to_thread(wait_until, lambda: service.state.shedding.in_flight == 1)
        declined = await caller.post("/anything", content=b"x" * 100_000)
        check_declined(declined, "in-flight")
        assert declined.headers["X-Service-Instance"] == f"{service_name}-127.0.0.1-{limits.port}"
        assert (await caller.get("/health")).status_code == 200
        assert (await caller.get("/registry/state")).status_code == 200
        families = text_string_to_metric_families((await caller.get("/metrics")).text)
        counted = {
            (sample.name, sample.labels.get("reason")): sample.value for each in families for sample in each.samples
        }
        assert counted["registry_shed_total", "in-flight"] == 1
        may_end.set()
        assert (await waiting).json() == "done"
    server.should_exit = True
    await running
