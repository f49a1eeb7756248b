"""The environment: ``CONSUL_*`` says where the registry is, ``SERVICE_*`` says who this service is.

Consul's own variables keep the meaning that its command line gives them.
Source: https://developer.hashicorp.com/consul/commands#environment-variables
"""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from registry.errors import InvalidInputError
from registry.validation import check_address, check_meta, check_port, check_service, check_tag

__all__ = ["ConsulSettings", "ServiceSettings"]


def _split(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


_CONSUL_VARIABLES = {
    "host": "CONSUL_HOST",
    "port": "CONSUL_PORT",
    "token": "CONSUL_HTTP_TOKEN",
    "token_file": "CONSUL_HTTP_TOKEN_FILE",
    "ca_file": "CONSUL_CACERT",
}
# Go's strconv.ParseBool, by which Consul reads its own variables.
_TRUE, _FALSE = {"1", "t", "true"}, {"0", "f", "false", ""}
# What may stand in a header. A token with a line break would otherwise be quoted in somebody's error message.
_TOKEN = re.compile(r"[!-~]*", re.ASCII)


def _blank_is_unset(value: object) -> object:
    return None if value == "" else value


class _ConsulEnvironment(PydanticBaseSettingsSource):
    """Consul's variables, folded into host, port and scheme; silent about what the arguments decide."""

    def __init__(self, settings_cls: type[BaseSettings], given: Collection[str]) -> None:
        super().__init__(settings_cls)
        self._given = given

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError  # every field is filled at once, in __call__

    def __call__(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if not {"host", "port"} & set(self._given):
            found |= self._address()
        found |= self._read("host", "port", "ca_file") | found
        if not {"token", "token_file"} & set(self._given):
            found |= self._read("token", "token_file")
        if "scheme" not in self._given:
            ssl = os.environ.get("CONSUL_HTTP_SSL", "").lower()
            if ssl not in _TRUE | _FALSE:
                raise InvalidInputError("CONSUL_HTTP_SSL: set it to true or false")
            found |= {"scheme": "https"} if ssl in _TRUE else {}
        return found

    def _read(self, *fields: str) -> dict[str, Any]:
        found = {field: os.environ.get(_CONSUL_VARIABLES[field]) for field in fields}
        return {field: value for field, value in found.items() if value}

    def _address(self) -> dict[str, Any]:
        """What ``CONSUL_HTTP_ADDR`` says; it wins over ``CONSUL_HOST`` and ``CONSUL_PORT``."""
        address = os.environ.get("CONSUL_HTTP_ADDR")
        if not address:
            return {}
        try:
            url = urlsplit(address if "://" in address else f"//{address}")
            host, port = url.hostname, 8500 if url.port is None else url.port
        except ValueError:
            host, port = None, 0
        else:
            beyond = url.path.strip("/") or url.query or url.fragment or "@" in url.netloc
            if url.scheme not in {"", "http", "https"} or beyond:
                host = None
        if not (host and port):
            raise InvalidInputError("CONSUL_HTTP_ADDR: set it to host:port, http://host:port or https://host:port")
        return {"scheme": url.scheme or "http", "host": host, "port": port}


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
    consistency: Literal["default", "consistent", "stale"] = "default"
    timeout: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    """Seconds that one ordinary request to Consul may take."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _ConsulEnvironment(settings_cls, init_settings().keys())

    @field_validator("host")
    @classmethod
    def _host(cls, host: str) -> str:
        return check_address(host)

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

    @property
    def url(self) -> str:
        """``scheme://host:port``."""
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

    model_config = SettingsConfigDict(env_prefix="SERVICE_", frozen=True, populate_by_name=True)

    name: str
    port: int
    """The port that callers reach: the one given to uvicorn's ``--port``."""
    address: Annotated[str | None, BeforeValidator(_blank_is_unset)] = None
    """Where callers reach this instance; unset: the address that this host uses to reach Consul."""
    tags: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = ()
    meta: dict[str, str] = Field(default_factory=dict)
    weight: int = Field(default=1, ge=1, le=65535)
    drain_seconds: float = Field(default=1.5, ge=0, le=60)
    """How long the service goes on serving after it withdrew from Consul on SIGTERM."""
    health_check_interval: float = Field(default=10.0, ge=0.5, le=86_400)
    """Seconds between Consul's checks; three failures in a row take the instance out of discovery."""

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
