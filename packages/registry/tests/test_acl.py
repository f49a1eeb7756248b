"""Tokens that change while everything runs, and denials that say which right is missing: a Consul that denies."""

import asyncio
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from registry import ConsulResolver, ConsulSettings, RegistryError, ServiceDiscoveryClient, ServiceRegistry
from registry.consul.connection import AsyncConsul, SyncConsul, consul_errors
from registry.consul.rights import advice, needed
from registry.presence.entry import Entry
from registry.presence.registration import Registration
from registry.testing.acl import AclToken
from registry.testing.fixtures import ConsulAgent
from tests.support.command import found, running_service, wait_until
from tests.support.server import Answer, Request, Serve

HERE = Path(__file__).parent
OWN = 'service "{0}" {{ policy = "write" }} node_prefix "" {{ policy = "read" }}'
READS = 'service "{0}" {{ policy = "read" }} node_prefix "" {{ policy = "read" }}'


def put(file: Path, token: AclToken) -> None:
    """Replaces the token as one should: readers see the old one or the new one, never half of either."""
    new = file.with_suffix(".new")
    new.write_text(token.secret)
    new.rename(file)


def settings_of(agent: ConsulAgent, token: str | None = None, file: Path | None = None) -> ConsulSettings:
    """Leads to the agent, whatever the environment says."""
    given = {"host": "127.0.0.1", "port": agent.http_port, "token": token, "token_file": file}
    return ConsulSettings.model_validate(given)


async def apart(condition: Callable[[], object], seconds: float = 10.0) -> float:
    """`wait_until`, beside the event loop."""
    return await asyncio.to_thread(wait_until, condition, seconds)


# -- rotation ----------------------------------------------------------------------------------------------------------


async def test_tokens_rotate_under_load(locked_consul_agent: ConsulAgent, tmp_path: Path, service_name: str) -> None:
    """The tokens of a service and of its caller are replaced and ended while calls run: none fails.

    The caller's watch goes on; the agent tells the servers of the instance's health with the new token, its check is
    never seen other than passing meanwhile, nor passing again by the rotation once it fails.
    """
    acl, name = locked_consul_agent.acl, service_name
    files = {"service": tmp_path / "service", "caller": tmp_path / "caller"}
    rules = {"service": OWN.format(name), "caller": READS.format(name)}
    tokens = {who: acl.token(rules[who]) for who in files}
    for who, file in files.items():
        put(file, tokens[who])

    def rotate(who: str) -> AclToken:
        old, tokens[who] = tokens[who], acl.token(rules[who])
        put(files[who], tokens[who])
        return old

    env = {"CONSUL_HTTP_TOKEN": "", "CONSUL_HTTP_TOKEN_FILE": str(files["service"])}
    env |= {"SERVICE_HEALTH_CHECK_INTERVAL": "0.5"}
    failures: list[Exception] = []
    calls = 0
    resolver = ConsulResolver(settings_of(locked_consul_agent, file=files["caller"]), upstreams=[name])

    async def keep_calling(client: ServiceDiscoveryClient) -> None:
        nonlocal calls
        while True:
            calls += 1
            try:
                await client.get(name, "/pid")
            except Exception as error:
                failures.append(error)
            await asyncio.sleep(0.01)

    with running_service("presence_app:app", name, consul=locked_consul_agent, cwd=HERE, env=env) as one:
        await apart(one.is_found)
        async with ServiceDiscoveryClient(resolver) as client:
            await resolver.start()
            known = resolver.resolve(name)
            callers = [asyncio.create_task(keep_calling(client)) for _ in range(4)]
            for times in (1, 2):
                old = [rotate("service"), rotate("caller")]
                await apart(lambda times=times: one.log.count("with the new token") == times)  # type: ignore[misc]
                for token in old:
                    await asyncio.to_thread(acl.delete, token)
                await apart(lambda most=calls + 50: calls > most, 60)  # type: ignore[misc]
            assert resolver.resolve(name) is known
            # A parked question whose token is gone is asked anew, and hears of this.
            with ExitStack() as stack:
                service = running_service("presence_app:app", name, consul=locked_consul_agent, cwd=HERE, env=env)
                another = await asyncio.to_thread(stack.enter_context, service)
                await apart(lambda: len(resolver.resolve(name) or ()) == 2)
                await asyncio.to_thread(another.end, signal.SIGTERM)
            await apart(lambda: resolver.resolve(name) == known)
            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)
            assert failures == []
            assert resolver.view(name).errors == 0
        assert "registration failed" not in one.log
        (one.directory / "sick").touch()
        await apart(lambda: not one.is_found())
        old_service = rotate("service")
        await apart(lambda: one.log.count("with the new token") == 3)
        acl.delete(old_service)
        assert not one.is_found()
        (one.directory / "sick").unlink()
        await apart(one.is_found)
        one.end(signal.SIGTERM)
        assert found(locked_consul_agent, name, passing=False) == []


def test_a_wrong_token_takes_nobody_out(locked_consul_agent: ConsulAgent, tmp_path: Path, service_name: str) -> None:
    """A new token without the right leaves the instance registered with the old one, and the log names the line."""
    acl, file = locked_consul_agent.acl, tmp_path / "token"
    put(file, acl.token(OWN.format(service_name)))
    env = {"CONSUL_HTTP_TOKEN": "", "CONSUL_HTTP_TOKEN_FILE": str(file)}
    with running_service("presence_app:app", service_name, consul=locked_consul_agent, cwd=HERE, env=env) as one:
        wait_until(one.is_found)
        put(file, acl.token(READS.format(service_name)))
        wait_until(lambda: "registration failed for now" in one.log)
        assert f"add to a policy of the token: {WRITE.format(service_name)}" in one.log
        assert one.is_found()
        put(file, acl.token(OWN.format(service_name)))
        wait_until(lambda: one.log.count("INFO registered") == 2)
        assert one.is_found()


async def test_the_wrong_order_is_told_and_heals(
    locked_consul_agent: ConsulAgent, tmp_path: Path, service_name: str, sent: list[str]
) -> None:
    """A token that is ended before the file has the new one: the watch says so at once, and is back with the file.

    Consul would answer a question that is parked with the dead token only after its wait, and with an empty list.
    """
    acl, file = locked_consul_agent.acl, tmp_path / "token"
    token = acl.token(OWN.format(service_name))
    put(file, token)
    settings = settings_of(locked_consul_agent, file=file)
    resolver = ConsulResolver(settings, upstreams=[service_name])
    with ServiceRegistry(settings=settings) as registry:
        try:
            registry.register_service(service_name, "10.0.0.1", 8000)
            await resolver.start()
            await apart(lambda: "index=" in sent[-1])
            await asyncio.to_thread(acl.delete, token)
            await apart(lambda: resolver.view(service_name).error, 5)
            put(file, acl.token(OWN.format(service_name)))
            await apart(lambda: resolver.view(service_name).error is None, 5)
            for number in (1, 2):
                await asyncio.to_thread(registry.register_service, service_name, "10.0.0.2", number)
                await apart(lambda number=number: resolver.view(service_name).registered == 1 + number, 5)  # type: ignore[misc]
            for each in registry.discover_service(service_name, passing=False):
                registry.deregister_service(each.id)
        finally:
            await resolver.aclose()


async def test_another_token_is_written_only_where_the_instance_is(
    locked_consul_agent: ConsulAgent, tmp_path: Path, service_name: str
) -> None:
    """An agent that lost the instance does not get it back by a rotation: that is for who looks whether it answers."""
    file = tmp_path / "token"
    put(file, locked_consul_agent.acl.token(OWN.format(service_name)))
    consul = AsyncConsul(settings_of(locked_consul_agent, file=file))
    entry, registration = Entry(consul), Registration(name=service_name, address="10.0.0.1", port=1)
    try:
        await entry.write(registration)
        assert not await entry.is_outdated()
        put(file, locked_consul_agent.acl.token(OWN.format(service_name)))
        assert await entry.is_outdated()
        with ServiceRegistry("127.0.0.1", locked_consul_agent.http_port, locked_consul_agent.token) as operator:
            operator.deregister_service(registration.id)
        assert not await entry.rewrite(registration)
        assert found(locked_consul_agent, service_name, passing=False) == []
        assert await entry.is_outdated()
        await entry.write(registration)
        assert not await entry.is_outdated()
        file.unlink()  # nothing can be said, so nothing is done
        assert not await entry.is_outdated()
        put(file, locked_consul_agent.acl.token(OWN.format(service_name)))
        await entry.remove(registration.id)
    finally:
        await consul.http.close()


DENIALS = {
    "403": Answer(403, b"ACL not found", {"X-Consul-Default-ACL-Policy": "deny"}),
    "403, lacks": Answer(403, b"Permission denied", {"X-Consul-Default-ACL-Policy": "deny"}),
    "500": Answer(500, b"rpc error: code = Unknown desc = ACL not found", {"X-Consul-Default-ACL-Policy": "deny"}),
    "emptied": Answer(200, b"[]", {"X-Consul-Default-ACL-Policy": "deny", "X-Consul-Results-Filtered-By-ACLs": "true"}),
}
LISTED = Answer(200, b"[]", {"X-Consul-Index": "7", "X-Consul-Default-ACL-Policy": "deny"})


async def ask(kind: str, settings: ConsulSettings) -> list[object]:
    """Who serves ``cards``, asked over one kind of connection."""
    with consul_errors(settings):
        if kind == "sync":
            one = SyncConsul(settings)
            try:
                return list(
                    await asyncio.to_thread(one.http.get, lambda answer: [answer.code], "/v1/health/service/cards")
                )
            finally:
                one.http.close()
        other = AsyncConsul(settings)
        try:
            return list(await other.http.get(lambda answer: [answer.code], "/v1/health/service/cards"))
        finally:
            await other.http.close()


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("denial", DENIALS)
async def test_a_denied_request_is_sent_once_more(kind: str, denial: str, serve: Serve, tmp_path: Path) -> None:
    """A token that is replaced between reading and asking costs nobody anything: the second request has the new one."""
    file = tmp_path / "token"
    file.write_text("0ld")

    def answer(request: Request) -> Answer:
        if request.headers["x-consul-token"] == "new":
            return LISTED
        file.write_text("new")
        return DENIALS[denial]

    server = serve(answer)
    settings = ConsulSettings(host="127.0.0.1", port=server.port, token_file=file)
    assert await ask(kind, settings) == [200]
    assert [request.headers["x-consul-token"] for request in server.requests] == ["0ld", "new"]


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize(("place", "requests"), [("argument", 1), ("file", 2)])
async def test_a_second_denial_is_an_error(kind: str, place: str, requests: int, serve: Serve, tmp_path: Path) -> None:
    """A token that stays denied is asked with once more if it may have changed, and then never again."""
    file = tmp_path / "token"
    file.write_text("wr0ng")
    server = serve(lambda _: DENIALS["403"])
    given = {"token": "wr0ng"} if place == "argument" else {"token_file": file}
    settings = ConsulSettings.model_validate({"host": "127.0.0.1", "port": server.port, **given})
    with pytest.raises(RegistryError, match=r'ACL not found; .*service "cards" \{ policy = "read" \}') as caught:
        await ask(kind, settings)
    assert len(server.requests) == requests
    assert "wr0ng" not in f"{caught.value!r} {caught.value.__cause__!r}"


# -- denials -----------------------------------------------------------------------------------------------------------

WRITE = 'service "{}" {{ policy = "write" }}'
READ = 'service "{}" {{ policy = "read" }}'
DONE: dict[str, tuple[Callable[[ServiceRegistry, str, str], object], str]] = {
    "register": (lambda registry, name, _: registry.register_service(name, "10.0.0.2", 1), WRITE),
    "read": (lambda registry, name, _: registry.discover_service(name, passing=False), READ),
    "deregister another's": (lambda registry, _, service_id: registry.deregister_service(service_id), WRITE),
    "ask for another's health": (lambda registry, _, service_id: registry.get_service_health(service_id), READ),
}


@pytest.mark.parametrize("doing", DONE)
@pytest.mark.parametrize("whose", ["none", "unknown", "foreign", "one that lost a right"])
def test_a_denial_names_the_line_that_grants_it(
    locked_consul_agent: ConsulAgent, service_name: str, whose: str, doing: str
) -> None:
    """Whoever lacks the right changes and sees nothing, and is told what to write into a policy; no secret shows."""
    acl = locked_consul_agent.acl
    do, line = DONE[doing]
    with ServiceRegistry("127.0.0.1", locked_consul_agent.http_port, locked_consul_agent.token) as operator:
        service_id = operator.register_service(service_name, "10.0.0.1", 8000)
    token = acl.token(OWN.format("another-service"))
    secret = {"none": None, "unknown": "wr0ng-token"}.get(whose, token.secret)
    if whose == "one that lost a right":
        acl.change(token, OWN.format(service_name))
        with ServiceRegistry("127.0.0.1", locked_consul_agent.http_port, secret) as registry:
            assert [each.id for each in registry.discover_service(service_name, passing=False)] == [service_id]
        acl.change(token, 'node_prefix "" { policy = "read" }')
    with (
        ServiceRegistry("127.0.0.1", locked_consul_agent.http_port, secret) as registry,
        pytest.raises(RegistryError, match="denied the request") as caught,
    ):
        do(registry, service_name, service_id)
    said = str(caught.value)
    unnamed = whose == "unknown" and doing.endswith(("another's", "health"))  # Consul does not say of which service
    assert line.format("<the instance's service>" if unnamed else service_name) in said
    told = {"none": "no token was sent", "unknown": "does not know the token"}.get(
        whose, "add to a policy of the token"
    )
    assert told in said
    assert secret is None or secret not in f"{caught.value!r} {caught.value.__cause__!r}"
    assert found(locked_consul_agent, service_name, passing=False) == [service_id]


async def test_a_client_is_told_the_line(locked_consul_agent: ConsulAgent, service_name: str) -> None:
    """A call whose caller may not read the service says so, with both lines that it takes."""
    token = locked_consul_agent.acl.token()
    with ServiceRegistry("127.0.0.1", locked_consul_agent.http_port, locked_consul_agent.token) as operator:
        operator.register_service(service_name, "10.0.0.1", 8000)
    async with ServiceDiscoveryClient(ConsulResolver(settings_of(locked_consul_agent, token.secret))) as client:
        with pytest.raises(RegistryError) as caught:
            await client.get(service_name, "/")
    assert f'{READ.format(service_name)} and node_prefix "" {{ policy = "read" }}' in str(caught.value)


@pytest.mark.parametrize(
    ("path", "body", "lines"),
    [
        ("/v1/agent/service/register", b'{"name": "cards", "id": "c1"}', 'service "cards" { policy = "write" }'),
        ("/v1/agent/service/deregister/c1", b"", 'service "<the instance\'s service>" { policy = "write" }'),
        ("/v1/health/service/team%2Fcards?passing=1", b"", 'service "team/cards" { policy = "read" }'),
        ("/v1/health/connect/cards", b"", 'service "cards" { policy = "read" }'),
        ("/v1/agent/health/service/name/cards", b"", 'service "cards" { policy = "read" }'),
        ("/v1/agent/health/service/id/c1", b"", 'service "<the instance\'s service>" { policy = "read" }'),
        ("/v1/agent/service/c1", b"", 'service "<the instance\'s service>" { policy = "read" }'),
        ("/v1/agent/connect/ca/leaf/cards", b"", 'service "cards" { policy = "write" }'),
        ("/v1/connect/intentions/match?by=destination&name=cards", b"", 'service "cards" { intentions = "read" }'),
        ("/v1/catalog/services", b"", 'service_prefix "" { policy = "read" }'),
        ("/v1/health/state/any", b"", 'node_prefix "" { policy = "read" }'),
        ("/v1/catalog/node/vm", b"", 'node_prefix "" { policy = "read" }'),
        ("/v1/catalog/deregister", b"{}", 'service "<the instance\'s service>" { policy = "write" }'),
        ("/v1/agent/self", b"", 'agent_prefix "" { policy = "read" }'),
        ("/v1/agent/connect/ca/roots", b"", None),
    ],
)
def test_what_each_request_needs(path: str, body: bytes, lines: str | None) -> None:
    """Where Consul does not say what is missing, the request does; the roots are for everybody."""
    found = needed(httpx.URL(f"http://consul{path}"), body)
    assert found == () if lines is None else lines in found


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (
            "Permission denied: token with AccessorID '1' lacks permission 'service:write' on \"cards\"",
            'service "cards" { policy = "write" }',
        ),
        ("Permission denied: provided token lacks permission 'node:read' on \"vm\"", 'node "vm" { policy = "read" }'),
        ("Permission denied: provided token lacks permission 'operator:read'", 'operator = "read"'),
        ("Permission denied: anonymous token lacks permission 'acl:write'. The", 'acl = "write"'),
        (
            "Permission denied: token lacks permission 'intention:read' on \"cards\"",
            'service "cards" { intentions = "read" }',
        ),
        ("Permission denied", 'service "x" { policy = "read" }'),
    ],
)
def test_what_consul_says_is_missing(said: str, line: str) -> None:
    """Each form in which Consul's versions say so becomes the line of a policy; else the request's need stands."""
    assert advice(said, ('service "x" { policy = "read" }',), token=True) == f"add to a policy of the token: {line}"
    assert advice("Permission denied", (), token=True) == "use a token that has this right"


def test_a_token_needs_a_moment_to_be_known(serve: Serve, tmp_path: Path) -> None:
    """Before the same token is tried once more there is a pause, for the servers to hear of it; a short one."""
    (tmp_path / "token").write_text("same")
    server = serve(lambda _: DENIALS["403"])
    settings = ConsulSettings(host="127.0.0.1", port=server.port, token_file=tmp_path / "token")
    begun = time.monotonic()
    with ServiceRegistry(settings=settings) as registry, pytest.raises(RegistryError):
        registry.discover_service("cards")
    assert 0.2 <= time.monotonic() - begun < 3.0
    assert len(server.requests) == 2
