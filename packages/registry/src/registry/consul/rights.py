"""Which right a request needs, as the line that grants it in a policy: what to do about "denied".

Source: https://developer.hashicorp.com/consul/docs/reference/acl/rule
"""

import json
import re
from collections.abc import Callable
from typing import TypeAlias
from urllib.parse import unquote

import httpx

__all__ = ["NODES", "NOT_FOUND", "advice", "needed", "reading"]

# "Permission denied: token with AccessorID '…' lacks permission 'service:write' on "cards""; before Consul 1.13
# "provided token lacks …", and from some endpoints only "Permission denied".
_LACKS = re.compile(r"""lacks permission '([a-z-]+):([a-z]+)'(?: on ["']([^"']*)["'])?""")
# Rules without a name. Source: as above, "Operator", "ACL", "Keyring", "Mesh" and "Peering".
_NAMELESS = {"acl", "keyring", "mesh", "operator", "peering"}
_ANY_NAME = "<the instance's service>"

Lines: TypeAlias = tuple[str, ...]

NOT_FOUND = "ACL not found"
"""What Consul says of a token that it does not know."""
NODES = 'node_prefix "" { policy = "read" }'


def _service(name: str, policy: str) -> str:
    return f'service "{name}" {{ policy = "{policy}" }}'


def reading(name: str) -> Lines:
    """What it takes to see the instances of a service: without the second, those on each node are left out."""
    return _service(name, "read"), NODES


_ALL_SERVICES: Lines = ('service_prefix "" { policy = "read" }', NODES)
# The path, of which a group holds what the right is for, and the lines.
_BY_PATH: tuple[tuple[str, Callable[[str], Lines]], ...] = (
    (r"/v1/(?:agent/health/service/name|health/service|health/connect)/(.+)", reading),
    (r"/v1/agent/(?:service/deregister/.+|check/.+)|/v1/catalog/deregister", lambda _: (_service(_ANY_NAME, "write"),)),
    (r"/v1/agent/connect/ca/leaf/(.+)", lambda name: (_service(name, "write"),)),
    (r"/v1/agent/(?:health/service/id|service)/.+", lambda _: (_service(_ANY_NAME, "read"),)),
    (r"/v1/catalog/services|/v1/agent/services", lambda _: _ALL_SERVICES),
    (r"/v1/health/state/.+|/v1/agent/checks", lambda _: reading(_ANY_NAME)),
    (r"/v1/catalog/nodes?(?:/.*)?", lambda _: (NODES,)),
    (r"/v1/agent/self", lambda _: ('agent_prefix "" { policy = "read" }',)),
)


def needed(url: httpx.URL, body: bytes = b"") -> Lines:
    """The lines of a policy that allow this request; none, where that is not known."""
    path = unquote(url.path)
    if path == "/v1/agent/service/register":
        entry = json.loads(body)  # Consul takes its keys in any case
        return tuple(_service(entry[key], "write") for key in entry if key.lower() == "name")
    if path == "/v1/connect/intentions/match":
        return tuple(f'service "{name}" {{ intentions = "read" }}' for name in url.params.get_list("name"))
    for pattern, lines in _BY_PATH:
        if found := re.fullmatch(pattern, path):
            return lines(found[1] if found.re.groups else "")
    return ()


def _said(text: str) -> Lines:
    """The line that grants what Consul says is missing; none, where it does not say."""
    found = _LACKS.search(text)
    if found is None:
        return ()
    resource, access, name = found.groups()
    if resource == "intention":
        return (f'service "{name}" {{ intentions = "{access}" }}',)
    if resource in _NAMELESS or not name:
        return (f'{resource} = "{access}"',)
    return (f'{resource} "{name}" {{ policy = "{access}" }}',)


def advice(text: str, lines: Lines, *, token: bool) -> str:
    """What to do about a denial that Consul puts in these words; ``token``: whether one was sent.

    ``lines`` are what the request needs, should Consul not say what exactly is missing.
    """
    lines = _said(text) or lines
    granted = f" whose policy says {' and '.join(lines)}" if lines else " that has this right"
    if NOT_FOUND in text:
        return f"Consul does not know the token (deleted, expired, or another datacenter's): use one{granted}"
    if not token:
        return f"no token was sent: set CONSUL_HTTP_TOKEN_FILE, or pass a token,{granted}"
    return f"add to a policy of the token: {' and '.join(lines)}" if lines else f"use a token{granted}"
