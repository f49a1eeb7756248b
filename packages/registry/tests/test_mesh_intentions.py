"""Intentions are decided here as Consul's agent decides them, and never older than Consul lets us know."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
from pydantic import SecretStr

from registry import ConsulSettings
from registry.mesh.intentions import Intentions
from registry.testing.fixtures import ConsulAgent
from tests.support.mesh import admin, intend, token_for

pytestmark = pytest.mark.real

Rules = list[dict[str, object]]
NAMES = ("a-api", "b-api", "c-api", "d-api")


def settings_of(consul: ConsulAgent, token: str | None = None) -> ConsulSettings:
    secret = token or consul.token
    return ConsulSettings(host="127.0.0.1", port=consul.http_port, token=SecretStr(secret) if secret else None)


@asynccontextmanager
async def watched(service: str, settings: ConsulSettings) -> AsyncIterator[Intentions]:
    """Known as soon as the context is entered."""
    async with Intentions(service, settings) as intentions:
        async with asyncio.timeout(10):
            await intentions.ready.wait()
        yield intentions


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> float:
    """After how many seconds it holds."""
    begun = time.perf_counter()
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # what it looks at tells nobody
            await asyncio.sleep(0.001)
    return time.perf_counter() - begun


@pytest.mark.parametrize("policy", ["allow", "deny"])
async def test_decides_as_the_agent_does(
    fresh_consul_agent: ConsulAgent, fresh_locked_agent: ConsulAgent, policy: str
) -> None:
    """50 random sets of intentions, two callers each, without ACLs and with: the same as /agent/connect/authorize."""
    consul, rng = (fresh_consul_agent if policy == "allow" else fresh_locked_agent), random.Random(policy)
    answers, differences = [], []
    with admin(consul) as http:
        for number in range(50):
            # A new destination each time: the agent caches a list, and after some changes in a row tells an old one.
            service, rules, everywhere = f"fuzz-{number}", some_rules(rng), some_rules(rng)[:1]
            for destination, written in {service: rules, "*": plainly(everywhere)}.items():
                await asyncio.to_thread(write, http, destination, written)
            async with watched(service, settings_of(consul)) as intentions:
                for name in rng.sample(NAMES, 2):
                    told = await asyncio.to_thread(authorize, http, service, name)
                    answers.append(told)
                    if told != intentions.allows(name):
                        differences.append((name, told, rules, everywhere))
    assert differences == []
    assert len(answers) == 100
    assert 10 < sum(answers) < 90


def some_rules(rng: random.Random) -> Rules:
    """For some of the names and perhaps for all others."""
    rules: Rules = []
    for name in rng.sample([*NAMES, "*"], rng.randint(0, 4)):
        action = rng.choice(["allow", "deny"])
        permission = {"Permissions": [{"Action": action, "HTTP": {"PathPrefix": "/"}}]}
        rules.append({"Name": name, **(permission if rng.random() < 0.3 else {"Action": action})})
    return rules


def plainly(rules: Rules) -> Rules:
    """Without permissions, which a wildcard destination can't have."""
    return [{"Name": rule["Name"], "Action": rule.get("Action", "deny")} for rule in rules]


def write(http: httpx.Client, destination: str, rules: Rules) -> None:
    if destination != "*":
        defaults = {"Kind": "service-defaults", "Name": destination, "Protocol": "http"}
        http.put("/v1/config", json=defaults).raise_for_status()
    if rules:
        entry = {"Kind": "service-intentions", "Name": destination, "Sources": rules}
        http.put("/v1/config", json=entry).raise_for_status()
    else:
        http.delete(f"/v1/config/service-intentions/{destination}").raise_for_status()


def authorize(http: httpx.Client, service: str, name: str) -> bool:
    domain = http.get("/v1/agent/connect/ca/roots").json()["TrustDomain"]
    uri = f"spiffe://{domain}/ns/default/dc/dc1/svc/{name}"
    question = {"Target": service, "ClientCertURI": uri, "ClientCertSerial": "0a"}
    answer = http.post("/v1/agent/connect/authorize", json=question)
    answer.raise_for_status()
    return bool(answer.json()["Authorized"])


async def test_names_know_no_case(consul_agent: ConsulAgent) -> None:
    """Consul ignores the case of names, and so does the decision."""
    intend(consul_agent, "case-api", {"Orders-API": "deny"})
    async with watched("Case-API", settings_of(consul_agent)) as intentions:
        assert not intentions.allows("orders-api")
        assert not intentions.allows("ORDERS-api")
        assert intentions.allows("others-api")


async def test_rules_about_other_clusters_count_for_nobody_here(consul_agent: ConsulAgent) -> None:
    """A service of a peer may have the name of one of ours."""
    with admin(consul_agent) as http:
        sources = [{"Name": "orders", "Peer": "east", "Action": "allow"}, {"Name": "*", "Action": "deny"}]
        write(http, "peer-api", [dict(source) for source in sources])
    async with watched("peer-api", settings_of(consul_agent)) as intentions:
        assert not intentions.allows("orders")


async def test_last_list_serves_on_while_consul_is_away(private_consul_agent: ConsulAgent) -> None:
    """Killed: what was denied stays denied, what was allowed allowed. Back: a change of that time arrives."""
    intend(private_consul_agent, "kept-api", {"friend": "allow", "*": "deny"})
    async with watched("kept-api", settings_of(private_consul_agent)) as intentions:
        await asyncio.to_thread(private_consul_agent.kill)
        await until(lambda: intentions.complaint is not None)
        assert intentions.allows("friend")
        assert not intentions.allows("foe")
        await asyncio.to_thread(private_consul_agent.start)
        await until(lambda: intentions.complaint is None, 20)
        assert intentions.allows("friend")
        intend(private_consul_agent, "kept-api", {"friend": "deny", "*": "deny"})
        await until(lambda: not intentions.allows("friend"))


async def test_nobody_is_let_in_before_anything_is_known(caplog: pytest.LogCaptureFixture) -> None:
    """No Consul: denied, whatever the default will be; said once, not with each attempt."""
    async with Intentions("new-api", ConsulSettings(host="127.0.0.1", port=1)) as intentions:
        await until(lambda: bool(caplog.records))
        await asyncio.sleep(0.5)
        assert not intentions.allows("anybody")
        assert "can't be reached" in str(intentions.complaint)
    assert [record.message.split(":")[0] for record in caplog.records if record.name == "registry"] == [
        "no news of the intentions; nobody is let in until they are known, and this is tried again every 2 s"
    ]


async def test_right_to_the_own_service_is_enough(fresh_locked_agent: ConsulAgent) -> None:
    """service:write on the own name reads its intentions, and no other's: that is refused, and nothing let in."""
    token = token_for(fresh_locked_agent, 'service "mine-api" { policy = "write" }')
    intend(fresh_locked_agent, "mine-api", {"friend": "allow"})
    async with watched("mine-api", settings_of(fresh_locked_agent, token)) as intentions:
        assert intentions.allows("friend")
        assert not intentions.allows("foe")
    async with Intentions("other-api", settings_of(fresh_locked_agent, token)) as intentions:
        await until(lambda: "ermission denied" in str(intentions.complaint))
        assert not intentions.allows("friend")
