"""Consul's own environment variables, read as its command line reads them.

Source: https://developer.hashicorp.com/consul/commands#environment-variables
"""

import logging
import os
import re
from collections.abc import Collection
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource

from registry.errors import InvalidInputError

__all__ = ["ConsulEnvironment", "ServiceEnvironment"]

logger = logging.getLogger("registry")

_VARIABLES = {
    "host": "CONSUL_HOST",
    "port": "CONSUL_PORT",
    "wait": "CONSUL_WAIT",
    "datacenters": "CONSUL_DATACENTERS",
    "ca_file": "CONSUL_CACERT",
    "ca_path": "CONSUL_CAPATH",
    "client_cert": "CONSUL_CLIENT_CERT",
    "client_key": "CONSUL_CLIENT_KEY",
    "tls_server_name": "CONSUL_TLS_SERVER_NAME",
    "auth": "CONSUL_HTTP_AUTH",
}
# Only read where no argument says how to get a token. Those for a login are named as the options of `consul login`.
_TOKENS = {
    "token": "CONSUL_HTTP_TOKEN",
    "token_file": "CONSUL_HTTP_TOKEN_FILE",
    "auth_method": "CONSUL_AUTH_METHOD",
    "bearer_token_file": "CONSUL_BEARER_TOKEN_FILE",
}
_UNSUPPORTED = ("CONSUL_NAMESPACE", "CONSUL_PARTITION")
# Go's strconv.ParseBool, by which Consul reads its own variables.
_TRUE, _FALSE = {"1", "t", "true"}, {"0", "f", "false"}
# "CONSUL_PORT=tcp://10.43.12.7:8500": what Kubernetes sets for every Service named "consul", and Docker for every link.
# Source: https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_LINK = re.compile(r"[a-z]+://")


def _is_link(name: str, value: str) -> bool:
    """Whether the platform set this variable, not an operator; if so, that is logged."""
    if not _LINK.match(value):
        return False
    _warn("ignoring %s=%s: Kubernetes or Docker set it, and it is no port; to choose one, set a number", name, value)
    return True


@cache
def _warn(message: str, *details: str) -> None:
    """Once in a process: settings are made in several places."""
    logger.warning(message, *details)


class ConsulEnvironment(PydanticBaseSettingsSource):
    """Consul's variables, folded into the fields of ConsulSettings; silent about what the arguments decide."""

    def __init__(self, settings_cls: type[BaseSettings], given: Collection[str]) -> None:
        super().__init__(settings_cls)
        self._given = given

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError  # every field is filled at once, in __call__

    def __call__(self) -> dict[str, Any]:
        found = _read(_VARIABLES)
        if "port" not in self._given and "port" in found and _is_link("CONSUL_PORT", found["port"]):
            del found["port"]
        if not set(_TOKENS) & set(self._given):
            found |= _read(_TOKENS)
        if "verify" not in self._given:
            found |= _flag("verify", "CONSUL_HTTP_SSL_VERIFY")
        https = "scheme" not in self._given and _flag("https", "CONSUL_HTTP_SSL").get("https", False)
        if not {"host", "port", "socket"} & set(self._given):
            found |= _address(https)
        if https:
            found["scheme"] = "https"
        ignored = [name for name in _UNSUPPORTED if os.environ.get(name)]
        if ignored:
            _warn("ignoring %s: only the default namespace and partition are used", " and ".join(ignored))
        return found


def _read(variables: dict[str, str]) -> dict[str, Any]:
    found = {field: os.environ.get(name) for field, name in variables.items()}
    return {field: value for field, value in found.items() if value}


def _flag(field: str, name: str) -> dict[str, bool]:
    value = os.environ.get(name, "").lower()
    if value not in _TRUE | _FALSE | {""}:
        raise InvalidInputError(f"{name}: set it to true or false")
    return {field: value in _TRUE} if value else {}


def _address(https: bool) -> dict[str, Any]:
    """What ``CONSUL_HTTP_ADDR`` says; it wins over ``CONSUL_HOST`` and ``CONSUL_PORT``."""
    address = os.environ.get("CONSUL_HTTP_ADDR")
    if not address:
        return {}
    scheme, _, rest = address.rpartition("://")
    if scheme == "unix" and rest.startswith("/"):
        return {"socket": rest, "scheme": "http", "host": "localhost", "port": 8500}
    try:
        url = urlsplit(f"//{rest}")
        host, port = url.hostname, url.port
    except ValueError:
        host, port = None, None
    else:
        beyond = url.path.strip("/") or url.query or url.fragment or "@" in url.netloc
        if scheme not in {"", "http", "https"} or beyond or port == 0:
            host = None
    if not host:
        raise InvalidInputError(
            "CONSUL_HTTP_ADDR: set it to host:port, http://host:port, https://host:port or unix:///path"
        )
    scheme = "https" if https else scheme or "http"
    # Without a port it is a plain URL to Consul's own client, too: 80 or 443, not 8500.
    return {"scheme": scheme, "host": host, "port": port or (443 if scheme == "https" else 80)}


class ServiceEnvironment(EnvSettingsSource):
    """The variables ``SERVICE_*``, without those that a platform sets for a Service or a link named "service".

    A subclass may have further ports: "SERVICE_ADMIN_PORT" is also what a Service named "service-admin" sets.
    """

    def __call__(self) -> dict[str, Any]:
        found = super().__call__()
        links = [
            field
            for field, value in found.items()
            if field.lower().endswith("port") and isinstance(value, str) and _is_link(self._variable(field), value)
        ]
        for field in links:
            del found[field]
        # Beside its port, Docker says "SERVICE_NAME=/container/service".
        if "port" in links and str(found.get("name", "")).startswith("/"):
            del found["name"]
        return found

    def _variable(self, field: str) -> str:
        """As the platform writes it."""
        prefixed = f"{self.env_prefix}{field}".upper()
        return prefixed if prefixed.lower() in self.env_vars else field.upper()
