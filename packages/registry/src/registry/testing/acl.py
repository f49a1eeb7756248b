"""Tokens of an agent that denies by default, for tests of what a service may do: ``agent.acl.token(rules)``."""

import itertools
import os
from dataclasses import dataclass, field
from typing import Any

import httpx

__all__ = ["Acl", "AclToken"]

_numbers = itertools.count(1)


@dataclass(frozen=True)
class AclToken:
    """A token of Consul's."""

    accessor: str
    """By which it is known to operators: no secret."""
    secret: str = field(repr=False)
    """What requests carry."""


class Acl:
    """Makes, changes and deletes tokens, as an operator would. Every method blocks. Raises: httpx.HTTPError."""

    def __init__(self, url: str, token: str) -> None:
        """``token``: one that may do all this."""
        self._url = url
        self._headers = {"X-Consul-Token": token}

    def token(self, rules: str = "") -> AclToken:
        """A new token with exactly these rights: ``service "cards" { policy = "read" }``; by default with none."""
        made = self._ask("PUT", "/v1/acl/token", {"Policies": self._policies(rules)})
        return AclToken(made["AccessorID"], made["SecretID"])

    def change(self, token: AclToken, rules: str = "") -> None:
        """Gives the token exactly these rights, from its next request on."""
        self._ask("PUT", f"/v1/acl/token/{token.accessor}", {"Policies": self._policies(rules)})

    def delete(self, token: AclToken) -> None:
        """Ends the token: from now on it is "ACL not found"."""
        self._ask("DELETE", f"/v1/acl/token/{token.accessor}")

    def tokens(self, method: str) -> list[str]:
        """The accessors of the living tokens that were got by logging in with this auth method, newest first."""
        found = self._ask("GET", f"/v1/acl/tokens?authmethod={method}")
        return [each["AccessorID"] for each in sorted(found, key=lambda each: each["CreateIndex"], reverse=True)]

    def auth_method(self, name: str, public_key: str, life: str = "1h") -> None:
        """Whoever has a JWT that this key (PEM) verifies gets the rights of the service that its ``sub`` names.

        Its ``iss`` must be ``platform``, its ``aud`` ``consul``. ``life``: of the tokens, ``1m`` or longer.
        """
        config = {
            "JWTValidationPubKeys": [public_key],
            "BoundIssuer": "platform",
            "BoundAudiences": ["consul"],
            "ClaimMappings": {"sub": "service"},
        }
        self._ask("PUT", "/v1/acl/auth-method", {"Name": name, "Type": "jwt", "MaxTokenTTL": life, "Config": config})
        rule = {"AuthMethod": name, "BindType": "service", "BindName": "${value.service}"}
        self._ask("PUT", "/v1/acl/binding-rule", rule)

    def _policies(self, rules: str) -> list[dict[str, str]]:
        if not rules:
            return []
        name = f"test-{os.getpid()}-{next(_numbers)}"
        return [{"ID": self._ask("PUT", "/v1/acl/policy", {"Name": name, "Rules": rules})["ID"]}]

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        answer = httpx.request(method, f"{self._url}{path}", headers=self._headers, json=body, trust_env=False)
        answer.raise_for_status()
        return answer.json() if answer.content else None
