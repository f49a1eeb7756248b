"""Native callers and services meet sidecar proxies, Consul's own and Envoy, in both directions."""

import asyncio
import json
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from registry import ConnectionOptions, ConsulResolver, ConsulSettings, NoHealthyInstanceError, ServiceDiscoveryClient
from registry.mesh.agent import AgentSource
from registry.mesh.identity import MeshIdentity
from registry.testing.fixtures import ConsulAgent
from registry.testing.ports import free_ports
from tests.support.command import running_service, wait_until
from tests.support.envoy import EnvoyNotFoundError, find_envoy
from tests.support.server import Answer, RecordingServer, Serve

pytestmark = pytest.mark.real

HERE = Path(__file__).parent
Command = Callable[[str, ConsulAgent, Path, Path], list[str]]


def built_in(service_id: str, agent: ConsulAgent, consul: Path, directory: Path) -> list[str]:
    """Consul's own proxy."""
    return [str(consul), "connect", "proxy", f"-http-addr={agent.url}", f"-sidecar-for={service_id}"]


def envoy(service_id: str, agent: ConsulAgent, consul: Path, directory: Path) -> list[str]:
    """Envoy, told by Consul what to do."""
    try:
        binary = find_envoy()
    except EnvoyNotFoundError as error:
        pytest.skip(f"no Envoy: {error}")
    made = subprocess.run(
        [
            *(str(consul), "connect", "envoy", "-bootstrap", f"-sidecar-for={service_id}", f"-http-addr={agent.url}"),
            *(f"-grpc-addr=127.0.0.1:{agent.grpc_port}", f"-admin-bind=127.0.0.1:{free_ports(1)[0]}"),
            "-ignore-envoy-compatibility",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    bootstrap = directory / "bootstrap.json"
    bootstrap.write_text(made.stdout)
    return [str(binary), "-c", str(bootstrap), "--disable-hot-restart", "--concurrency", "1", "-l", "warning"]


@contextmanager
def running(command: list[str], log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"HOME": str(log.parent)})
    try:
        yield
    finally:
        process.kill()
        process.wait()


class Scene:
    """A plain service with a sidecar proxy, by which it also calls a native one."""

    def __init__(self, agent: ConsulAgent, plain: RecordingServer) -> None:
        self.agent = agent
        self.plain = plain
        self.name, self.native = f"shop-{uuid.uuid4().hex[:8]}", f"stock-{uuid.uuid4().hex[:8]}"
        self.proxy_port, self.upstream_port = free_ports(2)
        self.consul = httpx.Client(base_url=agent.url, trust_env=False)

    def register(self) -> None:
        upstream = {"DestinationName": self.native, "LocalBindPort": self.upstream_port}
        sidecar = {"Port": self.proxy_port, "Proxy": {"Upstreams": [upstream]}}
        entry = {"Name": self.name, "Address": "127.0.0.1", "Port": self.plain.port}
        entry |= {"Connect": {"SidecarService": sidecar}}
        self.consul.put("/v1/agent/service/register", json=entry).raise_for_status()

    def deregister(self) -> None:
        self.consul.put(f"/v1/agent/service/deregister/{self.name}")
        self.consul.close()

    def proxy_passes(self) -> bool:
        """Whether Consul has seen that the proxy listens."""
        return bool(self.consul.get(f"/v1/health/connect/{self.name}?passing").json())


@pytest.fixture(params=[built_in, envoy])
def scene(
    request: pytest.FixtureRequest, consul_agent: ConsulAgent, consul_binary: Path, serve: Serve, tmp_path: Path
) -> Iterator[Scene]:
    """With a proxy that is found."""
    made = Scene(consul_agent, serve(lambda _: Answer(body=b'"plain"')))
    with ExitStack() as stack:
        made.register()
        stack.callback(made.deregister)
        log = tmp_path / "proxy.log"
        stack.enter_context(running(request.param(made.name, consul_agent, consul_binary, tmp_path), log))
        try:
            wait_until(made.proxy_passes, 90)
        except AssertionError:
            pytest.fail(log.read_text()[-3000:])
        yield made


def test_native_caller_reaches_a_service_behind_a_proxy(scene: Scene) -> None:
    """The proxy is found under its service's name, and proves to be that service."""
    settings = ConsulSettings(host="127.0.0.1", port=scene.agent.http_port)

    async def call() -> list[object]:
        async with MeshIdentity("driver", AgentSource(settings, allow_unsafe_agent=True)) as me:
            resolver = ConsulResolver(settings, mesh="true")
            async with ServiceDiscoveryClient(resolver, connections=ConnectionOptions(peers=me)) as client:
                answers = [(await client.post(scene.name, "/cards", json={})).json() for _ in range(20)]
                (state,) = client.explain(scene.name).endpoints
                assert (state.id, state.connect) == (f"{scene.name}-sidecar-proxy", True)
                assert state.outcomes == {"ok": 20}
                return answers

    assert asyncio.run(call()) == ["plain"] * 20
    assert len(scene.plain.requests) == 20


def test_what_a_proxy_denies_does_not_arrive(scene: Scene) -> None:
    """A proxy can't answer 403: it closes the connection, which an instance that broke would do, too."""
    settings = ConsulSettings(host="127.0.0.1", port=scene.agent.http_port)
    exact = f"/v1/connect/intentions/exact?source=driver&destination={scene.name}"
    scene.consul.put(exact, json={"Action": "deny"}).raise_for_status()

    async def call() -> str:
        async with MeshIdentity("driver", AgentSource(settings, allow_unsafe_agent=True)) as me:
            resolver, connections = ConsulResolver(settings, mesh="true"), ConnectionOptions(peers=me)
            async with asyncio.timeout(60), ServiceDiscoveryClient(resolver, connections=connections) as client:
                while True:  # until the proxy has heard of the intention
                    try:
                        await client.post(scene.name, "/cards", json={}, headers={"Connection": "close"})
                    except httpx.TransportError as error:
                        before = len(scene.plain.requests)
                        with pytest.raises((httpx.TransportError, NoHealthyInstanceError)):
                            await client.post(scene.name, "/cards", json={})
                        assert len(scene.plain.requests) == before
                        return type(error).__name__

    try:
        print(f"denied by a proxy: {asyncio.run(call())}")  # noqa: T201
    finally:
        scene.consul.delete(exact).raise_for_status()


def test_caller_behind_a_proxy_reaches_a_native_service(scene: Scene) -> None:
    """The native service sees who calls: the service whose proxy it is."""
    env = {"CONSUL_CONNECT": "true", "CONSUL_CONNECT_ALLOW_UNSAFE_AGENT": "true"}
    native = running_service("mesh_app:app", scene.native, consul=scene.agent, cwd=HERE, wait=False, env=env)
    with native as process, httpx.Client(base_url=f"http://127.0.0.1:{scene.upstream_port}", trust_env=False) as shop:
        wait_until(process.is_found, 90)

        def answers() -> bool:
            try:
                return shop.post("/work").is_success
            except httpx.TransportError:
                return False

        wait_until(answers, 60)
        callers = {json.loads(shop.post("/work").content)["caller"] for _ in range(20)}
    assert callers == {scene.name}
