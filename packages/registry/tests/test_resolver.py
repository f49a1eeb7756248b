"""The live view on a real Consul: when it waits, what it costs, and what it keeps when Consul lets it down."""

import asyncio
import contextvars
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from urllib.parse import quote

import httpx
import psutil
import pytest

from registry import (
    ConsulResolver,
    ConsulSettings,
    Instance,
    InvalidInputError,
    RegistryError,
    RegistryUnavailableError,
    ServiceDiscoveryClient,
    ServiceNotFoundError,
    ServiceRegistry,
    StaticResolver,
)
from registry.testing.agent import running_agent
from registry.testing.fixtures import ConsulAgent, Instances
from tests.support.server import Answer, Request, Serve


def settings_for(agent: ConsulAgent, token: str | None = None) -> ConsulSettings:
    """The way to this agent, whatever the environment says."""
    return ConsulSettings.model_validate({"host": "127.0.0.1", "port": agent.http_port, "token": token or agent.token})


@asynccontextmanager
async def resolving(agent: ConsulAgent, *upstreams: str, **options: float) -> AsyncIterator[ConsulResolver]:
    """A started resolver, closed at the end."""
    resolver = ConsulResolver(settings_for(agent), upstreams=upstreams, **options)  # type: ignore[arg-type]
    await resolver.start()
    try:
        yield resolver
    finally:
        await resolver.aclose()


async def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Return once the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        await asyncio.sleep(0.01)


def connections(agent: ConsulAgent) -> int:
    """How many this process holds to the agent."""
    held = psutil.Process().net_connections("tcp")
    return sum(
        bool(each.raddr) and each.raddr[1] == agent.http_port and each.status == psutil.CONN_ESTABLISHED
        for each in held
    )


def watches() -> set[asyncio.Task[object]]:
    """The watches of this event loop."""
    return {task for task in asyncio.all_tasks() if task.get_name().startswith("registry watch")}


@contextmanager
def registered(registry: ServiceRegistry, name: str, count: int) -> Iterator[list[str]]:
    """So many addresses under this name, healthy for ever: nothing checks them, nobody answers there."""
    ids = [f"{name}-{number}" for number in range(count)]
    with httpx.Client(base_url=registry.settings.url, trust_env=False) as consul:
        for number, service_id in enumerate(ids):
            body = {"Name": name, "ID": service_id, "Address": "10.1.1.1", "Port": 8000 + number}
            consul.put("/v1/agent/service/register", json=body).raise_for_status()
        yield ids
        for service_id in ids:
            consul.put(f"/v1/agent/service/deregister/{quote(service_id, safe='')}")


async def test_a_thousand_callers_share_one_question(
    consul_agent: ConsulAgent, service_registry: ServiceRegistry, service_name: str
) -> None:
    """However many ask for a service, one question is parked at Consul; another tag is another question."""
    with registered(service_registry, service_name, 2):
        before = connections(consul_agent)
        async with resolving(consul_agent) as resolver:
            await asyncio.gather(*(resolver.ready(service_name) for _ in range(1_000)))
            views = {id(resolver.resolve(service_name)) for _ in range(1_000)}
            assert len(views) == 1
            assert len(watches()) == 1
            await wait_until(lambda: connections(consul_agent) == before + 1)
            await resolver.ready(service_name, "blue")
            assert len(watches()) == 2
            with pytest.raises(ServiceNotFoundError):
                resolver.resolve(service_name, "blue")
        assert watches() == set()
        await wait_until(lambda: connections(consul_agent) == before)


async def test_calls_ask_consul_nothing(serve: Serve, instances: Instances) -> None:
    """In steady state the only request to Consul is the one that is parked there."""
    (one,) = instances("quiet")
    entry = (
        '[{"Node": {"Address": ""}, "Service": {"ID": "quiet-1", "Service": "quiet", "Address": "127.0.0.1", '
        f'"Port": {one.instance.port}, "Tags": [], "Meta": {{}}, "Weights": {{"Passing": 1}}}}, "Checks": []}}]'
    )
    over = threading.Event()

    def consul(request: Request) -> Answer:
        if "index" in request.target:
            over.wait(30)
        return Answer(200, entry.encode(), {"X-Consul-Index": "5"})

    server = serve(consul)
    resolver = ConsulResolver(ConsulSettings(host="127.0.0.1", port=server.port, token=None), upstreams=["quiet"])
    try:
        await resolver.start()
        async with ServiceDiscoveryClient(resolver) as client:

            async def call() -> None:
                for _ in range(100):
                    await client.get("quiet", "/")

            await asyncio.gather(*(call() for _ in range(20)))
        assert len(server.requests) == 2
        assert one.stats().requests == 2_000
    finally:
        over.set()


async def test_only_the_first_question_about_a_service_waits(serve: Serve) -> None:
    """An unknown name waits for one answer and no longer; from then on the view answers without waiting."""
    answering = threading.Event()

    def consul(request: Request) -> Answer:
        (over if "index" in request.target else answering).wait(30)
        return Answer(200, b"[]", {"X-Consul-Index": "5"})

    over = threading.Event()
    server = serve(consul)
    resolver = ConsulResolver(ConsulSettings(host="127.0.0.1", port=server.port, token=None))
    try:
        assert resolver.resolve("cards") is None
        first = asyncio.ensure_future(resolver.ready("cards"))
        await wait_until(lambda: len(server.requests) == 1)
        assert not first.done()
        answering.set()
        await first
        await wait_until(lambda: len(server.requests) == 2)  # Consul is silent now
        for _ in range(1_000):
            with pytest.raises(ServiceNotFoundError):
                resolver.resolve("cards")
        await resolver.ready("cards")
    finally:
        answering.set()
        over.set()
        await resolver.aclose()
    assert len(server.requests) == 2


async def test_a_silent_consul_holds_the_first_call_up_for_the_stated_time_only(
    private_consul_agent: ConsulAgent,
) -> None:
    """A Consul that hangs makes the first call fail clearly after `first_answer_timeout`, and work once it goes on."""
    private_consul_agent.pause()
    async with resolving(private_consul_agent, first_answer_timeout=0.3) as resolver:
        started = time.monotonic()
        with pytest.raises(RegistryUnavailableError, match=r"did not say within 0\.3 s who runs 'consul'"):
            await resolver.ready("consul")
        assert 0.3 <= time.monotonic() - started < 1.5
        private_consul_agent.resume()
        await wait_until(lambda: resolver.resolve("consul") is not None)


async def test_declared_upstreams_are_warm_after_start(
    consul_agent: ConsulAgent, service_registry: ServiceRegistry, service_name: str
) -> None:
    """`start` returns with the view in memory; a declared name that nobody runs does not hold it up."""
    with registered(service_registry, service_name, 3) as ids:
        async with resolving(consul_agent, service_name, f"{service_name}-nobody") as resolver:
            assert [instance.id for instance in resolver.resolve(service_name) or ()] == ids
            with pytest.raises(ServiceNotFoundError):
                resolver.resolve(f"{service_name}-nobody")


async def test_start_goes_on_without_consul(service_name: str, caplog: pytest.LogCaptureFixture) -> None:
    """With Consul down the app starts; its upstream is then unavailable, which is not "not found"."""
    resolver = ConsulResolver(ConsulSettings(host="127.0.0.1", port=9, token=None), upstreams=[service_name])
    await resolver.start()
    try:
        with pytest.raises(RegistryUnavailableError):
            resolver.resolve(service_name)
        assert "can't be reached" in (resolver.view(service_name).error or "")
    finally:
        await resolver.aclose()


async def test_nonexistent_names_leave_no_watches(
    consul_agent: ConsulAgent, service_registry: ServiceRegistry, service_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many names that nobody runs are bounded and push out no service that is run; what nobody asks for ends."""
    monkeypatch.setattr("registry.consul.watch.WAIT", 1)
    names = [f"{service_name}-{number}" for number in range(300)]
    with registered(service_registry, service_name, 1):
        async with resolving(consul_agent, "consul", max_watches=10, idle_timeout=3.0) as resolver:
            await resolver.ready(service_name)
            for name in names:
                await resolver.ready(name)
                with pytest.raises(ServiceNotFoundError):
                    resolver.resolve(name)
                assert resolver.resolve(service_name)
                assert len(watches()) <= 11 + 1  # one declared, and one that may still be ending
            # All at once: each gets its answer, or is told at once that it was pushed out.
            await asyncio.wait_for(asyncio.gather(*map(resolver.ready, names)), 5.0)
            await wait_until(lambda: len(watches()) == 1)
            assert resolver.resolve("consul")


async def test_the_view_is_the_same_object_until_it_changes(
    consul_agent: ConsulAgent, service_registry: ServiceRegistry, service_name: str
) -> None:
    """Returns of the parked question that bring nothing new keep the tuple; a real change is seen at once."""
    with registered(service_registry, service_name, 2) as ids:
        async with resolving(consul_agent, service_name) as resolver:
            known = resolver.resolve(service_name)
            heard = resolver._watches[service_name, None, None].heard_at
            # A check at the node, or an instance that does not pass, wakes the question but changes nothing.
            service_registry.register_service(service_name, "10.2.2.2", 9, service_id=f"{service_name}-critical")
            await wait_until(lambda: resolver._watches[service_name, None, None].heard_at != heard)
            assert resolver.view(service_name).registered == 3
            assert resolver.resolve(service_name) is known
            service_registry.deregister_service(f"{service_name}-critical")
            service_registry.deregister_service(ids[0])
            await wait_until(lambda: [each.id for each in resolver.resolve(service_name) or ()] == ids[1:], 2.0)


async def test_a_token_that_lost_its_rights_keeps_the_view(
    service_name: str, monkeypatch: pytest.MonkeyPatch, consul_binary: Path
) -> None:
    """Refused, or shown an empty list for lack of rights, the last view serves on and says why it is old."""
    monkeypatch.setattr("registry.consul.watch.WAIT", 1)
    with (
        running_agent(acl=True, binary=consul_binary, in_memory=True) as agent,
        httpx.Client(base_url=agent.url, headers={"X-Consul-Token": agent.token or ""}, trust_env=False) as consul,
    ):

        def ask(method: str, path: str, body: object = None) -> dict[str, str]:
            answer = consul.request(method, path, json=body).raise_for_status()
            return {} if answer.content in {b"", b"true"} else answer.json()

        def change(number: int) -> None:
            body = {"Name": service_name, "ID": f"{service_name}-{number}", "Address": "10.1.1.1", "Port": number}
            ask("PUT", "/v1/agent/service/register", body)

        change(1)
        rules = 'service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }'
        reading = {"Policies": [{"ID": ask("PUT", "/v1/acl/policy", {"Name": "reads", "Rules": rules})["ID"]}]}
        tokens = [ask("PUT", "/v1/acl/token", reading) for _ in range(2)]
        resolvers = [ConsulResolver(settings_for(agent, token["SecretID"])) for token in tokens]
        try:
            for resolver in resolvers:
                await resolver.ready(service_name)
            ask("PUT", f"/v1/acl/token/{tokens[0]['AccessorID']}", {"Policies": []})
            ask("DELETE", f"/v1/acl/token/{tokens[1]['AccessorID']}")
            # Consul does not wake a question whose token has lost its rights: they show with the next one.
            await wait_until(lambda: all(resolver.view(service_name).error for resolver in resolvers))
            known = [resolver.resolve(service_name) for resolver in resolvers]
            assert all(known)
            change(2)
            for resolver, token, view in zip(resolvers, tokens, known, strict=True):
                error = resolver.view(service_name).error or ""
                assert "denied" in error
                assert token["SecretID"] not in error
                assert resolver.resolve(service_name) is view
            ask("PUT", f"/v1/acl/token/{tokens[0]['AccessorID']}", reading)
            await wait_until(lambda: len(resolvers[0].resolve(service_name) or ()) == 2)
            assert resolvers[0].view(service_name).error is None
        finally:
            for resolver in resolvers:
                await resolver.aclose()


async def test_an_outage_is_told_once_and_shown_on_request(
    private_consul_agent: ConsulAgent, instances: Instances, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls go on through Consul's death with one warning among them; `explain` tells the view's age and the reason."""
    one, two = instances("shown", 2, consul=private_consul_agent, check_interval=None)
    async with (
        resolving(private_consul_agent, "shown") as resolver,
        ServiceDiscoveryClient(resolver) as client,
    ):
        fresh = client.explain("shown")
        assert (fresh.view.source, fresh.view.registered, fresh.view.error) == (private_consul_agent.url, 2, None)
        assert fresh.view.age is not None
        assert fresh.view.age < 2.0
        assert fresh.view.changed is not None
        private_consul_agent.kill()
        await wait_until(lambda: client.explain("shown").view.error is not None)
        began = client.explain("shown").view.age or 0.0
        for _ in range(200):
            await client.get("shown", "/")
        stale = client.explain("shown")
        assert stale.view.age is not None
        assert stale.view.age > began
        assert stale.view.registered == 2
        assert {each.id for each in stale.endpoints} == {one.instance.id, two.instance.id}
        assert sum(each.picks for each in stale.endpoints) == 200
        assert all(each.listed and each.in_flight == 0 and each.ejected_for == 0 for each in stale.endpoints)
        assert [record.levelname for record in caplog.records if record.name == "registry"] == ["WARNING"]
        private_consul_agent.start()
        await wait_until(lambda: client.explain("shown").view.error is None, 5.0)


async def test_a_watch_carries_no_callers_context_and_survives_everything(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task starts in an empty context and takes whatever its step raises within; only cancelling ends it."""
    request_id = contextvars.ContextVar("request_id", default="none")
    seen: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(request_id.get())

    handler = Listening()
    logging.getLogger("registry").addHandler(handler)
    server = serve(lambda _: Answer(500, b"no leader", {"X-Consul-Index": "1"}))
    resolver = ConsulResolver(ConsulSettings(host="127.0.0.1", port=server.port, token=None))
    try:
        request_id.set("the first caller's")
        await resolver.ready("cards")
        (task,) = watches()
        assert seen == ["none"]
        # Not even what no code foresees, such as a bug in the parser, ends it.
        monkeypatch.setattr("registry.consul.watch.Reader", lambda *_, **__: 1 / 0)
        server.answer = lambda _: Answer(200, b"[]", {"X-Consul-Index": "1"})
        await wait_until(lambda: "ZeroDivisionError" in (resolver.view("cards").error or ""))
        assert not task.done()
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        # Whoever cancelled it, the next question begins anew.
        monkeypatch.undo()
        await resolver.ready("cards")
        with pytest.raises(ServiceNotFoundError):
            resolver.resolve("cards")
    finally:
        logging.getLogger("registry").removeHandler(handler)
        await resolver.aclose()
    assert watches() == set()


TWO_LOOPS = """
import asyncio, sys
from registry import ConsulResolver, ServiceDiscoveryClient
client = ServiceDiscoveryClient(ConsulResolver())
async def call():
    return (await client.get(sys.argv[1], "/")).status_code
async def call_and_close():
    async with client:
        return await call()
print(asyncio.run(call()), asyncio.run(call_and_close()))
"""


def test_one_client_serves_two_event_loops_in_a_row(
    consul_agent: ConsulAgent, instances: Instances, service_name: str
) -> None:
    """`asyncio.run` twice with one client works twice: a loop's end takes its watches and connections with it."""
    instances(service_name, consul=consul_agent)
    ran = subprocess.run(
        [sys.executable, "-c", TWO_LOOPS, service_name],
        env={**os.environ, **consul_agent.env()},
        stdout=subprocess.PIPE,
        text=True,
        timeout=30,
        check=True,
    )
    assert ran.stdout == "200 200\n"


@pytest.mark.parametrize("form", ["{}_x", "{}.x", "team/{}", "{}//x", "{} é?x=1&y#z%2F", "{}" + 64 * "x", "Team-{}"])
async def test_other_peoples_names_are_found(
    consul_agent: ConsulAgent, service_registry: ServiceRegistry, service_name: str, form: str
) -> None:
    """Whatever Consul lets others call their services, they are watched and looked up under that name, in any case."""
    name = form.format(service_name)
    with registered(service_registry, name, 1):
        async with resolving(consul_agent, name.upper()) as resolver:
            known = resolver.resolve(name)
            assert [instance.service for instance in known or ()] == [name]
            for spelled in (name.lower(), name.upper(), name.title()):
                await resolver.ready(spelled)
                assert resolver.resolve(spelled) is known
                assert resolver.view(spelled).registered == 1
            assert len(watches()) == 1
            (task,) = watches()
            assert task.get_name() == f"registry watch {name.lower()}"
        for spelled in (name, name.lower(), name.upper()):
            assert [instance.service for instance in service_registry.discover_service(spelled)] == [name]
            assert service_registry.get_service_url(spelled) == "http://10.1.1.1:8000"


async def test_a_fixed_answer_ignores_case_too() -> None:
    """One name and one list, however it is spelled, with a tag or without."""
    blue = Instance("a", "Cards", "10.0.0.1", 8000, tags=["blue"])
    resolver = StaticResolver({"Cards": [blue, Instance("b", "Cards", "10.0.0.2", 8000)]})
    for name in ("cards", "CARDS", "Cards"):
        assert len(resolver.resolve(name)) == 2
        assert resolver.resolve(name, "blue") is resolver.resolve("cards", "blue")
        assert resolver.resolve(name, "blue") == (blue,)
        assert resolver.view(name).registered == 2


@pytest.mark.parametrize("name", ["a/../b", "..", ".", "a\nb", "", "a" * 513])
async def test_a_name_that_can_not_be_right_is_never_asked(consul_agent: ConsulAgent, name: str) -> None:
    """Nothing is watched for it."""
    async with resolving(consul_agent) as resolver:
        with pytest.raises(InvalidInputError):
            await resolver.ready(name)
        with pytest.raises(RegistryError):
            await resolver.ready("cards", tag="a\nb")
        assert watches() == set()
