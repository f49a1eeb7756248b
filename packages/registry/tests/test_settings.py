"""What each environment variable means, what wins over what, and that a token never shows."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, ValidationError

from registry import ConsulSettings, InvalidInputError, RegistryError, ServiceRegistry, ServiceSettings
from registry.testing.server import Answer, Serve

TOKEN = "5ecret-token-0f-this-test"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the machine reaches these tests."""
    for name in list(os.environ):
        if name.upper().startswith(("CONSUL_", "SERVICE_")):
            monkeypatch.delenv(name)


# -- CONSUL_* ----------------------------------------------------------------------------------------------------------


def test_consul_defaults() -> None:
    """Without any variable Consul is at localhost:8500, over http, without a token."""
    settings = ConsulSettings()
    assert settings.url == "http://localhost:8500"
    assert (settings.read_token(), settings.ca_file, settings.consistency) == (None, None, "default")


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({"CONSUL_HOST": "consul"}, "http://consul:8500"),
        ({"CONSUL_PORT": "8600"}, "http://localhost:8600"),
        ({"CONSUL_HOST": "consul.internal", "CONSUL_PORT": "1"}, "http://consul.internal:1"),
        ({"CONSUL_HOST": "::1"}, "http://[::1]:8500"),
        ({"CONSUL_HTTP_ADDR": "consul"}, "http://consul:8500"),
        ({"CONSUL_HTTP_ADDR": "10.0.0.1:8600"}, "http://10.0.0.1:8600"),
        ({"CONSUL_HTTP_ADDR": "http://consul:8600"}, "http://consul:8600"),
        ({"CONSUL_HTTP_ADDR": "http://consul:8600/"}, "http://consul:8600"),
        ({"CONSUL_HTTP_ADDR": "https://consul:8501"}, "https://consul:8501"),
        ({"CONSUL_HTTP_ADDR": "[::1]:8600"}, "http://[::1]:8600"),
        ({"CONSUL_HTTP_SSL": "true"}, "https://localhost:8500"),
        ({"CONSUL_HTTP_SSL": "1"}, "https://localhost:8500"),
        ({"CONSUL_HTTP_SSL": "TRUE"}, "https://localhost:8500"),
        ({"CONSUL_HTTP_SSL": "T"}, "https://localhost:8500"),
        ({"CONSUL_HTTP_SSL": "false"}, "http://localhost:8500"),
        ({"CONSUL_HTTP_SSL": "0"}, "http://localhost:8500"),
        ({"CONSUL_HTTP_SSL": ""}, "http://localhost:8500"),
        # "Never revert to http if TLS was explicitly requested", as Consul's own client has it.
        ({"CONSUL_HTTP_SSL": "true", "CONSUL_HTTP_ADDR": "http://consul:8501"}, "https://consul:8501"),
        ({"CONSUL_HTTP_SSL": "false", "CONSUL_HTTP_ADDR": "https://consul:8501"}, "https://consul:8501"),
        ({"CONSUL_HTTP_ADDR": "a:1", "CONSUL_HOST": "b", "CONSUL_PORT": "2"}, "http://a:1"),
        ({"CONSUL_HTTP_ADDR": "", "CONSUL_HOST": "b", "CONSUL_PORT": ""}, "http://b:8500"),
    ],
)
def test_where_consul_is(variables: dict[str, str], url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CONSUL_HTTP_ADDR wins over CONSUL_HOST and CONSUL_PORT, CONSUL_HTTP_SSL turns on https, empty means unset."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ConsulSettings().url == url


def test_token_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CONSUL_HTTP_TOKEN_FILE gives the token, without the line's end; CONSUL_HTTP_TOKEN wins over it."""
    file = tmp_path / "token"
    file.write_text("from-file\n")
    monkeypatch.setenv("CONSUL_HTTP_TOKEN_FILE", str(file))
    assert ConsulSettings().read_token() == "from-file"
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "from-variable")
    assert ConsulSettings().read_token() == "from-variable"
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "")
    assert ConsulSettings().read_token() == "from-file"


def test_token_file_is_read_anew(tmp_path: Path) -> None:
    """A rotated token is used from the next request on."""
    file = tmp_path / "token"
    settings = ConsulSettings(token_file=file)
    for token in ("first", "second"):
        file.write_text(token)
        assert settings.read_token() == token
    file.write_text(" \n")
    assert settings.read_token() is None


def test_missing_token_file_is_told(tmp_path: Path) -> None:
    """A token file that can't be read is an error that names it, not a request without a token."""
    settings = ConsulSettings(token_file=tmp_path / "nowhere")
    with pytest.raises(InvalidInputError, match=r"CONSUL_HTTP_TOKEN_FILE .*nowhere can't be read \(No such file"):
        settings.read_token()


def test_ca_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CONSUL_CACERT names the file with the authority that signs Consul's certificate."""
    monkeypatch.setenv("CONSUL_CACERT", str(tmp_path / "ca.pem"))
    assert ConsulSettings().ca_file == tmp_path / "ca.pem"


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_bad_ca_is_a_clear_error(tmp_path: Path, content: str | None) -> None:
    """A CA file that is missing or holds no certificate is told when the registry is made, with its name."""
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InvalidInputError, match=r"ca\.pem"):
        ServiceRegistry(scheme="https", ca_file=file)


def test_arguments_win_over_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What code says explicitly beats every variable, also where variable and argument name different fields."""
    monkeypatch.setenv("CONSUL_HTTP_ADDR", "https://elsewhere:1")
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "from-variable")
    settings = ConsulSettings(host="here", port=2, scheme="http", token="from-argument")  # type: ignore[arg-type]
    assert (settings.url, settings.read_token()) == ("http://here:2", "from-argument")
    file = tmp_path / "token"
    file.write_text("from-file")
    assert ConsulSettings(token_file=file).read_token() == "from-file"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CONSUL_HOST", "http://consul"),
        ("CONSUL_HOST", "consul:8500"),
        ("CONSUL_HOST", "0.0.0.0"),
        ("CONSUL_HOST", "con sul"),
        ("CONSUL_PORT", "zero"),
        ("CONSUL_PORT", "0"),
        ("CONSUL_PORT", "70000"),
        ("CONSUL_HTTP_ADDR", "unix:///var/run/consul.sock"),
        ("CONSUL_HTTP_ADDR", "ftp://consul"),
        ("CONSUL_HTTP_ADDR", "http://"),
        ("CONSUL_HTTP_ADDR", "consul:port"),
        ("CONSUL_HTTP_ADDR", "consul:99999"),
        ("CONSUL_HTTP_ADDR", "consul:0"),
        ("CONSUL_HTTP_ADDR", "http://consul/prefix"),
        ("CONSUL_HTTP_ADDR", "http://consul:8500?token=x"),
        ("CONSUL_HTTP_ADDR", "http://user:password@consul"),
        ("CONSUL_HTTP_ADDR", "http://[::1"),
        ("CONSUL_HTTP_ADDR", "con sul"),
        ("CONSUL_HTTP_SSL", "yes please"),
    ],
)
def test_bad_consul_variables(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that can't be right is a ValueError at once, and its message never repeats a secret."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as caught:
        ConsulSettings()
    assert "password" not in str(caught.value)


@pytest.mark.parametrize("value", ["consul", "unix:///var/run/consul.sock", "http://", "consul:port"])
def test_registry_with_arguments_ignores_the_environment(
    value: str, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    """A ServiceRegistry made with arguments uses them only: no variable, however odd, changes or breaks it."""
    recorder = serve(lambda _: Answer(200, b"[]", {"X-Consul-Index": "7", "X-Consul-Default-ACL-Policy": "allow"}))
    monkeypatch.setenv("CONSUL_HTTP_ADDR", value)
    monkeypatch.setenv("CONSUL_HTTP_SSL", "true")
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", TOKEN)
    monkeypatch.setenv("CONSUL_HTTP_TOKEN_FILE", "/nowhere")
    monkeypatch.setenv("CONSUL_CACERT", "/nowhere")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with ServiceRegistry("127.0.0.1", recorder.port) as registry:
        assert registry.discover_service("cards") == []
    assert "x-consul-token" not in recorder.requests[0].headers


def test_address_without_port_reaches_consul(monkeypatch: pytest.MonkeyPatch) -> None:
    """CONSUL_HTTP_ADDR without a port means 8500, all the way to the connection."""
    monkeypatch.setenv("CONSUL_HTTP_ADDR", "127.0.0.1")
    with ServiceRegistry(settings=ConsulSettings()) as registry:
        assert registry.settings.url == "http://127.0.0.1:8500"


def test_registry_uses_the_environment_when_asked(monkeypatch: pytest.MonkeyPatch, serve: Serve) -> None:
    """``settings=ConsulSettings()`` takes address and token from the variables."""
    recorder = serve(lambda _: Answer(200, b"[]", {"X-Consul-Index": "7", "X-Consul-Default-ACL-Policy": "allow"}))
    monkeypatch.setenv("CONSUL_HTTP_ADDR", f"127.0.0.1:{recorder.port}")
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", TOKEN)
    with ServiceRegistry(settings=ConsulSettings()) as registry:
        registry.discover_service("cards")
    assert recorder.requests[0].headers["x-consul-token"] == TOKEN


@pytest.mark.parametrize("token", ["5ecret\n0ne", "5ecret\r\nX-0ther:1", "5ecret 0ne", "5ecret\x000ne", "5ecrét"])
def test_token_that_is_no_header_is_refused_unseen(token: str, tmp_path: Path) -> None:
    """A token that can't stand in a header is told before anything is sent, and not shown."""
    file = tmp_path / "token"
    file.write_text(token, "utf-8", newline="")
    with pytest.raises(ValueError) as argument:
        ConsulSettings(token=token)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError) as from_file:
        ConsulSettings(token_file=file).read_token()
    for error in (argument.value, from_file.value):
        assert not any(part in f"{error} {error!r}" for part in token.replace("\0", " ").split())


def test_token_shows_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither repr nor str nor a validation error of another field shows the token."""
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", TOKEN)
    settings = ConsulSettings()
    shown = [repr(settings), str(settings), repr(settings.model_dump()), settings.model_dump_json()]
    for broken in ({"port": "x"}, {"host": "a b"}, {"token": 7}, {"token": [TOKEN]}, {"unknown": TOKEN}):
        with pytest.raises(ValidationError) as caught:
            ConsulSettings(**broken)
        shown += [str(caught.value), repr(caught.value)]
    assert not [text for text in shown if TOKEN in text]


def test_settings_are_frozen() -> None:
    """Nobody moves Consul under a running service."""
    with pytest.raises(ValidationError, match="frozen"):
        setattr(ConsulSettings(), "host", "elsewhere")  # noqa: B010  # the type checker refuses it, too


# -- SERVICE_* ---------------------------------------------------------------------------------------------------------


class Settings(ServiceSettings):
    """A service's own settings, as the documentation has them."""

    name: str = "cards-api"
    port: int = 8002
    greeting: str = "hello"
    database_url: str = Field(default="sqlite://", validation_alias="DATABASE_URL")


def test_service_defaults() -> None:
    """A subclass needs no variable at all."""
    settings = Settings()
    assert (settings.name, settings.port, settings.address, settings.tags, settings.meta) == (
        "cards-api",
        8002,
        None,
        (),
        {},
    )
    assert (settings.weight, settings.drain_seconds, settings.health_check_interval) == (1, 1.5, 10.0)


@pytest.mark.parametrize(
    ("variable", "value", "field", "expected"),
    [
        ("SERVICE_NAME", "other-api", "name", "other-api"),
        ("SERVICE_PORT", "9000", "port", 9000),
        ("SERVICE_ADDRESS", "10.0.0.7", "address", "10.0.0.7"),
        ("SERVICE_ADDRESS", "", "address", None),
        ("SERVICE_TAGS", "v1", "tags", ("v1",)),
        ("SERVICE_TAGS", " v1 , blue,,", "tags", ("v1", "blue")),
        ("SERVICE_TAGS", "", "tags", ()),
        ("SERVICE_META", '{"version": "1.2"}', "meta", {"version": "1.2"}),
        ("SERVICE_WEIGHT", "5", "weight", 5),
        ("SERVICE_DRAIN_SECONDS", "0", "drain_seconds", 0.0),
        ("SERVICE_HEALTH_CHECK_INTERVAL", "2.5", "health_check_interval", 2.5),
        ("SERVICE_GREETING", "ahoy", "greeting", "ahoy"),
        ("service_greeting", "ahoy", "greeting", "ahoy"),
        ("DATABASE_URL", "postgres://db", "database_url", "postgres://db"),
    ],
)
def test_service_variables(
    variable: str, value: str, field: str, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each variable sets its field, a subclass's own fields with the prefix or under their alias."""
    monkeypatch.setenv(variable, value)
    assert getattr(Settings(), field) == expected


def test_service_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument beats its variable."""
    monkeypatch.setenv("SERVICE_PORT", "9000")
    monkeypatch.setenv("SERVICE_TAGS", "v1")
    settings = Settings(port=9001, tags=("v2",))
    assert (settings.port, settings.tags) == (9001, ("v2",))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SERVICE_NAME", "Cards API"),
        ("SERVICE_NAME", "cards.api"),
        ("SERVICE_NAME", "-cards"),
        ("SERVICE_NAME", ""),
        ("SERVICE_PORT", "0"),
        ("SERVICE_PORT", "65536"),
        ("SERVICE_PORT", "http"),
        ("SERVICE_ADDRESS", "0.0.0.0"),
        ("SERVICE_ADDRESS", "::"),
        ("SERVICE_ADDRESS", "http://10.0.0.7"),
        ("SERVICE_ADDRESS", "10.0.0.7:8000"),
        ("SERVICE_TAGS", "two words"),
        ("SERVICE_META", '{"": "x"}'),
        ("SERVICE_META", '{"key": 7}'),
        ("SERVICE_META", "{broken"),
        ("SERVICE_META", '["list"]'),
        ("SERVICE_WEIGHT", "0"),
        ("SERVICE_WEIGHT", "65536"),
        ("SERVICE_DRAIN_SECONDS", "-1"),
        ("SERVICE_DRAIN_SECONDS", "nan"),
        ("SERVICE_DRAIN_SECONDS", "61"),
        ("SERVICE_HEALTH_CHECK_INTERVAL", "0"),
        ("SERVICE_HEALTH_CHECK_INTERVAL", "inf"),
        ("SERVICE_HEALTH_CHECK_INTERVAL", "nan"),
    ],
)
def test_bad_service_variables(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that can't be right stops the service at its start, with the field's name in the message."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=variable.removeprefix("SERVICE_").lower()):
        Settings()


def test_service_without_name_or_port_is_told() -> None:
    """A service that says neither its name nor its port does not start."""
    with pytest.raises(ValidationError, match=r"(?s)name.*port"):
        ServiceSettings()


def test_meta_variable_survives_a_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metadata with any text comes out of the variable as it went in."""
    meta: dict[str, Any] = {"owner": "ünïcode, \"quotes\" and 'more'", "empty": ""}
    monkeypatch.setenv("SERVICE_META", json.dumps(meta))
    assert Settings().meta == meta


def test_input_errors_are_registry_errors_too() -> None:
    """Whoever catches RegistryError or ValueError catches bad input."""
    assert issubclass(InvalidInputError, RegistryError)
    assert issubclass(InvalidInputError, ValueError)
