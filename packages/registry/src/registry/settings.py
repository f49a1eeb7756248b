"""The environment: ``CONSUL_*`` says where the registry is, ``SERVICE_*`` says who this service is.

Consul's own variables keep the meaning that its command line gives them.
Source: https://developer.hashicorp.com/consul/commands#environment-variables
"""

import json
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from registry.environment import ConsulEnvironment, ServiceEnvironment
from registry.errors import InvalidInputError
from registry.validation import (
    check_address,
    check_headers,
    check_meta,
    check_path,
    check_port,
    check_service,
    check_tag,
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


# What may stand in a header. A token with a line break would otherwise be quoted in somebody's error message.
_TOKEN = re.compile(r"[!-~]*", re.ASCII)


def _blank_is_unset(value: object) -> object:
    return None if value == "" else value


class ConsulSettings(BaseSettings):
    """How to reach Consul. Arguments win over the environment.

    Raises: pydantic.ValidationError or InvalidInputError (both ValueError), when an argument or a variable can't be
    right; the message never shows the token.
    """

    model_config = SettingsConfigDict(frozen=True, hide_input_in_errors=True)

    host: str = "localhost"
    port: int = 8500
    scheme: Literal["http", "https"] = "http"
    token: SecretStr | None = None
    token_file: Path | None = None
    ca_file: Path | None = None
    ca_path: Path | None = None
    """A directory; every file in it holds certificates of authorities, like ``ca_file``."""
    client_cert: Path | None = None
    """The certificate that we present, for a Consul that asks for one; its key is in ``client_key``, or beside it."""
    client_key: Path | None = None
    tls_server_name: str | None = None
    """The name in Consul's certificate, where that is not the host."""
    verify: bool = True
    """Whether Consul's certificate is checked."""
    auth: SecretStr | None = None
    """``user:password`` of HTTP basic authentication, for a proxy in front of Consul."""
    socket: Path | None = None
    """The Unix socket at which Consul listens; host and port then only say what this host is to itself."""
    consistency: Literal["default", "consistent", "stale"] = "default"
    timeout: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    """Seconds that one ordinary request to Consul may take."""
    wait: float = Field(default=50.0, ge=1, le=600)
    """Seconds, at most, that Consul parks a question until there is news; it adds up to a sixteenth.

    With that, keep it below what a proxy in between waits for an answer, or the proxy cuts every question.
    """

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, ConsulEnvironment(settings_cls, init_settings().keys())

    @field_validator("host")
    @classmethod
    def _host(cls, host: str) -> str:
        return check_address(host)

    @field_validator("tls_server_name")
    @classmethod
    def _tls_server_name(cls, name: str | None) -> str | None:
        return None if name is None else check_address(name)

    @field_validator("port")
    @classmethod
    def _port(cls, port: int) -> int:
        return check_port(port)

    @field_validator("token")
    @classmethod
    def _token(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None:
            _check_token(token.get_secret_value(), "the token")
        return token

    @model_validator(mode="after")
    def _client_certificate(self) -> Self:
        if self.client_key is not None and self.client_cert is None:
            raise InvalidInputError("CONSUL_CLIENT_KEY is the key of a certificate: set CONSUL_CLIENT_CERT, too")
        return self

    @property
    def url(self) -> str:
        """``scheme://host:port``, or ``unix:///path``."""
        if self.socket is not None:
            return f"unix://{self.socket}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    def read_token(self) -> str | None:
        """The ACL token, read anew from its file at each call, so that a rotated token is picked up. Blocks briefly.

        Raises: InvalidInputError, when the file can't be read or holds no token.
        """
        if self.token is not None:
            return self.token.get_secret_value()
        if self.token_file is None:
            return None
        try:
            token = self.token_file.read_bytes().decode("ascii", "replace").strip()
        except OSError as error:
            raise InvalidInputError(
                f"CONSUL_HTTP_TOKEN_FILE {self.token_file} can't be read ({error.strerror}): mend or unset it"
            ) from None
        return _check_token(token, f"CONSUL_HTTP_TOKEN_FILE {self.token_file}") or None


def _check_token(token: str, what: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise InvalidInputError(f"{what} holds blanks, line breaks or other characters that no token has")
    return token


class ServiceSettings(BaseSettings):
    """Who this service is. Subclass it in a service and give ``name`` and ``port`` their defaults.

    Raises: pydantic.ValidationError, when a variable can't be right.
    """

    model_config = SettingsConfigDict(
        env_prefix="SERVICE_", frozen=True, populate_by_name=True, hide_input_in_errors=True
    )

    name: str
    port: int
    """The port that callers reach: the one given to uvicorn's ``--port``."""
    scheme: Literal["http", "https"] = "http"
    """How callers, Consul's check and our own probe speak to it."""
    address: Annotated[str | None, BeforeValidator(_blank_is_unset)] = None
    """Where callers reach this instance; unset: the address that this host uses to reach Consul."""
    tags: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = ()
    meta: dict[str, str] = Field(default_factory=dict)
    """Wins over what a registration says by itself: ``version``, ``metrics_path`` and ``secure``."""
    version: Annotated[str | None, BeforeValidator(_blank_is_unset)] = None
    """The version that is registered; unset: the FastAPI app's own."""
    weight: int = Field(default=1, ge=1, le=65535)
    call_timeout: float = Field(default=30.0, gt=0, le=3_600)
    """Seconds that one attempt of a call to another service may take."""
    call_retries: int = Field(default=3, ge=1, le=100)
    """Attempts of a call in total, the first included."""
    call_deadline: float | None = Field(default=None, gt=0, le=7_200)
    """Seconds that a call may take with all its attempts; unset: twice ``call_timeout``."""
    drain_seconds: float = Field(default=1.5, ge=0, le=60)
    """How long the service goes on serving after it withdrew from Consul on SIGTERM."""
    health_check_interval: float = Field(default=10.0, ge=0.5, le=86_400)
    """Seconds between Consul's checks; three failures in a row take the instance out of discovery."""
    health_check_path: str = "/health"
    """Where the health router is: with a prefix, not ``/health``."""
    health_check_headers: dict[str, SecretStr] = Field(default_factory=dict)
    """What Consul and our own probe send along: a token, or the ``Host`` that the app insists on."""
    health_check_tls_server_name: Annotated[str | None, BeforeValidator(_blank_is_unset)] = None
    """The name in the service's certificate, which is hardly its address."""
    health_check_tls_skip_verify: bool = False
    """Whether Consul's check and our own probe take any certificate."""

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

    @field_validator("address")
    @classmethod
    def _address(cls, address: str | None) -> str | None:
        return None if address is None else check_address(address)

    @field_validator("tags")
    @classmethod
    def _tags(cls, tags: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_tag(tag) for tag in tags)

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

    @field_validator("health_check_tls_server_name")
    @classmethod
    def _health_check_tls_server_name(cls, name: str | None) -> str | None:
        return None if name is None else check_address(name)
