"""Every way to reach Consul that its own command knows: certificates, Unix sockets; and after a fork."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trustme

from registry import (
    ConsulSettings,
    InvalidInputError,
    NoHealthyInstanceError,
    RegistryUnavailableError,
    ServiceDiscoveryClient,
    ServiceRegistry,
)
from registry.testing.agent import ConsulAgent
from registry.testing.ports import free_ports
from tests.support.server import Answer, Serve

# A key that nobody uses, encrypted with "hunter2".
LOCKED = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAinGRKWfdRJuQICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEEFDNbZjUdDYhMIKWSybBlwAEgZAL
rMQYwiimkiIab3AqBdtLxCOQ3D+YqcGOt2ujSUSyHnoskmfJx8OI+plI4MtK8/DL
a5oP4fHsltKRhs+/WyceQPnT8HT//5eoukwV/AyxRA6JW7DLbw7kAQn6fPHU4+yv
wAl3Ok2+gL75H11DCt2pWkJoLgU0rtLtmDpL+XAi2cG2ZsReET3VdMbp7eY3Se8=
-----END ENCRYPTED PRIVATE KEY-----
"""


class Reachable(ConsulAgent):
    """An agent that also listens at a Unix socket, and over TLS for those who have a certificate of its authority."""

    certificates: Path
    https_port: int

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.certificates / "consul.sock"

    def _settings(self, serf_port: int, server_port: int) -> dict[str, object]:
        settings = super()._settings(serf_port, server_port)
        ports = settings["ports"]
        assert isinstance(ports, dict)
        ports["https"] = self.https_port
        files = {"ca_file": "ca.pem", "cert_file": "server.pem", "key_file": "server.pem"}
        https = {key: str(self.certificates / file) for key, file in files.items()} | {"verify_incoming": True}
        addresses = {"http": f"127.0.0.1 unix://{self.socket}"}
        return settings | {"tls": {"https": https}, "addresses": addresses}


@pytest.fixture(scope="module")
def agent(consul_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reachable]:
    """The agent; beside its certificate for server.dc1.consul, there are those of its authority and of a client."""
    directory = Reachable.certificates = tmp_path_factory.mktemp("certificates")
    Reachable.https_port = free_ports(1)[0]
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.pem")
    for file, name in (("server.pem", "server.dc1.consul"), ("client.pem", "client.dc1.consul")):
        authority.issue_cert(name).private_key_and_cert_chain_pem.write_to_path(directory / file)
    agent = Reachable(consul_binary, tmp_path_factory.mktemp("agent"), None, acl=False)
    with ExitStack() as stack:
        stack.callback(agent.close)
        agent.start()
        yield agent


@pytest.fixture
def environment(agent: Reachable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets variables to reach the agent over TLS, and others on top: ``environment(CONSUL_CACERT=None)`` unsets one."""
    for name in [name for name in os.environ if name.startswith("CONSUL_")]:
        monkeypatch.delenv(name)

    def change(**variables: object) -> None:
        usual = {
            "CONSUL_HTTP_ADDR": f"https://127.0.0.1:{agent.https_port}",
            "CONSUL_CACERT": agent.certificates / "ca.pem",
            "CONSUL_CLIENT_CERT": agent.certificates / "client.pem",
            "CONSUL_CLIENT_KEY": agent.certificates / "client.pem",
            "CONSUL_TLS_SERVER_NAME": "server.dc1.consul",
        }
        for name, value in (usual | variables).items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(value))

    return change


async def works(service_name: str) -> None:
    """Asserts that registry and client, made from the environment, both work."""
    with ServiceRegistry(settings=ConsulSettings()) as registry:
        service_id = registry.register_service(service_name, "10.0.0.1", 8000)
        async with ServiceDiscoveryClient(registry) as client:
            with pytest.raises(NoHealthyInstanceError):
                await client.get(service_name, "/")
        assert registry.deregister_service(service_id) is True


async def test_mutual_tls_by_environment(environment: Callable[..., None], service_name: str) -> None:
    """With the variables of Consul's command a certificate is presented, and Consul's is checked by its own name."""
    environment()
    await works(service_name)
    environment(CONSUL_CLIENT_KEY=None)  # it stands in the same file
    await works(service_name)


async def test_a_folder_of_authorities(
    environment: Callable[..., None], agent: Reachable, tmp_path: Path, service_name: str
) -> None:
    """CONSUL_CAPATH trusts every certificate in the folder, whatever the files are called."""
    trustme.CA().cert_pem.write_to_path(tmp_path / "another")
    (tmp_path / "ours").write_bytes((agent.certificates / "ca.pem").read_bytes())
    environment(CONSUL_CACERT=None, CONSUL_CAPATH=tmp_path)
    await works(service_name)


async def test_no_verification_on_request(environment: Callable[..., None], service_name: str) -> None:
    """CONSUL_HTTP_SSL_VERIFY=false takes any certificate, of any name."""
    environment(CONSUL_CACERT=None, CONSUL_TLS_SERVER_NAME=None, CONSUL_HTTP_SSL_VERIFY="false")
    await works(service_name)


def test_an_authority_that_joins_the_file_counts(
    environment: Callable[..., None], agent: Reachable, tmp_path: Path
) -> None:
    """Without a restart, a certificate of an authority that came into CONSUL_CACERT later is accepted."""
    file, new = tmp_path / "ca.pem", tmp_path / "new.pem"
    trustme.CA().cert_pem.write_to_path(file)
    environment(CONSUL_CACERT=file)
    with ServiceRegistry(settings=ConsulSettings()) as registry:
        with pytest.raises(RegistryUnavailableError, match="CONSUL_CACERT"):
            registry.discover_all_services()
        new.write_bytes(file.read_bytes() + (agent.certificates / "ca.pem").read_bytes())
        new.replace(file)
        assert "consul" in registry.discover_all_services()
        file.unlink()
        assert "consul" in registry.discover_all_services()


@pytest.mark.parametrize(
    ("variables", "advice"),
    [
        ({"CONSUL_CACERT": None}, "CONSUL_CACERT"),
        ({"CONSUL_TLS_SERVER_NAME": None}, "CONSUL_TLS_SERVER_NAME"),
        ({"CONSUL_CLIENT_CERT": None, "CONSUL_CLIENT_KEY": None}, "CONSUL_CLIENT_CERT"),
    ],
)
async def test_a_failure_of_tls_says_what_to_set(
    variables: dict[str, None], advice: str, environment: Callable[..., None], service_name: str
) -> None:
    """Where TLS is what failed, the error names the variable to set and does not ask whether Consul is running."""
    environment(**variables)
    with ServiceRegistry(settings=ConsulSettings()) as registry:
        said = []
        with pytest.raises(RegistryUnavailableError) as caught:
            registry.discover_service(service_name)
        said.append(str(caught.value))
        async with ServiceDiscoveryClient(registry) as client:
            with pytest.raises(RegistryUnavailableError) as caught:
                await client.get(service_name, "/")
        said.append(str(caught.value))
    assert [advice in text and "is it running" not in text for text in said] == [True, True], said


def test_plain_and_tls_are_told_apart(environment: Callable[..., None], agent: Reachable) -> None:
    """http to an https port quotes what came back; https to an http port asks whether it speaks plain http."""
    environment(CONSUL_HTTP_ADDR=f"http://127.0.0.1:{agent.https_port}")
    with (
        ServiceRegistry(settings=ConsulSettings()) as registry,
        pytest.raises(RegistryUnavailableError, match="400 'Client sent an HTTP request to an HTTPS server"),
    ):
        registry.discover_service("cards")
    environment(CONSUL_HTTP_ADDR=f"https://127.0.0.1:{agent.http_port}")
    with (
        ServiceRegistry(settings=ConsulSettings()) as registry,
        pytest.raises(RegistryUnavailableError, match="does it speak plain http there"),
    ):
        registry.discover_service("cards")


def test_bad_files_are_clear_errors(environment: Callable[..., None], agent: Reachable, tmp_path: Path) -> None:
    """A file that can't be used is an InvalidInputError that names it; an encrypted key asks for no password."""
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "locked.pem").write_text(LOCKED)
    for variables in (
        {"CONSUL_CLIENT_CERT": tmp_path / "nowhere"},
        {"CONSUL_CLIENT_KEY": tmp_path / "nowhere"},
        {"CONSUL_CLIENT_KEY": tmp_path / "locked.pem"},
        {"CONSUL_CACERT": None, "CONSUL_CAPATH": tmp_path / "nowhere"},
        {"CONSUL_CACERT": None, "CONSUL_CAPATH": empty},
    ):
        environment(**variables)
        path = str(next(value for value in variables.values() if value))
        with pytest.raises(InvalidInputError, match=path):
            ServiceRegistry(settings=ConsulSettings())


async def test_a_unix_socket(environment: Callable[..., None], agent: Reachable, service_name: str) -> None:
    """``unix://`` leads to the agent's socket."""
    environment(CONSUL_HTTP_ADDR=f"unix://{agent.socket}")
    await works(service_name)


# httpcore leaves it to the garbage collector to close a Unix socket that could not be connected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_missing_unix_socket_is_named(environment: Callable[..., None]) -> None:
    """Where nobody listens, the error names the path."""
    environment(CONSUL_HTTP_ADDR="unix:///nowhere/consul.sock")
    with (
        ServiceRegistry(settings=ConsulSettings()) as registry,
        pytest.raises(RegistryUnavailableError, match=r"unix:///nowhere/consul\.sock can't be reached"),
    ):
        registry.discover_service("cards")


@pytest.mark.parametrize(
    ("answer", "quoted"),
    [
        (
            Answer(429, b"Your IP is issuing too many concurrent connections, please rate limit your calls\n"),
            "too many",
        ),
        (Answer(401, b"<h1>Who are  you?</h1>"), "401 '<h1>Who are you?</h1>'"),
        (Answer(404, b"x" * 9999), "404 'xxx"),
        (Answer(204, b""), "204 ''"),
    ],
)
def test_what_came_back_is_quoted(answer: Answer, quoted: str, serve: Serve) -> None:
    """An answer without Consul's headers is told in its own words, cut short."""
    with ServiceRegistry("127.0.0.1", serve(lambda _: answer).port) as registry:
        with pytest.raises(RegistryUnavailableError, match="answered with an error") as caught:
            registry.discover_service("cards")
        assert quoted in str(caught.value)
        assert len(str(caught.value)) < 400


# -- fork --------------------------------------------------------------------------------------------------------------


def sockets() -> set[str]:
    """The sockets that this process has open, by the system's own names."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found.add(str(descriptor.readlink()))
        except OSError:
            continue
    return {name for name in found if name.startswith("socket:")}


@pytest.mark.real
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads Linux's list of open sockets")
def test_a_child_uses_a_socket_of_its_own(serve: Serve) -> None:
    """A registry that was used before a fork asks over another connection in the child, and goes on in the parent."""
    server = serve(lambda _: Answer(200, b"[]", {"X-Consul-Index": "7", "X-Consul-Default-ACL-Policy": "allow"}))
    with ServiceRegistry("127.0.0.1", server.port) as registry:
        registry.discover_service("cards")
        (connection,) = server.connections
        before, (read, write) = sockets(), os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, b"own" if registry.discover_service("cards") == [] and sockets() - before else b"shared")
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(read, 10) == b"own"
        registry.discover_service("cards")
        assert connection in server.connections
    os.close(read)
    os.close(write)
    assert len(server.requests) == 3
