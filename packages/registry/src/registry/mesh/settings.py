"""Whether this service speaks Consul Connect, and where its certificate comes from."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from registry.errors import InvalidInputError

__all__ = ["MeshSettings"]

_ADDRESS = re.compile(r"(?:https?://)?(?:\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):\d{1,5}")


def _as_mode(value: object) -> object:
    """As Go reads truth, by which Consul reads its own variables; ``client`` is ours."""
    word = str(value).strip().lower()
    mode = {"1": "true", "t": "true", "0": "false", "f": "false", "": "false"}.get(word, word)
    if mode not in {"false", "client", "true"}:
        raise InvalidInputError("set it to false, client or true")
    return mode


class MeshSettings(BaseSettings):
    """Mutual TLS with the mesh's certificates; off by default. Arguments take precedence over the environment.

    Raises: pydantic.ValidationError (a ValueError), which names the variable.
    """

    model_config = SettingsConfigDict(frozen=True, populate_by_name=True, env_ignore_empty=True)

    mode: Annotated[Literal["false", "client", "true"], BeforeValidator(_as_mode)] = Field(
        default="false", validation_alias="CONSUL_CONNECT"
    )
    """``client``: calls use mutual TLS where the instance speaks it, and this service serves plainly. ``true``: this
    service also serves mutual TLS only."""
    allow_unsafe_agent: bool = Field(default=False, validation_alias="CONSUL_CONNECT_ALLOW_UNSAFE_AGENT")
    """Whether the agent may give this service's key to others (CVE-2026-105765): it serves this service only."""
    grpc_address: str | None = Field(default=None, validation_alias="CONSUL_GRPC_ADDR")
    """``host:port`` of a Consul server's gRPC: it signs the certificate, and no agent ever holds its key."""
    grpc_ca_file: Path | None = Field(default=None, validation_alias="CONSUL_GRPC_CACERT")
    """File of the CA that signed the server's certificate; unset: gRPC without TLS, unless the address has https://."""

    @field_validator("grpc_address")
    @classmethod
    def _grpc_address(cls, address: str | None) -> str | None:
        if address is not None and not _ADDRESS.fullmatch(address):
            raise InvalidInputError("set it to host:port, http://host:port or https://host:port")
        return address
