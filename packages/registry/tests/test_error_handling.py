"""When Consul is away, is somebody else, or says no: the error says which, and is never "not found"."""

import asyncio
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from registry import (
    ConsulResolver,
    ConsulSettings,
    DiscoveryTransport,
    NoHealthyInstanceError,
    RegistryError,
    RegistryUnavailableError,
    ServiceDiscoveryClient,
    ServiceNotFoundError,
    ServiceRegistry,
)
from registry.testing.agent import running_agent
from registry.testing.fixtures import ConsulAgent
from registry.testing.ports import free_ports
from tests.support.server import Answer, RecordingServer, Serve, recording_server

SYNC_CALLS: dict[str, Callable[[ServiceRegistry], object]] = {
    "register_service": lambda registry: registry.register_service("cards", "10.0.0.1", 8000),
    "deregister_service": lambda registry: registry.deregister_service("cards-10.0.0.1-8000"),
    "discover_service": lambda registry: registry.discover_service("cards"),
    "discover_service by tag": lambda registry: registry.discover_service("cards", "v1", passing=False),
    "discover_all_services": lambda registry: registry.discover_all_services(),
    "get_service_url": lambda registry: registry.get_service_url("cards"),
    "get_service_health": lambda registry: registry.get_service_health("cards-10.0.0.1-8000"),
}
"""Every public call that needs Consul's answer."""

Call = Callable[[ServiceDiscoveryClient], Any]
CLIENT_CALLS: dict[str, Call] = {
    "call_service": lambda client: client.call_service("cards", "/"),
    "get": lambda client: client.get("cards", "/"),
    "post": lambda client: client.post("cards", "/", json={}),
    "put": lambda client: client.put("cards", "/", json={}),
    "patch": lambda client: client.patch("cards", "/", json={}),
    "delete": lambda client: client.delete("cards", "/"),
}


@contextmanager
def _agent(fault: Callable[[ConsulAgent], None], binary: Path) -> Iterator[int]:
    with running_agent(binary=binary, in_memory=True) as agent:
        fault(agent)
        yield agent.http_port


@contextmanager
def _something_else(answer: Answer | None) -> Iterator[int]:
    with recording_server(lambda _: answer) as server:
        yield server.port


HTML = b"<!doctype html><title>Welcome</title>"
OUTAGES: dict[str, Callable[[Path], Any]] = {
    "stopped": lambda binary: _agent(ConsulAgent.stop, binary),
    "killed": lambda binary: _agent(ConsulAgent.kill, binary),
    "paused": lambda binary: _agent(ConsulAgent.pause, binary),
    "404": lambda _: _something_else(Answer(404, b'{"detail": "Not Found"}')),
    "404 in HTML": lambda _: _something_else(Answer(404, HTML, {"Content-Type": "text/html"})),
    "200 in HTML": lambda _: _something_else(Answer(200, HTML, {"Content-Type": "text/html"})),
    "200 with a list": lambda _: _something_else(Answer(200, b"[]")),
    "200 with an object": lambda _: _something_else(Answer(200, b"{}")),
    "200 with nothing": lambda _: _something_else(Answer(200, b"")),
    "no content": lambda _: _something_else(Answer(204, b"")),
    "a redirect": lambda _: _something_else(Answer(302, b"", {"Location": "/ui/"})),
    "400": lambda _: _something_else(Answer(400, b"bad request")),
    "401": lambda _: _something_else(Answer(401, b"who are you?")),
    "403": lambda _: _something_else(Answer(403, b"forbidden")),
    "429": lambda _: _something_else(Answer(429, b"Your IP is issuing too many concurrent connections")),
    "500": lambda _: _something_else(Answer(500, b"No cluster leader")),
    "503": lambda _: _something_else(Answer(503, HTML)),
    "broken gzip": lambda _: _something_else(Answer(200, b"no gzip", {"Content-Encoding": "gzip"})),
    "half an answer": lambda _: _something_else(Answer(200, b"[", {"X-Consul-Index": "7", "Content-Length": "70"})),
    "a cut connection": lambda _: _something_else(None),
}


@pytest.fixture(scope="module", params=OUTAGES)
def outage(request: pytest.FixtureRequest, consul_binary: Path) -> Iterator[int]:
    """The port at which Consul should be and is not, in every way that was thought of."""
    with OUTAGES[request.param](consul_binary) as port:
        yield port


@pytest.fixture
def settings(outage: int) -> ConsulSettings:
    """Leads to the outage, and waits shortly."""
    return ConsulSettings(host="127.0.0.1", port=outage, timeout=0.2)


@pytest.mark.parametrize("call", SYNC_CALLS)
def test_outage_is_told_by_every_registry_call(settings: ConsulSettings, call: str) -> None:
    """No call reads an outage as "no such service": all say that Consul at this address can't be asked."""
    with ServiceRegistry(settings=settings) as registry:
        with pytest.raises(RegistryUnavailableError, match=settings.url) as caught:
            SYNC_CALLS[call](registry)
        assert not isinstance(caught.value, ServiceNotFoundError)
        assert len(str(caught.value)) < 600


def test_outage_is_not_healthy(settings: ConsulSettings) -> None:
    """``is_healthy`` says False and raises nothing."""
    with ServiceRegistry(settings=settings) as registry:
        assert registry.is_healthy() is False


@pytest.mark.parametrize("call", CLIENT_CALLS)
async def test_outage_is_told_by_every_client_call(settings: ConsulSettings, call: str) -> None:
    """A call to a service that nobody could look up yet fails as an outage, not as an unknown service."""
    resolver = ConsulResolver(settings, first_answer_timeout=0.3)
    async with ServiceDiscoveryClient(resolver) as client:
        with pytest.raises(RegistryUnavailableError, match=settings.url) as caught:
            await CLIENT_CALLS[call](client)
    assert not isinstance(caught.value, ValueError)


async def test_outage_is_told_by_the_transport(settings: ConsulSettings) -> None:
    """An httpx client over the transport sees the same error."""
    transport = DiscoveryTransport(ConsulResolver(settings, first_answer_timeout=0.3))
    async with httpx.AsyncClient(transport=transport, base_url="http://cards") as client:
        with pytest.raises(RegistryUnavailableError):
            await client.get("/")


async def test_outage_at_start_does_not_hold_the_resolver(settings: ConsulSettings) -> None:
    """Declaring upstreams while Consul is away neither raises nor hangs."""
    resolver = ConsulResolver(settings, upstreams=["cards", "research-api"], first_answer_timeout=0.3)
    await resolver.start()
    await resolver.aclose()


def test_every_public_call_is_in_the_tables() -> None:
    """A new public method must be proven against outages, too."""

    def public(kind: type) -> set[str]:
        return {name for name, value in vars(kind).items() if callable(value) and not name.startswith("_")}

    assert public(ServiceRegistry) == {name.split()[0] for name in SYNC_CALLS} | {"is_healthy", "resolver", "close"}
    assert set(CLIENT_CALLS) <= public(ServiceDiscoveryClient)


# -- known and unknown, told apart -------------------------------------------------------------------------------------


async def test_unknown_and_unhealthy_are_told_apart(
    service_registry: ServiceRegistry, consul_agent: ConsulAgent, service_name: str
) -> None:
    """Nobody by that name, and somebody whom the checks fail, are two errors, both ValueErrors of the registry."""
    service_id = service_registry.register_service(service_name, "127.0.0.1", 1)
    try:
        async with ServiceDiscoveryClient(service_registry) as client:
            with pytest.raises(
                NoHealthyInstanceError, match=rf"'{service_name}' has no healthy instance \(1 registered"
            ):
                await client.get(service_name, "/")
            with pytest.raises(
                ServiceNotFoundError, match=r"^Service 'nonexistent-service' not found in registry$"
            ) as e:
                await client.get("nonexistent-service", "/")
        assert isinstance(e.value, ValueError)
        assert not isinstance(e.value, NoHealthyInstanceError)
    finally:
        service_registry.deregister_service(service_id)


@pytest.fixture
def checkless(private_consul_agent: ConsulAgent, service_name: str, serve: Serve) -> RecordingServer:
    """An instance that is registered without a check, so passing from the start."""
    server = serve()
    url = f"{private_consul_agent.url}/v1/agent/service/register"
    body = {"Name": service_name, "Address": "127.0.0.1", "Port": server.port}
    httpx.put(url, json=body).raise_for_status()
    return server


async def test_known_instances_serve_on_through_an_outage(
    private_consul_agent: ConsulAgent, service_name: str, checkless: RecordingServer
) -> None:
    """Whom the client knew before Consul died it calls on, while the registry says that Consul is away."""
    with ServiceRegistry("127.0.0.1", private_consul_agent.http_port) as registry:
        async with ServiceDiscoveryClient(registry) as client:
            assert (await client.get(service_name, "/before")).status_code == 200
            private_consul_agent.kill()
            for _ in range(5):
                assert (await client.get(service_name, "/after")).status_code == 200
        with pytest.raises(RegistryUnavailableError):
            registry.discover_service(service_name)
    assert [request.target for request in checkless.requests] == ["/before"] + ["/after"] * 5


def test_registry_recovers_with_its_consul(private_consul_agent: ConsulAgent) -> None:
    """One registry object works again as soon as Consul does, without being made anew."""
    with ServiceRegistry("127.0.0.1", private_consul_agent.http_port) as registry:
        assert registry.is_healthy()
        private_consul_agent.kill()
        assert not registry.is_healthy()
        private_consul_agent.start()
        assert registry.is_healthy()
        assert registry.discover_service("cards") == []


# -- ACL ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def acl_agent(consul_binary: Path) -> Iterator[ConsulAgent]:
    """An agent that denies by default, with one instance of ``cards``."""
    with running_agent(acl=True, binary=consul_binary, in_memory=True) as agent:
        with ServiceRegistry("127.0.0.1", agent.http_port, agent.token) as registry:
            registry.register_service("cards", "10.0.0.1", 8000, tags=["v1"])
        yield agent


def make_token(agent: ConsulAgent, rules: str) -> str:
    """A token of the agent with exactly these rights."""
    with httpx.Client(base_url=agent.url, headers={"X-Consul-Token": agent.token or ""}) as client:
        policy = client.put("/v1/acl/policy", json={"Name": f"rules-{abs(hash(rules))}", "Rules": rules})
        policies = [{"ID": policy.raise_for_status().json()["ID"]}]
        token: str = client.put("/v1/acl/token", json={"Policies": policies}).raise_for_status().json()["SecretID"]
        return token


@pytest.fixture(scope="module")
def rightless(acl_agent: ConsulAgent) -> str:
    """A token that is known and may do nothing of use."""
    return make_token(acl_agent, 'key "unused" { policy = "read" }')


@pytest.mark.parametrize("call", SYNC_CALLS)
@pytest.mark.parametrize("kind", ["no token", "wrong token", "token without rights"])
def test_denied_is_told_by_every_registry_call(acl_agent: ConsulAgent, rightless: str, kind: str, call: str) -> None:
    """Without the right, every call says so: no empty list, no None, no outage; and the token is not shown."""
    token = {"no token": None, "wrong token": "wr0ng-token", "token without rights": rightless}[kind]
    with ServiceRegistry("127.0.0.1", acl_agent.http_port, token) as registry:
        with pytest.raises(RegistryError, match=r"denied the request.*token") as caught:
            SYNC_CALLS[call](registry)
        assert type(caught.value) is RegistryError
        assert token is None or token not in f"{caught.value!r} {caught.value.__cause__!r}"
        assert registry.is_healthy()


ANONYMOUS = "00000000-0000-0000-0000-000000000002"
READS = 'service "{}" {{ policy = "read" }} node_prefix "" {{ policy = "read" }}'


@pytest.fixture(params=["the anonymous token", "the agent's default token"])
def granted(request: pytest.FixtureRequest, consul_binary: Path) -> Iterator[tuple[ConsulAgent, Callable[[str], None]]]:
    """An agent that denies by default, and a way to give rights to those who send no token."""
    with (
        running_agent(acl=True, binary=consul_binary, in_memory=True) as agent,
        httpx.Client(base_url=agent.url, headers={"X-Consul-Token": agent.token or ""}, trust_env=False) as consul,
    ):

        def ask(path: str, body: object) -> Any:
            answer = consul.put(path, json=body).raise_for_status()
            return answer.json() if answer.content else None

        token = {"AccessorID": ANONYMOUS}
        if request.param == "the agent's default token":
            token = ask("/v1/acl/token", {"Description": "default"})
            ask("/v1/agent/token/default", {"Token": token["SecretID"]})

        def grant(rules: str) -> None:
            policy = ask("/v1/acl/policy", {"Name": f"rules-{abs(hash(rules))}", "Rules": rules})
            ask(f"/v1/acl/token/{token['AccessorID']}", {"Policies": [{"ID": policy["ID"]}]})

        yield agent, grant


async def test_nobody_is_believed_of_rights_that_come_without_a_token(
    granted: tuple[ConsulAgent, Callable[[str], None]],
) -> None:
    """While the right is missing it is "denied", from then on "not found", and found as soon as somebody registers."""
    agent, grant = granted
    settings = ConsulSettings.model_validate({"host": "127.0.0.1", "port": agent.http_port, "token": None})
    resolver = ConsulResolver(settings)
    with ServiceRegistry(settings=settings) as registry:
        try:
            for rules in ('node_prefix "" { policy = "read" }', 'service "cards" { policy = "read" }'):
                grant(rules)
                with pytest.raises(RegistryError, match="denied the request"):
                    registry.discover_service("cards")
            await resolver.ready("cards")
            with pytest.raises(RegistryError, match="denied the request") as denied:
                resolver.resolve("cards")
            assert type(denied.value) is RegistryError
            grant(READS.format("cards"))
            await wait_until(lambda: resolver.view("cards").error is None)
            with pytest.raises(ServiceNotFoundError, match="Service 'cards' not found in registry"):
                resolver.resolve("cards")
            assert registry.discover_service("cards") == []
            assert registry.get_service_url("cards") is None
            with pytest.raises(RegistryError, match="denied the request"):
                registry.discover_service("others")
            with ServiceRegistry("127.0.0.1", agent.http_port, agent.token) as operator:
                operator.register_service("cards", "10.0.0.1", 8000, service_id="cards-1")
            await wait_until(lambda: resolver.view("cards").registered == 1)
            assert [each.id for each in registry.discover_service("cards", passing=False)] == ["cards-1"]
        finally:
            await resolver.aclose()


async def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Return once the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("kind", ["no token", "wrong token", "token without rights"])
async def test_denied_is_told_by_the_client(acl_agent: ConsulAgent, rightless: str, kind: str) -> None:
    """A call whose caller may not look the service up fails with that reason, not with "not found"."""
    token = {"no token": None, "wrong token": "wr0ng-token", "token without rights": rightless}[kind]
    with ServiceRegistry("127.0.0.1", acl_agent.http_port, token) as registry:
        async with ServiceDiscoveryClient(registry) as client:
            with pytest.raises(RegistryError, match="denied the request") as caught:
                await client.get("cards", "/")
    assert not isinstance(caught.value, ServiceNotFoundError)


def test_the_right_token_may_all(acl_agent: ConsulAgent) -> None:
    """With a token that has the rights, everything works under ACL, and an unknown service is just unknown."""
    rules = """
        service "library" { policy = "write" }
        service_prefix "" { policy = "read" }
        node_prefix "" { policy = "read" }
    """
    with ServiceRegistry("127.0.0.1", acl_agent.http_port, make_token(acl_agent, rules)) as registry:
        service_id = registry.register_service("library", "10.0.0.2", 8000)
        assert [i.id for i in registry.discover_service("library", passing=False)] == [service_id]
        assert set(registry.discover_all_services()) == {"consul", "cards", "library"}
        assert registry.get_service_health(service_id) is not None
        assert registry.deregister_service(service_id) is True
        assert registry.discover_service("library", passing=False) == []
        assert registry.get_service_url("nonexistent-service") is None
        with pytest.raises(RegistryError, match="denied"):
            registry.register_service("cards", "10.0.0.3", 8000)


def test_token_file_is_read_at_each_request(acl_agent: ConsulAgent, tmp_path: Path) -> None:
    """A token rotated in its file is used by the next call of the same registry."""
    file = tmp_path / "token"
    file.write_text("wr0ng-token\n")
    settings = ConsulSettings(host="127.0.0.1", port=acl_agent.http_port, token_file=file)
    with ServiceRegistry(settings=settings) as registry:
        with pytest.raises(RegistryError, match="denied"):
            registry.discover_service("cards", passing=False)
        file.write_text(f"{acl_agent.token}\n")
        assert len(registry.discover_service("cards", passing=False)) == 1


@pytest.mark.parametrize("variable", ["", "wr0ng-token"])
def test_environment_does_not_beat_the_argument(
    acl_agent: ConsulAgent, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """CONSUL_HTTP_TOKEN, even an empty one, takes nothing from ``token=``, in any call."""
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", variable)
    with ServiceRegistry("127.0.0.1", acl_agent.http_port, acl_agent.token) as registry:
        service_id = registry.register_service("argument", "10.0.0.2", 8000)
        assert len(registry.discover_service("argument", passing=False)) == 1
        assert "argument" in registry.discover_all_services()
        assert registry.get_service_health(service_id) is not None
        assert registry.deregister_service(service_id)


def test_every_request_carries_the_token(serve: Serve) -> None:
    """No endpoint is asked without the token."""
    recorder = serve(lambda _: Answer(500, b"no"))
    with ServiceRegistry("127.0.0.1", recorder.port, "5ecret-token") as registry:
        for call in SYNC_CALLS.values():
            with pytest.raises(RegistryUnavailableError):
                call(registry)
        registry.is_healthy()
    assert len(recorder.requests) == len(SYNC_CALLS) + 1
    assert {request.headers.get("x-consul-token") for request in recorder.requests} == {"5ecret-token"}
    assert not [request for request in recorder.requests if "5ecret-token" in request.target]


# -- https -------------------------------------------------------------------------------------------------------------


class TlsAgent(ConsulAgent):
    """An agent that speaks https, too."""

    certificates: Path
    https_port: int

    def _settings(self, serf_port: int, server_port: int) -> dict[str, object]:
        settings = super()._settings(serf_port, server_port)
        ports = settings["ports"]
        assert isinstance(ports, dict)
        ports["https"] = self.https_port
        names = {"cert_file": "cert.pem", "key_file": "key.pem"}
        return settings | {"tls": {"https": {key: str(self.certificates / file) for key, file in names.items()}}}


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Who signs the agent's certificate."""
    return trustme.CA()


@pytest.fixture(scope="module")
def https_port(authority: trustme.CA, consul_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Where a real agent speaks https with a certificate for localhost."""
    directory = tmp_path_factory.mktemp("certificates")
    certificate = authority.issue_cert("localhost")
    certificate.private_key_pem.write_to_path(directory / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    TlsAgent.certificates = directory
    TlsAgent.https_port = free_ports(1)[0]
    agent = TlsAgent(consul_binary, tmp_path_factory.mktemp("agent"), None, acl=False)
    with ExitStack() as stack:
        stack.callback(agent.close)
        agent.start()
        yield agent.https_port


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> Path:
    """The authority's certificate."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return tmp_path / "ca.pem"


async def test_https_with_a_private_authority(https_port: int, ca_file: Path, service_name: str) -> None:
    """With ``scheme="https"`` and the CA's file registry and client work over TLS."""
    with ServiceRegistry("localhost", https_port, scheme="https", ca_file=ca_file) as registry:
        assert registry.is_healthy()
        service_id = registry.register_service(service_name, "10.0.0.1", 8000)
        assert [i.id for i in registry.discover_service(service_name, passing=False)] == [service_id]
        async with ServiceDiscoveryClient(registry) as client:
            with pytest.raises(NoHealthyInstanceError):
                await client.get(service_name, "/")
        assert registry.deregister_service(service_id)


def test_https_by_environment(https_port: int, ca_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CONSUL_HTTP_ADDR with https and CONSUL_CACERT do the same."""
    monkeypatch.setenv("CONSUL_HTTP_ADDR", f"https://localhost:{https_port}")
    monkeypatch.setenv("CONSUL_CACERT", str(ca_file))
    with ServiceRegistry(settings=ConsulSettings()) as registry:
        assert registry.is_healthy()


def test_unknown_authority_is_not_trusted(https_port: int, tmp_path: Path) -> None:
    """A certificate that nobody we trust has signed is an outage that says so, with and without a CA file."""
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    for ca_file in (None, tmp_path / "other.pem"):
        with ServiceRegistry("localhost", https_port, scheme="https", ca_file=ca_file) as registry:
            with pytest.raises(RegistryUnavailableError, match="certificate verify failed"):
                registry.discover_service("cards")
            assert registry.is_healthy() is False


def test_certificate_of_another_host_is_not_trusted(https_port: int, ca_file: Path) -> None:
    """The certificate must be for the host that was asked."""
    with (
        ServiceRegistry("127.0.0.1", https_port, scheme="https", ca_file=ca_file) as registry,
        pytest.raises(RegistryUnavailableError, match="certificate verify failed"),
    ):
        registry.discover_service("cards")


def test_plain_http_to_an_https_port_is_an_outage(https_port: int, acl_agent: ConsulAgent, ca_file: Path) -> None:
    """http to https and https to http are outages, not surprises."""
    with ServiceRegistry("localhost", https_port) as registry, pytest.raises(RegistryUnavailableError):
        registry.discover_service("cards")
    with (
        ServiceRegistry("localhost", acl_agent.http_port, scheme="https", ca_file=ca_file) as registry,
        pytest.raises(RegistryUnavailableError),
    ):
        registry.discover_service("cards")


# -- secrets -----------------------------------------------------------------------------------------------------------

TOKEN = "5ecret-t0ken-in-n0-log"


def everything_said(error: BaseException) -> str:
    """All that anybody could print of an error: its reprs, notes, causes and contexts, and its traceback."""
    said, pending = "", [error]
    while pending:
        error = pending.pop()
        said += f"{error} {error!r} {error.args!r} {getattr(error, '__notes__', '')}"
        said += "".join(traceback.format_exception(error))
        pending += [e for e in (error.__cause__, error.__context__) if e is not None]
    return said


def logged(caplog: pytest.LogCaptureFixture) -> str:
    """All that was logged, extras included."""
    return "".join(f"{record.getMessage()} {vars(record)!r}" for record in caplog.records)


@pytest.mark.parametrize("place", ["argument", "file"])
async def test_token_shows_nowhere(
    settings: ConsulSettings, place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In no outage does any log at DEBUG, repr, error, cause or note show the token."""
    caplog.set_level(logging.DEBUG)
    (tmp_path / "token").write_text(TOKEN)
    given: dict[str, Any] = {"token": TOKEN} if place == "argument" else {"token_file": tmp_path / "token"}
    secret = ConsulSettings(host=settings.host, port=settings.port, timeout=0.2, **given)
    said = [repr(secret), str(secret)]
    with ServiceRegistry(settings=secret) as registry:
        said += [repr(registry), repr(vars(registry)), repr(registry.resolver())]
        for call in SYNC_CALLS.values():
            with pytest.raises(RegistryUnavailableError) as caught:
                call(registry)
            said.append(everything_said(caught.value))
        async with ServiceDiscoveryClient(ConsulResolver(secret, first_answer_timeout=0.3)) as client:
            said += [repr(client), repr(vars(client))]
            with pytest.raises(RegistryUnavailableError) as caught:
                await client.get("cards", "/")
            said.append(everything_said(caught.value))
    assert caplog.records
    assert TOKEN not in logged(caplog)
    assert not [text for text in said if TOKEN in text]


async def test_denied_token_shows_nowhere(acl_agent: ConsulAgent, caplog: pytest.LogCaptureFixture) -> None:
    """When Consul itself refuses the token, nothing shows it either; the httpx and httpcore logs included."""
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore", "registry", "asyncio"):
        caplog.set_level(logging.DEBUG, logger=name)
    with ServiceRegistry("127.0.0.1", acl_agent.http_port, TOKEN) as registry:
        said = []
        for call in SYNC_CALLS.values():
            with pytest.raises(RegistryError) as caught:
                call(registry)
            said.append(everything_said(caught.value))
        async with ServiceDiscoveryClient(registry) as client:
            with pytest.raises(RegistryError) as caught:
                await client.get("cards", "/")
            said.append(everything_said(caught.value))
    expected = {httpx.__name__, httpx.__name__.replace("httpx", "httpcore")}
    assert {record.name.partition(".")[0] for record in caplog.records} >= expected
    assert TOKEN not in logged(caplog)
    assert not [text for text in said if TOKEN in text]


def test_no_password_of_an_address_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A password in CONSUL_HTTP_ADDR is refused without being repeated."""
    monkeypatch.setenv("CONSUL_HTTP_ADDR", f"http://user:{TOKEN}@consul:8500")
    with pytest.raises(ValueError) as caught:
        ConsulSettings()
    assert TOKEN not in everything_said(caught.value)
