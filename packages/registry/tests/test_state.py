"""``/registry/state``: what an instance tells of those that it calls, of itself, and of what has happened."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI

from registry import ConsulSettings, RegistryUnavailableError, ServiceRegistry, ServiceSettings
from registry.fastapi import health_router, lifespan, state_router
from registry.telemetry import Event
from registry.testing.fixtures import ConsulAgent, Instances
from registry.testing.ports import free_ports
from tests.support.command import wait_until


@pytest.fixture
def app() -> FastAPI:
    """With the router."""
    app = FastAPI(version="7.1")
    app.include_router(health_router())
    app.include_router(state_router())
    return app


@pytest.fixture
async def ask(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Asks it, within this process."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        yield client


async def test_all_that_calls_came_to_is_told(
    app: FastAPI, ask: httpx.AsyncClient, consul_agent: ConsulAgent, instances: Instances, service_name: str
) -> None:
    """Counts by outcome and reason, the ejection with its cause, the last failure, the view, and the event."""
    one, two = instances(service_name, 2, consul=consul_agent)
    consul = ConsulSettings(host="127.0.0.1", port=consul_agent.http_port)
    settings = ServiceSettings(name=f"{service_name}-caller", port=free_ports(1)[0], address="127.0.0.1", zone="a")
    async with lifespan(settings, upstreams=[service_name], consul=consul)(app):
        call = app.state.discovery_client
        two.kill()
        calls = 0
        # Side by side, so that both are busy and both are picked.
        while not any(endpoint.ejected_because for endpoint in call.explain(service_name).endpoints):
            assert calls < 800
            calls += 8
            await asyncio.gather(*(call.get(service_name, "/health") for _ in range(8)))
        told = (await ask.get("/registry/state")).json()
        [upstream] = told["upstreams"]
        assert (upstream["service"], upstream["tag"], upstream["calls"]) == (service_name, None, {"ok": calls})
        assert upstream["budget"].keys() == {"left", "exhausted"}
        assert upstream["view"]["source"] == consul_agent.url
        zones = {"own": "a", "kept": 0.0, "spilled": {"zone_few": 1.0}, "own_picks": 0}
        assert upstream["zones"] == zones | {"other_picks": sum(each["picks"] for each in upstream["endpoints"])}
        assert {each["zone"] for each in upstream["endpoints"]} == {None}
        seen = {endpoint["id"]: endpoint for endpoint in upstream["endpoints"]}
        left, dead = seen[one.instance.id], seen[two.instance.id]
        assert (left["outcomes"], dead["outcomes"].keys()) == ({"ok": calls}, {"refused"})
        refused = dead["outcomes"]["refused"]
        assert (upstream["retries"], dead["picks"], left["picks"]) == ({"refused": refused}, refused, calls)
        assert (dead["ejected_because"], dead["ejections"].keys()) == ("refused", {"refused"})
        assert dead["ejected_for"] > 0
        assert dead["last_failure"]["outcome"] == "refused"
        assert sum(left["picked"].values()) == left["picks"]
        kinds = [(event["kind"], event["instance"], event["reason"]) for event in told["events"]]
        assert ("ejected", two.instance.id, "refused") in kinds
        newer = (await ask.get("/registry/state", params={"after": told["events"][-2]["number"]})).json()["events"]
        assert newer == [told["events"][-1]]


async def test_it_tells_of_itself(app: FastAPI, ask: httpx.AsyncClient, consul_agent: ConsulAgent) -> None:
    """Who it is, whether it is registered and why, whether it leaves; Consul is told where to ask."""
    consul = ConsulSettings(host="127.0.0.1", port=consul_agent.http_port)
    settings = ServiceSettings(name="self-told", port=free_ports(1)[0], address="127.0.0.1")
    async with lifespan(settings, consul=consul)(app):
        before = (await ask.get("/registry/state")).json()["instance"]
        assert (before["registered"], before["leaving"], before["registrations"]) == (False, False, {})
        assert (before["version"], before["started"] > 1.7e9) == ("7.1", True)
        registration = app.state.registrar.registration
        await asyncio.to_thread(wait_until, lambda: app.state.registrar.registration is not None)
        registration = app.state.registrar.registration
        assert registration.meta["state_path"] == "/registry/state"
        app.state.registrar.standing.written(registration)
        told = (await ask.get("/registry/state")).json()
        assert told["instance"]["id"] == f"self-told-127.0.0.1-{settings.port}"
        assert told["instance"]["service"] == "self-told"
        assert told["instance"]["registrations"] == {"started": 1}
        assert [event["kind"] for event in told["events"]][-1] == "registered"
        await app.state.registrar.withdraw()
        assert (await ask.get("/registry/state")).json()["instance"]["leaving"] is True


async def test_only_the_last_200_events_are_kept(app: FastAPI, ask: httpx.AsyncClient) -> None:
    """However much happens, the answer stays small, and numbers tell what was missed."""
    async with lifespan(ServiceSettings(name="eventful", port=free_ports(1)[0], address="127.0.0.1"))(app):
        for number in range(1000):
            app.state.journal.happened(Event("ejected", "x", f"x-{number}"))
        answer = await ask.get("/registry/state")
    numbers = [event["number"] for event in answer.json()["events"]]
    assert numbers == list(range(801, 1001))


@pytest.mark.parametrize("query", ["after=-1", "after=x"])
async def test_nonsense_is_refused(ask: httpx.AsyncClient, query: str) -> None:
    """A question that can't be right is 422."""
    assert (await ask.get(f"/registry/state?{query}")).status_code == 422


async def test_without_a_lifespan_it_says_so(ask: httpx.AsyncClient) -> None:
    """An app that registers nothing and calls nobody has an empty state; it can only be read."""
    told = (await ask.get("/registry/state")).json()
    assert (told["instance"]["id"], told["upstreams"], told["events"]) == (None, [], [])
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert (await ask.request(method, "/registry/state")).status_code == 405
    assert "/registry/state" not in json.dumps((await ask.get("/openapi.json")).json())


async def test_names_are_told_when_somebody_comes_or_goes(consul_agent: ConsulAgent, service_name: str) -> None:
    """All services at once; then again as soon as an instance was registered, and when it left."""
    resolver = ServiceRegistry("127.0.0.1", consul_agent.http_port).resolver()
    with ServiceRegistry("127.0.0.1", consul_agent.http_port) as registry:
        names = resolver.names()
        assert service_name not in await anext(names)
        following = asyncio.ensure_future(anext(names))
        instance = await asyncio.to_thread(registry.register_service, service_name, "127.0.0.1", 1, tags=["blue"])
        told = await asyncio.wait_for(following, 10)
        while service_name not in told:
            told = await asyncio.wait_for(anext(names), 10)
        assert told[service_name] == ("blue",)
        await asyncio.to_thread(registry.deregister_service, instance)
        while service_name in await asyncio.wait_for(anext(names), 10):
            pass
    await resolver.aclose()


async def _last(names: AsyncIterator[object]) -> None:
    async for _ in names:
        pass


async def test_names_fail_when_consul_is_away(private_consul_agent: ConsulAgent) -> None:
    """An outage is an error of its own, and a new question works once Consul is back."""
    resolver = ServiceRegistry("127.0.0.1", private_consul_agent.http_port).resolver()
    names = resolver.names()
    await anext(names)
    await asyncio.to_thread(private_consul_agent.stop)
    with pytest.raises(RegistryUnavailableError):
        await asyncio.wait_for(_last(names), 10)
    await asyncio.to_thread(private_consul_agent.start)
    assert "consul" in await anext(resolver.names())
    await resolver.aclose()
