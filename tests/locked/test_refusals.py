"""Without a token, with somebody else's, and with one that has lost its right, nothing gets through."""

from collections.abc import Callable
from contextlib import suppress

import pytest

from registry import RegistryError, ServiceRegistry
from tests.e2e.report import Row
from tests.e2e.system import wait_until
from tests.locked.system import LockedSystem

OWN, OTHER = "research-api", "backend-api"
TOKEN_TTL = 5.0
"""Seconds, as in deploy/compose/locked/agent.json."""
GHOST = {"Name": OTHER, "ID": "ghost", "Address": "10.0.0.1", "Port": 80}


@pytest.fixture(params=["none", "foreign", "lost", "invented"])
def weak(system: LockedSystem, request: pytest.FixtureRequest) -> ServiceRegistry:
    """Somebody without the rights of backend-api: each in another way."""
    match request.param:
        case "none":
            return system.registry_of(None)
        case "foreign":
            return system.registry_of(system.token("edge"))
        case "invented":
            return system.registry_of("01234567-89ab-4def-8123-456789abcdef")
        case _:
            return system.registry_of(lost(system))


def lost(system: LockedSystem) -> str:
    """A token that could do what backend-api can, until its policy was taken from it."""
    management = system.token("management")
    made = system.ask("PUT", "/v1/acl/token", management, {"Policies": [{"Name": OTHER}], "Description": "lost"}).json()
    able = system.registry_of(made["SecretID"])

    def registered() -> bool:
        with suppress(RegistryError):
            return able.register_service(OTHER, "10.0.0.1", 80, service_id="lost") == "lost"
        return False

    # The agent asks any server, which may not have heard of the token yet; then it keeps that for so long.
    wait_until(registered, TOKEN_TTL + 3, "the token is known")
    assert able.deregister_service("lost")
    path = f"/v1/acl/token/{made['AccessorID']}"
    assert system.ask("PUT", path, management, {"Policies": [], "Description": "lost"}).status_code == 200

    def denied() -> bool:
        answer = system.ask("PUT", "/v1/agent/service/register", str(made["SecretID"]), GHOST)
        if answer.status_code == 200:
            system.registry.deregister_service("ghost")
        return answer.status_code == 403

    # Agents keep what they know of a token for so long.
    wait_until(denied, TOKEN_TTL + 3, "the right is lost")
    return str(made["SecretID"])


def refused(act: Callable[[], object], *secrets: str | None) -> str:
    """What was said when it was refused: that, and no secret."""
    with pytest.raises(RegistryError) as caught:
        act()
    said = str(caught.value)
    assert "denied" in said or "Permission" in said, said
    assert [secret for secret in secrets if secret and secret in said + repr(caught.value)] == []
    return said


def test_nobody_weak_registers_reads_or_deregisters(system: LockedSystem, weak: ServiceRegistry) -> None:
    """Registering as another service, and deregistering its instance, is refused and said so; nothing is changed."""
    before = system.passing()
    token = weak.settings.read_token()
    refused(lambda: weak.register_service(OTHER, "10.0.0.1", 80, service_id="ghost"), token)
    for instance in before:
        refused(lambda instance=instance: weak.deregister_service(instance), token)  # type: ignore[misc]
    assert system.passing() == before
    assert "ghost" not in system.registered()


@pytest.mark.parametrize("who", ["none", "invented", OWN])
def test_who_may_not_read_is_told(system: LockedSystem, who: str) -> None:
    """A service that is hidden from a token is denied, not absent: research-api may not see orchestrator-api."""
    token = {"none": None, "invented": "01234567-89ab-4def-8123-456789abcdef"}.get(who, OWN)
    weak = system.registry_of(system.token(OWN) if token == OWN else token)
    refused(lambda: weak.discover_service("orchestrator-api"), weak.settings.read_token())


def test_a_service_does_what_it_needs(system: LockedSystem) -> None:
    """The same token registers its own service, reads the services that it calls, and deregisters again."""
    own = system.registry_of(system.token(OWN))
    assert own.register_service(OWN, "10.0.0.1", 80, service_id="second") == "second"
    assert {instance.id for instance in own.discover_service(OTHER)} == system.passing()
    assert own.deregister_service("second")


HOSTILE: list[tuple[str, str, object]] = [
    ("PUT", "/v1/agent/service/register", GHOST),
    ("PUT", "/v1/agent/service/register", {"Name": "consul", "Port": 8300}),
    ("PUT", "/v1/agent/service/register", {"Name": "never-heard-of", "Port": 80}),
    ("PUT", "/v1/agent/service/register", {"Name": OTHER, "ID": f"{OWN}-x", "Port": 80}),
    ("PUT", "/v1/agent/service/maintenance/{backend}?enable=true", None),
    ("PUT", "/v1/agent/service/deregister/{backend}", None),
    ("PUT", "/v1/agent/check/register", {"Name": "mine", "TTL": "10s"}),
    ("PUT", "/v1/agent/check/register", {"Name": "x", "ServiceID": "{backend}", "TTL": "10s"}),
    ("PUT", "/v1/agent/check/deregister/service:{backend}", None),
    ("PUT", "/v1/agent/maintenance?enable=true", None),
    ("PUT", "/v1/agent/leave", None),
    ("PUT", "/v1/agent/reload", None),
    ("PUT", "/v1/agent/join/10.0.0.1", None),
    ("PUT", "/v1/agent/force-leave/consul-1", None),
    ("PUT", "/v1/agent/token/agent", {"Token": "x"}),
    (
        "PUT",
        "/v1/catalog/register",
        {"Node": "agent", "Address": "10.0.0.1", "Service": {"Service": OTHER, "Port": 80}},
    ),
    ("PUT", "/v1/catalog/register", {"Node": "mine", "Address": "10.0.0.1"}),
    ("PUT", "/v1/catalog/deregister", {"Node": "agent"}),
    ("PUT", "/v1/catalog/deregister", {"Node": "agent", "ServiceID": "{backend}"}),
    ("PUT", "/v1/kv/anything", "x"),
    ("GET", "/v1/kv/anything", None),
    ("DELETE", "/v1/kv/?recurse", None),
    ("PUT", "/v1/event/fire/deploy", "x"),
    ("PUT", "/v1/session/create", {"Node": "agent"}),
    ("POST", "/v1/query", {"Name": OTHER, "Service": {"Service": OTHER}}),
    ("PUT", "/v1/txn", [{"KV": {"Verb": "set", "Key": "x", "Value": "eA=="}}]),
    ("PUT", "/v1/acl/bootstrap", None),
    ("PUT", "/v1/acl/token", {"Policies": [{"Name": "global-management"}]}),
    ("PUT", "/v1/acl/policy", {"Name": "mine", "Rules": 'acl = "write"'}),
    ("GET", "/v1/acl/tokens", None),
    ("PUT", "/v1/config", {"Kind": "service-intentions", "Name": OTHER, "Sources": [{"Name": "*", "Action": "allow"}]}),
    ("DELETE", f"/v1/config/service-intentions/{OTHER}", None),
    ("PUT", "/v1/config", {"Kind": "service-resolver", "Name": OTHER, "Redirect": {"Service": OWN}}),
    ("PUT", "/v1/connect/ca/configuration", {"Provider": "consul", "Config": {}}),
    ("GET", "/v1/connect/ca/configuration", None),
    ("GET", "/v1/operator/keyring", None),
    ("POST", "/v1/operator/keyring", {"Key": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}),
    ("DELETE", "/v1/operator/raft/peer?address=10.0.0.1:8300", None),
    ("POST", "/v1/operator/raft/transfer-leader", None),
    ("GET", "/v1/snapshot", None),
    ("PUT", "/v1/snapshot", "x"),
]
"""What somebody would try who has taken over research-api, or stands in its network: method, path, body."""


def test_hostile_shapes(system: LockedSystem, scene: Row) -> None:
    """Nothing that somebody without a token tries gets through, nor somebody with that of research-api."""
    instance = min(system.passing())
    through = []
    for token in (None, system.token(OWN)):
        for method, path, body in HOSTILE:
            shaped = path.replace("{backend}", instance)
            sent = {**body, "ServiceID": instance} if isinstance(body, dict) and "ServiceID" in body else body
            answer = system.ask(method, shaped, token, sent)
            if answer.status_code < 400 and answer.text.strip() not in {"[]", "null"}:
                through.append((method, shaped, answer.text[:100]))
    assert through == []
    assert system.everyone_passes()
    assert system.ghosts() == set()
    scene.saw(f"{len(HOSTILE)} requests, each without a token and with that of {OWN}: none got through")


def test_nothing_is_said_in_plain(system: LockedSystem) -> None:
    """Consul answers no plain HTTP, and no port of a server is published."""
    assert system.http.get(system.consul.replace("https", "http")).status_code == 400
    for container in system.containers():
        published = {port for port, hosts in container.ports.items() if hosts}
        if container.labels["com.docker.compose.service"].startswith("consul-"):
            assert published == set()
