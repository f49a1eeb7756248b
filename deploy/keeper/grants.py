"""Who may do what in Consul: one table of callers, and the policies, tokens and intentions that follow from it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "AGENT",
    "CALLS",
    "COMPOSE",
    "DATACENTER",
    "EDGE",
    "FRONT_DOOR",
    "KUBERNETES",
    "SERVERS",
    "SERVERS_NAME",
    "Identity",
    "Place",
    "identities",
    "intentions",
    "policies",
]

CALLS: Mapping[str, tuple[str, ...]] = {
    "research-api": ("backend-api",),
    "backend-api": ("research-api",),
    "orchestrator-api": ("backend-api", "research-api"),
    # new-service: calls
}
"""Service → the services that it calls. Everything else follows from this."""
DATACENTER = "dc1"
SERVERS = ("consul-1", "consul-2", "consul-3")
SERVERS_NAME = "consul-servers"
"""All of them, as one name in the network."""
AGENT = "agent"
"""The node where the services are registered."""
EDGE = "edge"
FRONT_DOOR = "orchestrator-api"
"""Where people come in; its topology page asks every instance what it sees, its own siblings too."""


@dataclass(frozen=True)
class Place:
    """Where the system runs, and what Consul's agents are called there."""

    servers: Mapping[str, tuple[str, ...]]
    """Reader of a set of secrets → the nodes of the servers that share it."""
    servers_names: tuple[str, ...]
    """What the certificates of all of them are for: among others, one name in the network."""
    hosts: tuple[str, ...]
    """Where the keeper asks them."""
    agent: str
    """Reader, and token, of the agents where the services are."""
    agent_host: str
    """What the certificate of these agents is for."""
    known_nodes: bool
    """Whether there is one such agent, on the node of that name; else they are on nodes that nobody knows before."""
    edge: str | None
    """The edge's name in the mesh, where it is a member."""

    @property
    def nodes(self) -> tuple[str, ...]:
        """Those of the servers."""
        return tuple(node for nodes in self.servers.values() for node in nodes)


COMPOSE = Place({name: (name,) for name in SERVERS}, (SERVERS_NAME,), SERVERS, AGENT, "consul", True, EDGE)
KUBERNETES = Place(
    {"consul-server": ("consul-server-0", "consul-server-1", "consul-server-2")},
    # Services expect one name, CONSUL_TLS_SERVER_NAME, of agents and of servers that sign.
    servers_names=("consul-server", "consul-agent"),
    hosts=("consul-server",),
    agent="consul-agent",
    agent_host="consul-agent",
    known_nodes=False,
    edge=None,
)
"""What deploy/kubernetes calls them. An Ingress controller is no member of the mesh."""

Identity = dict[str, Any]
"""What a token is given, as Consul's API has it."""

_NODES = 'node_prefix "" { policy = "read" }'
_UI = """\
service_prefix "" {
  policy = "read"
  intentions = "read"
}
node_prefix "" { policy = "read" }
agent_prefix "" { policy = "read" }
operator = "read" """
_AGENTS = """\
node_prefix "" { policy = "write" }
service_prefix "" { policy = "read" }"""


def policies(place: Place = COMPOSE) -> dict[str, str]:
    """Policy → its rules. A service may register under its own name, and read nodes and the services that it calls."""
    found = {name: _rules({name: "write"} | dict.fromkeys(callees, "read")) for name, callees in CALLS.items()}
    if place.edge:
        found[place.edge] = _rules({place.edge: "write"} | dict.fromkeys(CALLS, "read"))
        found["dns"] = _rules(dict.fromkeys(CALLS, "read"))
    if not place.known_nodes:
        found[place.agent] = _AGENTS
    found["ui"] = _UI.strip()
    return found


def _rules(services: Mapping[str, str]) -> str:
    return "\n".join([*(f'service "{name}" {{ policy = "{right}" }}' for name, right in services.items()), _NODES])


def identities(place: Place = COMPOSE) -> dict[str, Identity]:
    """Token → what it may do: each policy has one token, and agents of known nodes one that speaks for these only."""
    found: dict[str, Identity] = {name: {"Policies": [{"Name": name}]} for name in policies(place)}
    agents = {place.agent: (place.agent,)} if place.known_nodes else {}
    for name, nodes in {**place.servers, **agents}.items():
        found[name] = {"NodeIdentities": [{"NodeName": node, "Datacenter": DATACENTER} for node in nodes]}
    return found


def intentions(place: Place = COMPOSE) -> dict[str, list[dict[str, str]]]:
    """Service → who may call it, in a mesh; everybody else may not."""
    edge = (place.edge,) if place.edge else ()
    found = {
        name: [{"Name": caller, "Action": "allow"} for caller in (*sorted(_callers(name)), *edge)] for name in CALLS
    }
    return found | {"*": [{"Name": "*", "Action": "deny"}]}


def _callers(name: str) -> list[str]:
    return [caller for caller, callees in CALLS.items() if name in callees or caller == name == FRONT_DOOR]
