"""What a container in the wrong hands, or one that runs wild, can do to the others: what it reaches, what it takes."""

import json

import pytest
from docker.models.containers import Container

from tests.e2e.system import NETWORK, PROJECT, System, run_in

DATABASE_NETWORK = f"{PROJECT}_database"
POSTGRES_PORT = 5432
MEMORY = 256 * 2**20
PROCESSES = 256
_CONNECT = """
import socket, sys
for host, port in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    try:
        socket.create_connection((host, port), timeout=1.0).close()
        print("reached")
    except socket.gaierror:
        print("unknown")
    except OSError as error:
        print("refused" if isinstance(error, ConnectionRefusedError) else "silence")
"""
_THREADS = """
import threading
end, started = threading.Event(), 0
try:
    while started < 1000:
        threading.Thread(target=end.wait).start()
        started += 1
except RuntimeError:
    pass
print(started)
end.set()
"""


def address(container: Container, network: str) -> str:
    """Of a container, in one of its networks."""
    container.reload()
    return str(container.attrs["NetworkSettings"]["Networks"][network]["IPAddress"])


def reached(container: Container, *places: tuple[str, int]) -> list[str]:
    """How it ends when this container connects to each of these hosts and ports."""
    arguments = [str(part) for place in places for part in place]
    return run_in(container, "python", "-c", _CONNECT, *arguments).split()


def test_only_the_backend_reaches_the_database(system: System) -> None:
    """To research-api and orchestrator-api, Postgres has no name, and neither its address nor backend-api's beside it
    answers. backend-api itself reaches all three."""
    postgres = address(system.container("postgres"), DATABASE_NETWORK)
    backend, *_ = system.replicas()
    places = [
        ("postgres", POSTGRES_PORT),
        (postgres, POSTGRES_PORT),
        (address(backend.container, DATABASE_NETWORK), backend.service.port),
    ]
    assert reached(backend.container, *places) == ["reached"] * 3
    for name in ("research", "orchestrator"):
        assert reached(system.container(name), *places) == ["unknown", "silence", "silence"], name


def test_the_edge_does_not_reach_the_database(system: System) -> None:
    """It is the container that strangers talk to: it reaches backend-api, and not Postgres."""
    connect = "exec 3<>/dev/tcp/{}/{}"
    edge, backend = system.container("edge"), system.replicas()[0]
    run_in(edge, "timeout", "2", "bash", "-c", connect.format(backend.address, backend.service.port))
    for host in ("postgres", address(system.container("postgres"), DATABASE_NETWORK)):
        code, _ = edge.exec_run(["timeout", "2", "bash", "-c", connect.format(host, POSTGRES_PORT)])
        assert code != 0, host


def test_postgres_reaches_no_service_but_the_backend(system: System) -> None:
    """From its network no way leads to the other one: it reaches neither Consul nor research-api."""
    connect = "exec 3<>/dev/tcp/{}/{}"
    postgres, backend = system.container("postgres"), system.replicas()[0]
    near = address(backend.container, DATABASE_NETWORK)
    run_in(postgres, "timeout", "2", "bash", "-c", connect.format(near, backend.service.port))
    for name, port in (("consul", 8500), ("research", 8001)):
        far = connect.format(address(system.container(name), NETWORK), port)
        code, _ = postgres.exec_run(["timeout", "2", "bash", "-c", far])
        assert code != 0, name


def test_the_limits_are_in_effect(system: System) -> None:
    """The engine holds every container to its memory, swap included, to its processes and to one CPU."""
    for container in system.containers():
        host = container.attrs["HostConfig"]
        name = container.labels["com.docker.compose.service"]
        memory = MEMORY * (2 if name in {"postgres", "client"} else 1)
        limits = (host["Memory"], host["MemorySwap"], host["PidsLimit"], host["NanoCpus"])
        assert limits == (memory, memory, PROCESSES, 0 if name == "client" else 10**9), container.name


@pytest.mark.parametrize("name", ["research", "orchestrator"])
def test_a_container_that_runs_wild_is_stopped_at_its_limit(system: System, name: str) -> None:
    """A thousand threads are asked for: the engine gives some, and the service goes on answering."""
    started = int(run_in(system.container(name), "python", "-c", _THREADS))
    assert 0 < started < PROCESSES
    assert json.loads(system.http.get(f"{system.edge[f'{name}-api']}/health").text)["status"] == "healthy"
