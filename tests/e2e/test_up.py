"""Everything is up: found the same way by all who ask, working together, and reachable through the edge."""

import json

import dns.message
import dns.query
import dns.rdatatype
import pytest

from tests.e2e.report import Row
from tests.e2e.system import BACKENDS, System, run_in
from tools.services import SERVICES, Service

CARD = {"title": "Consul knows who is healthy", "content": "Every service registers with Consul.", "tags": ["consul"]}


def test_up(system: System, scene: Row) -> None:
    """Everything is up, and works together."""
    edge = system.edge["orchestrator-api"]
    card = system.http.post(f"{edge}/api/publish", json=CARD)
    assert card.status_code == 201, card.text
    stored = system.http.get(f"{system.edge['backend-api']}/api/cards/{card.json()['id']}")
    assert stored.json()["title"] == CARD["title"]
    enriched = system.http.post(f"{edge}/api/enrich", json={"content": CARD["content"]})
    assert card.json()["id"] in {suggestion.get("card_id") for suggestion in enriched.json()["suggestions"]}
    interface = system.http.get(f"{system.consul}/ui/")
    assert interface.status_code == 200
    assert "Consul" in interface.text
    assert system.answering(calls=10) == {replica.instance for replica in system.replicas()}
    scene.saw(f"{len(SERVICES)} services, {BACKENDS} backends, all found by Consul's API, its DNS and its catalog")


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_everyone_finds_the_same_instances(system: System, service: Service) -> None:
    """Consul's API, its DNS (SRV) and the command `consul catalog` name exactly the containers there are."""
    system.settle()
    expected = {(replica.address, service.port) for replica in system.replicas(service)}
    assert len(expected) == (BACKENDS if service.folder == "backend" else 1)
    found = system.registry.discover_service(service.name)
    assert {(instance.address, instance.port) for instance in found} == expected
    assert srv(system, f"{service.name}.service.consul") == expected
    assert service.name in run_in(system.container("consul"), "consul", "catalog", "services").split()
    catalog = json.loads(system.http.get(f"{system.consul}/v1/catalog/service/{service.name}").text)
    assert {(entry["ServiceAddress"], entry["ServicePort"]) for entry in catalog} == expected


def srv(system: System, name: str) -> set[tuple[str, int]]:
    """Addresses and ports that Consul's DNS has under this name."""
    query = dns.message.make_query(name, dns.rdatatype.SRV)
    answer = dns.query.tcp(query, "127.0.0.1", timeout=5, port=system.dns_port)
    addresses = {
        str(entry.name): record.address
        for entry in answer.additional
        for record in entry
        if record.rdtype == dns.rdatatype.A
    }
    return {(addresses[str(record.target)], record.port) for entry in answer.answer for record in entry}
