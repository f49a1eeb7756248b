"""Who may do what in Consul: one table of callers, and the policies, tokens and intentions that follow from it."""

from collections.abc import Mapping
from typing import Any

__all__ = [
    "AGENT",
    "CALLS",
    "DATACENTER",
    "EDGE",
    "FRONT_DOOR",
    "SERVERS",
    "SERVERS_NAME",
    "Identity",
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


def policies() -> dict[str, str]:
    """Policy → its rules. A service may register under its own name, and read nodes and the services that it calls."""
    found = {name: _rules({name: "write"} | dict.fromkeys(callees, "read")) for name, callees in CALLS.items()}
    found[EDGE] = _rules({EDGE: "write"} | dict.fromkeys(CALLS, "read"))
    found["dns"] = _rules(dict.fromkeys(CALLS, "read"))
    found["ui"] = _UI.strip()
    return found


def _rules(services: Mapping[str, str]) -> str:
    return "\n".join([*(f'service "{name}" {{ policy = "{right}" }}' for name, right in services.items()), _NODES])


def identities() -> dict[str, Identity]:
    """Token → what it may do: each policy has one token, and each agent one that speaks for its own node only."""
    found: dict[str, Identity] = {name: {"Policies": [{"Name": name}]} for name in policies()}
    for node in (*SERVERS, AGENT):
        found[node] = {"NodeIdentities": [{"NodeName": node, "Datacenter": DATACENTER}]}
    return found


def intentions() -> dict[str, list[dict[str, str]]]:
    """Service → who may call it, in a mesh; everybody else may not."""
    found = {
        name: [{"Name": caller, "Action": "allow"} for caller in (*sorted(_callers(name)), EDGE)] for name in CALLS
    }
    return found | {"*": [{"Name": "*", "Action": "deny"}]}


def _callers(name: str) -> list[str]:
    return [caller for caller, callees in CALLS.items() if name in callees or caller == name == FRONT_DOOR]
