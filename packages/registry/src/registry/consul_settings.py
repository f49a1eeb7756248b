"""How to reach Consul, and with which token: the variables ``CONSUL_*``.

Consul's own variables mean the same as for its command line.
Source: https://developer.hashicorp.com/consul/commands#environment-variables
"""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from registry.environment import ConsulEnvironment
from registry.errors import InvalidInputError
from registry.validation import check_address, check_datacenter, check_port

__all__ = ["ConsulSettings"]

# What may stand in a header. A token with a line break would otherwise be quoted in somebody's error message.
_TOKEN = re.compile(r"[!-~]*", re.ASCII)
_BEARER = "CONSUL_BEARER_TOKEN_FILE"


class ConsulSettings(BaseSettings):
    """How to reach Consul. Arguments take precedence over the environment.

    Raises: pydantic.ValidationError or InvalidInputError (both are ValueError) if an argument or a variable is invalid;
    the message never shows the token.
    """

    model_config = SettingsConfigDict(frozen=True, hide_input_in_errors=True)

    host: str = "localhost"
    port: int = 8500
    scheme: Literal["http", "https"] = "http"
    token: SecretStr | None = None
    token_file: Path | None = None
    """A file with the token, read at each request. Replace it by renaming another over it, and end the old token later.
    """
    auth_method: str | None = None
    """Log in with this auth method, and use the token that Consul answers with, in place of one that is given."""
    bearer_token_file: Path | None = None
    """What to log in with: a file with the token by which the platform tells who this is, read at each login."""
    ca_file: Path | None = None
    ca_path: Path | None = None
    """A directory of files with CA certificates, each like ``ca_file``."""
    client_cert: Path | None = None
    """Client certificate, if Consul asks for one. The key is in ``client_key``, or in the same file."""
    client_key: Path | None = None
    tls_server_name: str | None = None
    """The name in Consul's certificate, if it differs from the host."""
    verify: bool = True
    """Whether to verify Consul's certificate."""
    auth: SecretStr | None = None
    """``user:password`` for HTTP basic authentication at a proxy in front of Consul."""
    socket: Path | None = None
    """The Unix socket on which Consul listens. Host and port are then only used to find this host's address."""
    consistency: Literal["default", "consistent", "stale"] = "default"
    datacenters: tuple[str, ...] = ()
    """Where instances of other services are looked for: in the next only while nobody passes in those before it.

    None given: in the agent's own.
    """
    timeout: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    """Time limit for one ordinary request to Consul, in seconds."""
    wait: float = Field(default=50.0, ge=1, le=600)
    """Maximum duration of a blocking query, in seconds; Consul adds up to a sixteenth.

    The sum must be below the timeout of any proxy in between; otherwise the proxy cuts every query.
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

    @field_validator("host", "tls_server_name")
    @classmethod
    def _host(cls, host: str | None) -> str | None:
        return None if host is None else check_address(host)

    @field_validator("port")
    @classmethod
    def _port(cls, port: int) -> int:
        return check_port(port)

    @field_validator("datacenters", mode="before")
    @classmethod
    def _names(cls, names: object) -> object:
        return tuple(part.strip() for part in names.split(",") if part.strip()) if isinstance(names, str) else names

    @field_validator("datacenters")
    @classmethod
    def _datacenters(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(check_datacenter, names))

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

    @model_validator(mode="after")
    def _one_way_to_a_token(self) -> Self:
        if (self.auth_method is None) != (self.bearer_token_file is None):
            raise InvalidInputError("CONSUL_AUTH_METHOD and CONSUL_BEARER_TOKEN_FILE log in together: set both or none")
        if self.auth_method is not None and (self.token is not None or self.token_file is not None):
            raise InvalidInputError(
                "CONSUL_AUTH_METHOD logs in for a token: unset CONSUL_HTTP_TOKEN and CONSUL_HTTP_TOKEN_FILE"
            )
        return self

    @property
    def url(self) -> str:
        """``scheme://host:port``, or ``unix:///path``."""
        if self.socket is not None:
            return f"unix://{self.socket}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    def read_token(self) -> str | None:
        """The ACL token, read from its file at each call, so that a rotated token takes effect. Blocks briefly.

        None without one, and with ``auth_method``, whose tokens the connections get by themselves.

        Raises: InvalidInputError, if the file can't be read or contains something that is not a token.
        """
        if self.token is not None:
            return self.token.get_secret_value()
        if self.token_file is None:
            return None
        return _read_token(self.token_file, "CONSUL_HTTP_TOKEN_FILE") or None

    def read_bearer_token(self) -> str:
        """What to log in with, read from its file at each call. Blocks briefly.

        Raises: InvalidInputError, if there is no file, or it can't be read, or contains something that is not a token.
        """
        bearer = "" if self.bearer_token_file is None else _read_token(self.bearer_token_file, _BEARER)
        if not bearer:
            raise InvalidInputError(f"{_BEARER} {self.bearer_token_file} is empty: it must hold the platform's token")
        return bearer


def _read_token(file: Path, variable: str) -> str:
    try:
        token = file.read_bytes().decode("ascii", "replace").strip()
    except OSError as error:
        raise InvalidInputError(f"{variable} {file} can't be read ({error.strerror}): mend or unset it") from None
    return _check_token(token, f"{variable} {file}")


def _check_token(token: str, what: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise InvalidInputError(f"{what} holds blanks, line breaks or other characters that no token has")
    return token
