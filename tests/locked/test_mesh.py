"""Mutual TLS end to end in containers: what is let in, what is not, and certificates that change under load."""

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deploy.keeper.grants import EDGE, intentions
from tests.e2e.report import Row
from tests.e2e.system import BACKEND, run_in, wait_until
from tests.e2e.traffic import BY_NAME, Traffic, check_once, traffic
from tests.e2e.traffic import EDGE as BY_EDGE
from tests.locked.system import LockedSystem
from tools.services import SERVICES, Service

RATE = 15.0
BEFORE, AFTER = 60, 150
"""Calls of every kind before and after something is done."""
CARD = {"title": "Over mutual TLS", "content": "Both sides say who they are.", "tags": []}
_PLAIN = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5) as connection:
    connection.settimeout(5)
    connection.sendall(b"GET /api/cards HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
    try:
        print(connection.recv(4096))
    except OSError as error:
        print(error)
"""
_NAMELESS = """
import http.client, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
connection = http.client.HTTPSConnection(sys.argv[1], int(sys.argv[2]), timeout=5, context=context)
connection.request("GET", "/api/cards")
answer = connection.getresponse()
print(answer.status, answer.read().decode())
"""
_SHOWN = """
import socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect("/mesh/haproxy.sock")
    connection.sendall(f"show ssl {sys.argv[1]}\\n".encode())
    print(b"".join(iter(lambda: connection.recv(4096), b"")).decode())
"""


def shown(system: LockedSystem, what: str) -> str:
    """What HAProxy uses of a file: serial number, issuer, and so on."""
    return run_in(system.container("edge-identity"), "python", "-c", _SHOWN, what)


def fingerprint(system: LockedSystem) -> str:
    """Of the certificate that the edge shows from now on."""
    lines = shown(system, "cert /mesh/edge.pem").splitlines()
    return next(line for line in lines if line.startswith("SHA1"))


def none_failed(scene: Row) -> None:
    """No call failed, nothing was done twice, and nothing is lost."""
    assert scene.traffic is not None
    for side in (BY_NAME, BY_EDGE):
        for method in ("GET", "POST"):
            assert scene.traffic.column(side, method).failures == (), (side, method)
        check_once(scene.traffic.column(side, "POST"))


def check_gets(load: Traffic) -> None:
    """No GET by name failed, the edge lost none, and no POST was done twice."""
    assert load.column(BY_NAME, "GET").failures == ()
    # A 503 of a backend itself says that it, or the database, has no time left: the edge did its part.
    assert [call for call in load.column(BY_EDGE, "GET").failures if call.instance is None] == []
    for side in (BY_NAME, BY_EDGE):
        check_once(load.column(side, "POST"))


def test_end_to_end(system: LockedSystem, scene: Row) -> None:
    """A card is published through the edge, over mutual TLS from hop to hop; every instance says that it is native."""
    made = system.http.post(
        f"{system.edge['orchestrator-api']}/api/publish", json=CARD, headers=system.pass_of("alice")
    )
    assert made.status_code == 201, made.text
    for service in SERVICES:
        entries = system.get(f"/v1/health/connect/{service.name}?passing")
        assert {entry["Service"]["ID"] for entry in entries} == system.passing(service)
        assert all(entry["Service"]["Connect"] == {"Native": True} for entry in entries)
        # Nobody asked the agent for a certificate, so it has no key that it could give away (CVE-2026-105765).
        leaf = f"/v1/agent/connect/ca/leaf/{service.name}"
        for token in (None, system.token("edge")):
            assert system.ask("GET", leaf, token).status_code == 403


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_nothing_else_is_let_in(system: LockedSystem, service: Service) -> None:
    """Plain HTTP is no answer, and TLS without a certificate is 403, from inside of the network."""
    replica = system.replicas(service)[0]
    client, where = system.container("client"), (replica.address, str(replica.service.port))
    plain = run_in(client, "python", "-c", _PLAIN, *where)
    assert "HTTP/1.1" not in plain
    assert run_in(client, "python", "-c", _NAMELESS, *where).startswith("403 ")


def restart(system: LockedSystem) -> None:
    """What keeps the edge's certificate starts anew, with a new key."""
    system.container("edge-identity").restart(timeout=5)


def new_root(system: LockedSystem) -> None:
    """The mesh gets a new authority, cross-signed by the old one: everybody gets a new certificate."""
    key = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    body = {"Provider": "consul", "Config": {"LeafCertTTL": "72h", "PrivateKey": key.decode()}}
    answer = system.ask("PUT", "/v1/connect/ca/configuration", system.token("management"), body)
    assert answer.is_success, answer.text


@pytest.mark.parametrize("renew", [restart, new_root], ids=lambda renew: renew.__name__)
def test_certificates_change(system: LockedSystem, scene: Row, renew: Callable[[LockedSystem], None]) -> None:
    """The edge gets a new certificate while it runs; once because the whole mesh has a new authority."""
    scene.name = f"The edge's certificate is renewed: {renew.__name__.replace('_', ' ')}"
    before = fingerprint(system)
    with traffic(system, RATE) as load:
        scene.traffic = load
        load.go_on(BEFORE)
        renew(system)
        took = wait_until(lambda: fingerprint(system) != before, 60, "HAProxy has a new certificate")
        load.go_on_for(AFTER)
    scene.saw(f"in use {took:.1f} s later")
    none_failed(scene)


def test_a_backend_is_killed(system: LockedSystem, scene: Row) -> None:
    """kill -9 of one of three that serve natively: no GET fails, and no POST is done twice."""
    hit = system.replicas()[1]
    instance = hit.instance
    with traffic(system, RATE) as load:
        scene.traffic = load
        load.go_on(BEFORE)
        hit.container.kill()
        noticed = wait_until(lambda: instance not in system.passing(), 40, "Consul notices")
        load.go_on_for(AFTER)
    scene.saw(f"critical in Consul after {noticed:.1f} s")
    check_gets(load)


def test_backends_are_scaled(system: LockedSystem, scene: Row) -> None:
    """backend-api, native, scales 3 → 5 → 1: by name nothing fails, by the edge no GET."""
    with traffic(system, RATE) as load:
        scene.traffic = load
        load.go_on(BEFORE)
        for backends in (5, 1):
            system.scale(backends)
            wait_until(system.everyone_passes, 90, f"{backends} pass")
            load.go_on_for(BEFORE)
    assert load.column(BY_NAME, "POST").failures == ()
    check_gets(load)


def test_an_intention_reaches_kept_connections(system: LockedSystem, scene: Row) -> None:
    """Denied in Consul, the edge gets 403 within a second, on connections that it has; allowed again, it is served."""
    url = f"{system.edge[BACKEND.name]}/api/cards?limit=1"

    def answers(status: int) -> Callable[[], bool]:
        return lambda: system.http.get(url).status_code == status

    def write(action: str) -> None:
        sources = [
            {**source, "Action": action if source["Name"] == EDGE else source["Action"]}
            for source in intentions()[BACKEND.name]
        ]
        entry = {"Kind": "service-intentions", "Name": BACKEND.name, "Sources": sources}
        assert system.ask("PUT", "/v1/config", management, entry).is_success

    management = system.token("management")
    assert answers(200)()
    try:
        write("deny")
        denied = wait_until(answers(403), 1.0, "the edge is refused")
        problem = system.http.get(url).json()
    finally:
        write("allow")
    allowed = wait_until(answers(200), 1.0, "the edge is served")
    assert problem["detail"] == f"no intention allows {EDGE} to call {BACKEND.name}"
    scene.saw(f"denied after {denied * 1000:.0f} ms, allowed after {allowed * 1000:.0f} ms")
