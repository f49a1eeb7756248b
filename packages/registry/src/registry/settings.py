"""Settings from the environment: ``CONSUL_*`` for the way to Consul, ``SERVICE_*`` for this service."""

import json
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from registry.consul_settings import ConsulSettings
from registry.environment import ServiceEnvironment
from registry.errors import InvalidInputError
from registry.validation import (
    check_address,
    check_headers,
    check_meta,
    check_path,
    check_port,
    check_rates,
    check_service,
    check_tag,
    check_zone,
)

__all__ = ["ConsulSettings", "ServiceSettings"]


def _split(value: object) -> object:
    if not isinstance(value, str):
        return value
    # A tag may hold commas and spaces, as those for Traefik and Fabio do: then it takes a JSON list.
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError as error:
            raise InvalidInputError(f"not a JSON list, as its '[' promises: {error}") from None
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _blank_is_unset(value: object) -> object:
    return None if value == "" else value


class ServiceSettings(BaseSettings):
    """What this service registers, and how. Subclass it in a service, and give ``name`` and ``port`` defaults.

    Raises: pydantic.ValidationError, if a variable is invalid.
    """

    model_config = SettingsConfigDict(
        env_prefix="SERVICE_", frozen=True, populate_by_name=True, hide_input_in_errors=True
    )

    name: str
    port: int
    """The port that callers use, normally the one given to uvicorn's ``--port``."""
    scheme: Literal["http", "https"] = "http"
    """The scheme for callers, for Consul's check and for the probe before registration."""
    address: Annotated[str | None, BeforeValidator(_blank_is_unset)] = None
    """The address that callers use; unset: the address from which this host reaches Consul."""
    tags: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = ()
    meta: dict[str, str] = Field(default_factory=dict)
    """Takes precedence over the default metadata ``version``, ``zone`` and so on."""
    version: Annotated[str | None, BeforeValidator(_blank_is_unset)] = None
    """The version to register; unset: the version of the FastAPI app."""
    weight: int = Field(default=1, ge=1, le=65535)
    zone: Annotated[str | None, BeforeValidator(_blank_is_unset)] = None
    """Where this instance runs, registered as the metadata ``zone``; its calls prefer instances there."""
    call_timeout: float = Field(default=30.0, gt=0, le=3_600)
    """Seconds that one attempt of a call to another service may take."""
    call_retries: int = Field(default=3, ge=1, le=100)
    """Attempts of a call in total, the first included."""
    call_deadline: float | None = Field(default=None, gt=0, le=7_200)
    """Seconds that a call may take with all its attempts; unset: twice ``call_timeout``."""
    shed_lag: float = Field(default=0.0, ge=0, le=10)
    """Seconds: while the event loop has been later than this for as long again, requests get 503; 0: never."""
    max_in_flight: int = Field(default=0, ge=0)
    """Requests in progress beyond which further ones get 503; 0: no limit."""
    caller_rate: Annotated[dict[str, float], NoDecode, BeforeValidator(check_rates)] = Field(default_factory=dict)
    """Caller → requests a second that each process takes from it, and a second's worth at once; beyond: 429."""
    drain_seconds: float = Field(default=1.5, ge=0, le=60)
    """How long the service keeps serving after it has left Consul on SIGTERM, in seconds."""
    health_check_interval: float = Field(default=10.0, ge=0.5, le=86_400)
    """Seconds between Consul's checks; three failures in a row take the instance out of discovery."""
    health_check_path: str = "/health"
    """The path of the health router; differs from ``/health`` if the router has a prefix."""
    health_check_headers: dict[str, SecretStr] = Field(default_factory=dict)
    """Headers of Consul's check and of the probe: for example a token, or the ``Host`` that the app requires."""
    health_check_tls_server_name: Annotated[str | None, BeforeValidator(_blank_is_unset)] = None
    """The name in the service's certificate, if it differs from its address."""
    health_check_tls_skip_verify: bool = False
    """Whether Consul's check and the probe accept any certificate."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, ServiceEnvironment(settings_cls), dotenv_settings, file_secret_settings

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        return check_service(name)

    @field_validator("port")
    @classmethod
    def _port(cls, port: int) -> int:
        return check_port(port)

    @field_validator("address", "health_check_tls_server_name")
    @classmethod
    def _address(cls, address: str | None) -> str | None:
        return None if address is None else check_address(address)

    @field_validator("tags")
    @classmethod
    def _tags(cls, tags: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_tag(tag) for tag in tags)

    @field_validator("zone")
    @classmethod
    def _zone(cls, zone: str | None) -> str | None:
        return None if zone is None else check_zone(zone)

    @field_validator("meta")
    @classmethod
    def _meta(cls, meta: dict[str, str]) -> dict[str, str]:
        return check_meta(meta)

    @field_validator("health_check_path")
    @classmethod
    def _health_check_path(cls, path: str) -> str:
        return check_path(path)

    @field_validator("health_check_headers")
    @classmethod
    def _health_check_headers(cls, headers: dict[str, SecretStr]) -> dict[str, SecretStr]:
        check_headers({name: value.get_secret_value() for name, value in headers.items()})
        return headers
