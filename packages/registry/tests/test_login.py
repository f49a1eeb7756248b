"""Logging in with the identity that the platform gives a process: one login, renewed, and ended with the process."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from registry import (
    ConsulResolver,
    ConsulSettings,
    InvalidInputError,
    RegistryError,
    RegistryUnavailableError,
    ServiceDiscoveryClient,
    ServiceRegistry,
)
from registry.consul import login
from registry.consul.connection import AsyncConsul
from registry.testing.acl import AclToken
from registry.testing.fixtures import ConsulAgent
from registry.testing.ports import free_ports
from tests.support.command import found, running_service, wait_until
from tests.support.platform import Platform
from tests.support.server import Answer, Request, Serve

HERE = Path(__file__).parent
CONSUL = {"X-Consul-Default-ACL-Policy": "deny"}


@pytest.fixture(scope="module")
def platform() -> Platform:
    """Gives identities that the auth methods of these tests trust."""
    return Platform()


@pytest.fixture
def method(locked_consul_agent: ConsulAgent, platform: Platform, service_name: str) -> str:
    """An auth method of this test's own."""
    locked_consul_agent.acl.auth_method(f"method-{service_name}", platform.public_key)
    return f"method-{service_name}"


@pytest.fixture
def settings(
    locked_consul_agent: ConsulAgent, platform: Platform, method: str, service_name: str, tmp_path: Path
) -> ConsulSettings:
    """Logs in as the service."""
    (tmp_path / "identity").write_text(f"{platform.identity(service_name)}\n")
    return logging_in(locked_consul_agent.http_port, method, tmp_path / "identity")


def logging_in(port: int, method: str, bearer: Path, **more: Any) -> ConsulSettings:
    """Leads to Consul at this port, whatever the environment says."""
    given = {"host": "127.0.0.1", "port": port, "auth_method": method, "bearer_token_file": bearer, **more}
    return ConsulSettings.model_validate(given)


@pytest.fixture(autouse=True)
def no_login_is_left() -> Iterator[None]:
    """Every test closes its connections, and with the last one its login goes."""
    yield
    assert login._logins == {}


async def test_one_login_for_all_connections(
    locked_consul_agent: ConsulAgent, settings: ConsulSettings, method: str, service_name: str
) -> None:
    """Registry, resolver and client share one token, which ends when the last of them is closed."""
    acl = locked_consul_agent.acl
    with ServiceRegistry(settings=settings) as registry:
        service_id = registry.register_service(service_name, "10.0.0.1", 8000)
        async with ServiceDiscoveryClient(ConsulResolver(settings)) as client:
            with pytest.raises(RegistryError):
                await client.get(service_name, "/")
            assert client.explain(service_name).view.registered == 1
            assert len(acl.tokens(method)) == 1
        assert len(acl.tokens(method)) == 1
        assert registry.deregister_service(service_id)
    assert acl.tokens(method) == []


def test_a_token_that_an_agent_needs_is_not_logged_out(
    locked_consul_agent: ConsulAgent, settings: ConsulSettings, method: str, service_name: str
) -> None:
    """Who registers and leaves, as a script does, leaves the token to the agent, to tell of failing checks with."""
    with ServiceRegistry(settings=settings) as registry:
        service_id = registry.register_service(service_name, "10.0.0.1", 8000)
    assert len(locked_consul_agent.acl.tokens(method)) == 1
    with ServiceRegistry(settings=settings) as registry:
        registry.deregister_service(service_id)
    assert len(locked_consul_agent.acl.tokens(method)) == 1


def test_threads_wait_for_one_login(
    locked_consul_agent: ConsulAgent, settings: ConsulSettings, method: str, service_name: str
) -> None:
    """Twenty threads that need a token at the same time get the same one."""
    with ServiceRegistry(settings=settings) as registry, ThreadPoolExecutor(20) as pool:
        assert all(listed == [] for listed in pool.map(registry.discover_service, [service_name] * 20))
        assert len(locked_consul_agent.acl.tokens(method)) == 1


async def test_a_token_that_ended_is_replaced_without_a_gap(
    locked_consul_agent: ConsulAgent,
    settings: ConsulSettings,
    method: str,
    service_name: str,
    sent: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When somebody ends the token, watches and calls log in again, once for all of them, and nothing fails."""
    monkeypatch.setattr(login, "SPREAD", 0.0)  # nobody waits for a server that does not know it yet: there is one
    acl = locked_consul_agent.acl
    resolver, other = ConsulResolver(settings, upstreams=[service_name]), AsyncConsul(settings)

    def end_the_token() -> None:
        (token,) = acl.tokens(method)
        acl.delete(AclToken(token, ""))

    def seen(registered: int) -> None:
        wait_until(lambda: resolver.view(service_name).registered == registered)

    with ServiceRegistry(settings=settings) as registry:
        service_id = registry.register_service(service_name, "10.0.0.1", 8000)
        try:
            await resolver.start()
            for times in (1, 2):
                # Parked: only then does Consul say of itself that the token has ended.
                await asyncio.to_thread(wait_until, lambda: "index=" in sent[-1])
                await asyncio.to_thread(end_the_token)
                listing = asyncio.to_thread(registry.discover_service, service_name)
                await asyncio.gather(listing, other.catalog.services())
                await asyncio.to_thread(registry.register_service, service_name, "10.0.0.2", 8000 + times)
                await asyncio.to_thread(seen, 1 + times)
                assert len(acl.tokens(method)) == 1
            assert resolver.view(service_name).errors == 0
            for each in registry.discover_service(service_name, passing=False):
                registry.deregister_service(each.id)
            assert service_id not in found(locked_consul_agent, service_name, passing=False)
        finally:
            await resolver.aclose()
            await other.http.close()


def test_a_missing_right_is_no_reason_to_log_in(
    locked_consul_agent: ConsulAgent, settings: ConsulSettings, method: str
) -> None:
    """The next token would have the same rights: a denial is told at once, and Consul has no more tokens than one."""
    with ServiceRegistry(settings=settings) as registry:
        for _ in range(3):
            with pytest.raises(RegistryError, match=r'service "foreign" \{ policy = "write" \}'):
                registry.register_service("foreign", "10.0.0.1", 8000)
        assert len(locked_consul_agent.acl.tokens(method)) == 1


@pytest.mark.parametrize("identity", ["forged", "expired", "not a JWT"])
def test_a_refused_identity_is_told(
    platform: Platform, settings: ConsulSettings, tmp_path: Path, service_name: str, identity: str
) -> None:
    """What Consul does not believe is an error with its reason; it is no outage, and shows nothing of the identity."""
    bearer = {
        "forged": Platform().identity(service_name),
        "expired": platform.identity(service_name, -3600),
        "not a JWT": "5ecret-nonsense",
    }[identity]
    (tmp_path / "identity").write_text(bearer)
    with (
        ServiceRegistry(settings=settings) as registry,
        pytest.raises(RegistryError, match=f"refused the login with .*; is {tmp_path}/identity fresh") as caught,
    ):
        registry.discover_service(service_name)
    assert not isinstance(caught.value, RegistryUnavailableError)
    assert bearer not in f"{caught.value!r} {caught.value.__cause__!r}"


def test_neither_identity_nor_token_shows(
    settings: ConsulSettings, tmp_path: Path, service_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """From login to logout, denials between, no log at DEBUG, repr or error shows what others could use."""
    for name in ("", "httpx", "httpcore", "registry"):
        caplog.set_level(logging.DEBUG, logger=name)
    with ServiceRegistry(settings=settings) as registry:
        registry.discover_service(service_name)
        (token,) = {source.current() for source in login._logins.values()}
        with pytest.raises(RegistryError) as caught:
            registry.register_service("foreign", "10.0.0.1", 1)
        said = f"{caught.value!r} {caught.value.__cause__!r} {settings!r} {login._logins!r} {vars(registry)!r}"
    said += "".join(f"{record.getMessage()} {vars(record)!r}" for record in caplog.records)
    assert "/v1/acl/logout" in said
    assert token not in said
    assert (tmp_path / "identity").read_text().strip() not in said


def test_a_consul_without_rules_is_told(consul_agent: ConsulAgent, tmp_path: Path) -> None:
    """Who is told to log in where nobody has to, is told to leave it."""
    (tmp_path / "identity").write_text("5ecret")
    settings = logging_in(consul_agent.http_port, "platform", tmp_path / "identity")
    with ServiceRegistry(settings=settings) as registry, pytest.raises(RegistryError, match="unset CONSUL_AUTH_METHOD"):
        registry.discover_service("cards")


@pytest.mark.parametrize(("suffix", "advice"), [("-unknown", "mend CONSUL_AUTH_METHOD"), ("-bare", "binding rule")])
def test_a_login_that_gives_nothing_is_told(
    locked_consul_agent: ConsulAgent, settings: ConsulSettings, method: str, suffix: str, advice: str
) -> None:
    """An auth method that does not exist, or binds nobody, is told with what to do about it."""
    acl = locked_consul_agent.acl
    bare = acl._ask("GET", f"/v1/acl/auth-method/{method}") | {"Name": f"{method}-bare"}
    acl._ask("PUT", "/v1/acl/auth-method", bare)
    other = settings.model_copy(update={"auth_method": f"{method}{suffix}"})
    with ServiceRegistry(settings=other) as registry, pytest.raises(RegistryError, match=advice):
        registry.discover_all_services()


def test_bad_input_is_told_before_anything_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a login, two ways to a token, or a bearer token that can't be read: an error that names the variable."""
    for name in [name for name in os.environ if name.startswith("CONSUL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CONSUL_AUTH_METHOD", "platform")
    with pytest.raises(ValueError, match="CONSUL_BEARER_TOKEN_FILE"):
        ConsulSettings()
    monkeypatch.setenv("CONSUL_BEARER_TOKEN_FILE", str(tmp_path / "identity"))
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "5ecret")
    with pytest.raises(ValueError, match="unset CONSUL_HTTP_TOKEN") as caught:
        ConsulSettings()
    assert "5ecret" not in repr(caught.value)
    assert ConsulSettings(token=None).auth_method is None  # an argument decides, so no variable is asked
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "")
    settings = ConsulSettings(port=free_ports(1)[0])
    assert (settings.auth_method, settings.read_token()) == ("platform", None)
    for content, told in ((None, "can't be read"), ("", "is empty"), ("two words", "holds blanks")):
        if content is not None:
            (tmp_path / "identity").write_text(content)
        with (
            ServiceRegistry(settings=settings) as registry,
            pytest.raises(InvalidInputError, match=f"CONSUL_BEARER_TOKEN_FILE.*{told}"),
        ):
            registry.discover_service("cards")


async def test_an_outage_is_no_refusal(tmp_path: Path) -> None:
    """While Consul is away a login fails as an outage does, once for all that wait for it."""
    (tmp_path / "identity").write_text("5ecret")
    settings = logging_in(free_ports(1)[0], "platform", tmp_path / "identity", timeout=0.3)
    with ServiceRegistry(settings=settings) as registry:
        with pytest.raises(RegistryUnavailableError, match="can't be reached"):
            registry.discover_service("cards")
        async with ServiceDiscoveryClient(ConsulResolver(settings, first_answer_timeout=0.5)) as client:
            with pytest.raises(RegistryUnavailableError, match="can't be reached"):
                await client.get("cards", "/")


def made(secret: str, life: float) -> Answer:
    """What Consul answers to a login."""
    created = "2026-11-27T22:33:04.464036758Z"
    expires = f"2026-11-27T22:33:{4.464036758 + life:012.9f}Z"
    body = f'{{"SecretID": "{secret}", "CreateTime": "{created}", "ExpirationTime": "{expires}"}}'
    return Answer(200, body.encode(), CONSUL)


def test_a_login_is_renewed_early_and_kept_when_it_can_t_be(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next login comes after 60 to 80 % of the token's life; if it fails, the old token serves until its end."""
    monkeypatch.setattr(login, "RETRY", 0.05)
    (tmp_path / "identity").write_text("5ecret")
    logins: list[float] = []
    broken = False

    def answer(request: Request) -> Answer:
        if request.target == "/v1/acl/logout":
            return Answer(200, b"true", CONSUL)
        if request.target != "/v1/acl/login":
            return Answer(200, b"[]", {"X-Consul-Index": "7", **CONSUL})
        logins.append(time.monotonic())
        return Answer(500, b"No cluster leader", CONSUL) if broken else made(f"token-{len(logins)}", 3.0)

    server = serve(answer)
    with ServiceRegistry(settings=logging_in(server.port, "platform", tmp_path / "identity")) as registry:

        def next_token() -> str:
            registry.discover_service("cards")
            return server.requests[-1].headers["x-consul-token"]

        assert next_token() == "token-1"
        wait_until(lambda: next_token() == "token-2")
        assert logins[1] - logins[0] > 1.8
        broken = True
        wait_until(lambda: next_token() == "token-2" and len(logins) > 3)
        with pytest.raises(RegistryUnavailableError, match="No cluster leader"):
            wait_until(lambda: next_token() != "token-2")
        assert time.monotonic() - logins[1] > 3.0
        broken = False
        assert next_token() == f"token-{len(logins)}"
    (last,) = [request for request in server.requests if request.target == "/v1/acl/logout"]
    assert last.headers["x-consul-token"] == f"token-{len(logins)}"


def test_a_new_token_is_given_time_to_spread(serve: Serve, tmp_path: Path) -> None:
    """A server that does not know the new token yet is asked once more with it, and no other is made."""
    (tmp_path / "identity").write_text("5ecret")
    asked = 0

    def answer(request: Request) -> Answer:
        nonlocal asked
        if request.target.startswith("/v1/acl/"):
            return made(request.target.removeprefix("/v1/acl/"), 30.0)
        asked += 1
        return Answer(403, b"ACL not found", CONSUL) if asked == 1 else Answer(200, b"{}", CONSUL)

    server = serve(answer)
    with ServiceRegistry(settings=logging_in(server.port, "platform", tmp_path / "identity")) as registry:
        registry.is_healthy()
    assert [request.target for request in server.requests].count("/v1/acl/login") == 1
    assert asked == 2


def test_a_login_without_end_is_never_renewed(serve: Serve, tmp_path: Path) -> None:
    """Where the auth method sets no life, one login is enough."""
    (tmp_path / "identity").write_text("5ecret")
    server = serve(lambda _: Answer(200, b'{"SecretID": "token"}', CONSUL))
    source = login.token_source(logging_in(server.port, "platform", tmp_path / "identity"), user := object_with_name())
    assert [source.current() for _ in range(3)] == ["token"] * 3
    assert len(server.requests) == 1
    source.leave(user)
    assert len(server.requests) == 2


class object_with_name:  # noqa: N801
    """Something that can be in a WeakSet."""


def test_the_end_is_not_held_up(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Consul that does not answer to the logout costs a second at most."""
    monkeypatch.setattr(login, "LOGOUT_TIMEOUT", 0.2)
    (tmp_path / "identity").write_text("5ecret")

    def answer(request: Request) -> Answer:
        if request.target == "/v1/acl/logout":
            time.sleep(3)
        return Answer(200, b'{"SecretID": "token"}', CONSUL)

    server = serve(answer)
    registry = ServiceRegistry(settings=logging_in(server.port, "platform", tmp_path / "identity"))
    registry.is_healthy()
    begun = time.monotonic()
    registry.close()
    assert time.monotonic() - begun < 2


@pytest.mark.real
def test_a_child_logs_in_by_itself(
    locked_consul_agent: ConsulAgent, settings: ConsulSettings, method: str, service_name: str
) -> None:
    """After a fork the child has a login of its own, and its end leaves the parent's alone."""
    with ServiceRegistry(settings=settings) as registry:
        registry.discover_service(service_name)
        before = locked_consul_agent.acl.tokens(method)
        child = os.fork()
        if child == 0:
            registry.discover_service(service_name)
            own = len(locked_consul_agent.acl.tokens(method))
            registry.close()
            os._exit(own)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
        assert locked_consul_agent.acl.tokens(method) == before
        registry.discover_service(service_name)


def test_a_service_renews_its_login_and_registration(
    locked_consul_agent: ConsulAgent, platform: Platform, method: str, service_name: str, tmp_path: Path
) -> None:
    """With tokens that live for a minute a service stays registered beyond it, and can still leave and become critical.

    No caller's request fails meanwhile, nor does its watch, which logs in as well.
    """
    acl, calls = locked_consul_agent.acl, 0
    acl.auth_method(f"{method}-minute", platform.public_key, "1m")
    (tmp_path / "identity").write_text(platform.identity(service_name))
    env = {
        "CONSUL_HTTP_TOKEN": "",
        "CONSUL_AUTH_METHOD": f"{method}-minute",
        "CONSUL_BEARER_TOKEN_FILE": str(tmp_path / "identity"),
        "SERVICE_HEALTH_CHECK_INTERVAL": "0.5",
    }
    with running_service("presence_app:app", service_name, consul=locked_consul_agent, cwd=HERE, env=env) as one:
        wait_until(one.is_found)
        begun = time.monotonic()
        first = acl.tokens(f"{method}-minute")

        async def call_for_a_minute(over: Callable[[], bool]) -> None:
            nonlocal calls
            settings = logging_in(locked_consul_agent.http_port, f"{method}-minute", tmp_path / "identity")
            resolver = ConsulResolver(settings, upstreams=[service_name])
            async with ServiceDiscoveryClient(resolver) as client:
                await resolver.start()
                while not over():
                    assert (await client.get(service_name, "/pid")).status_code == 200
                    calls += 1
                    await asyncio.sleep(0.05)
                assert resolver.view(service_name).errors == 0

        asyncio.run(call_for_a_minute(lambda: time.monotonic() - begun > 65))
        assert calls > 200
        assert "with the new token" in one.log
        assert "registration failed" not in one.log
        assert not set(first) & set(acl.tokens(f"{method}-minute"))
        (one.directory / "sick").touch()
        wait_until(lambda: not one.is_found())
        (one.directory / "sick").unlink()
        wait_until(one.is_found)
        one.end(signal.SIGTERM)
        assert found(locked_consul_agent, service_name, passing=False) == []
