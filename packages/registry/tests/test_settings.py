"""What each environment variable means, what wins over what, and that a token never shows."""

import base64
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, ValidationError

from registry import ConsulSettings, InvalidInputError, RegistryError, ServiceRegistry, ServiceSettings, environment
from registry.mesh.settings import MeshSettings
from registry.presence.registration import Registration
from tests.support.server import Answer, Serve

TOKEN = "5ecret-token-0f-this-test"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the machine reaches these tests."""
    for name in list(os.environ):
        if name.upper().startswith(("CONSUL_", "SERVICE_")):
            monkeypatch.delenv(name)
    environment._warn.cache_clear()


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
        # Without a port, Consul's own command dials 80 or 443, whatever its agent's default is.
        ({"CONSUL_HTTP_ADDR": "consul"}, "http://consul:80"),
        ({"CONSUL_HTTP_ADDR": "http://consul"}, "http://consul:80"),
        ({"CONSUL_HTTP_ADDR": "https://consul"}, "https://consul:443"),
        ({"CONSUL_HTTP_ADDR": "consul", "CONSUL_HTTP_SSL": "true"}, "https://consul:443"),
        ({"CONSUL_HTTP_ADDR": "unix:///run/consul.sock"}, "unix:///run/consul.sock"),
        ({"CONSUL_HTTP_ADDR": "consul_server:8500"}, "http://consul_server:8500"),
        ({"CONSUL_HOST": "consul_server"}, "http://consul_server:8500"),
        ({"CONSUL_HOST": "localhost."}, "http://localhost.:8500"),
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


@pytest.mark.parametrize(
    ("variable", "value", "field", "expected"),
    [
        ("CONSUL_CAPATH", "/etc/consul/ca", "ca_path", Path("/etc/consul/ca")),
        ("CONSUL_CLIENT_CERT", "/etc/consul/cert.pem", "client_cert", Path("/etc/consul/cert.pem")),
        ("CONSUL_TLS_SERVER_NAME", "server.dc1.consul", "tls_server_name", "server.dc1.consul"),
        ("CONSUL_HTTP_SSL_VERIFY", "false", "verify", False),
        ("CONSUL_HTTP_SSL_VERIFY", "1", "verify", True),
        ("CONSUL_HTTP_SSL_VERIFY", "", "verify", True),
        ("CONSUL_WAIT", "20", "wait", 20.0),
        ("CONSUL_WAIT", "", "wait", 50.0),
    ],
)
def test_consul_variables(
    variable: str, value: str, field: str, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each variable of Consul's command sets its field."""
    monkeypatch.setenv(variable, value)
    assert getattr(ConsulSettings(), field) == expected


def test_parks_end_before_a_usual_proxy_cuts_them() -> None:
    """By default a parked question is answered in less than 60 s, what Consul adds to it included."""
    assert ConsulSettings().wait * 17 / 16 < 60


@pytest.mark.parametrize(
    ("variables", "ignored"),
    [
        ({"CONSUL_NAMESPACE": "team", "CONSUL_PARTITION": "one"}, "CONSUL_NAMESPACE and CONSUL_PARTITION"),
        ({"CONSUL_NAMESPACE": "team"}, "CONSUL_NAMESPACE"),
        ({"CONSUL_PORT": "tcp://10.43.12.7:8500"}, "CONSUL_PORT=tcp://10.43.12.7:8500"),
        ({"CONSUL_PORT": "udp://10.43.12.7:8600"}, "CONSUL_PORT=udp://10.43.12.7:8600"),
    ],
)
def test_what_is_ignored_is_told_once(
    variables: dict[str, str], ignored: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A variable that can't be honoured, or that a platform set, stops nothing and is named in one warning."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        assert ConsulSettings().url == "http://localhost:8500"
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("registry", "WARNING")
    assert f"ignoring {ignored}:" in record.getMessage()


def test_basic_authentication_of_a_proxy(monkeypatch: pytest.MonkeyPatch, serve: Serve) -> None:
    """CONSUL_HTTP_AUTH is sent with each request, beside the token, and shows nowhere."""
    recorder = serve(lambda _: Answer(200, b"[]", {"X-Consul-Index": "7", "X-Consul-Default-ACL-Policy": "allow"}))
    monkeypatch.setenv("CONSUL_HTTP_ADDR", f"127.0.0.1:{recorder.port}")
    monkeypatch.setenv("CONSUL_HTTP_AUTH", "gate:0pen:5esame")
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", TOKEN)
    with ServiceRegistry(settings=ConsulSettings()) as registry:
        registry.discover_service("cards")
        assert "5esame" not in repr(registry.settings)
    headers = recorder.requests[0].headers
    assert base64.b64decode(headers["authorization"].removeprefix("Basic ")) == b"gate:0pen:5esame"
    assert headers["x-consul-token"] == TOKEN


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
        ("CONSUL_HTTP_ADDR", "unix://"),
        ("CONSUL_HTTP_ADDR", "unix://relative.sock"),
        ("CONSUL_HTTP_SSL_VERIFY", "maybe"),
        ("CONSUL_WAIT", "0"),
        ("CONSUL_WAIT", "nan"),
        ("CONSUL_TLS_SERVER_NAME", "two words"),
        ("CONSUL_CLIENT_KEY", "/a/key/without/its/certificate"),
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
    monkeypatch.setenv("CONSUL_CLIENT_KEY", "/nowhere")
    monkeypatch.setenv("CONSUL_HTTP_AUTH", "somebody:else")
    monkeypatch.setenv("CONSUL_WAIT", "no number")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with ServiceRegistry("127.0.0.1", recorder.port) as registry:
        assert registry.discover_service("cards") == []
    assert not {"x-consul-token", "authorization"} & set(recorder.requests[0].headers)


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
        ("SERVICE_TAGS", "two words", "tags", ("two words",)),
        (
            "SERVICE_TAGS",
            '["Host(`a`, `b`)", "urlprefix-/ strip=/x"]',
            "tags",
            ("Host(`a`, `b`)", "urlprefix-/ strip=/x"),
        ),
        ("SERVICE_TAGS", " []", "tags", ()),
        ("SERVICE_ADDRESS", "my_api_1", "address", "my_api_1"),
        ("SERVICE_ADDRESS", "localhost.", "address", "localhost."),
        ("SERVICE_SCHEME", "https", "scheme", "https"),
        ("SERVICE_VERSION", "1.2", "version", "1.2"),
        ("SERVICE_VERSION", "", "version", None),
        ("SERVICE_HEALTH_CHECK_PATH", "/v1/health?deep=1", "health_check_path", "/v1/health?deep=1"),
        ("SERVICE_HEALTH_CHECK_TLS_SERVER_NAME", "shop.test", "health_check_tls_server_name", "shop.test"),
        ("SERVICE_HEALTH_CHECK_TLS_SKIP_VERIFY", "true", "health_check_tls_skip_verify", True),
        ("SERVICE_META", '{"version": "1.2"}', "meta", {"version": "1.2"}),
        ("SERVICE_WEIGHT", "5", "weight", 5),
        ("SERVICE_DRAIN_SECONDS", "0", "drain_seconds", 0.0),
        ("SERVICE_CALL_TIMEOUT", "2.5", "call_timeout", 2.5),
        ("SERVICE_CALL_RETRIES", "5", "call_retries", 5),
        ("SERVICE_CALL_DEADLINE", "9", "call_deadline", 9.0),
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
        ("SERVICE_TAGS", '["half a list"'),
        ("SERVICE_TAGS", "[7]"),
        ("SERVICE_TAGS", "line\nbreak"),
        ("SERVICE_ADDRESS", "host..name"),
        ("SERVICE_SCHEME", "ftp"),
        ("SERVICE_HEALTH_CHECK_PATH", "health"),
        ("SERVICE_HEALTH_CHECK_HEADERS", '{"two words": "x"}'),
        ("SERVICE_HEALTH_CHECK_HEADERS", '{"X": "line\\nbreak"}'),
        ("SERVICE_HEALTH_CHECK_TLS_SERVER_NAME", "https://shop.test"),
        ("SERVICE_META", '{"": "x"}'),
        ("SERVICE_META", '{"key": 7}'),
        ("SERVICE_META", "{broken"),
        ("SERVICE_META", '["list"]'),
        ("SERVICE_WEIGHT", "0"),
        ("SERVICE_WEIGHT", "65536"),
        ("SERVICE_DRAIN_SECONDS", "-1"),
        ("SERVICE_CALL_TIMEOUT", "0"),
        ("SERVICE_CALL_RETRIES", "0"),
        ("SERVICE_CALL_DEADLINE", "-1"),
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


@pytest.mark.parametrize("name", ["/web/service", None])
def test_variables_of_a_platform_are_no_settings(
    name: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A Kubernetes Service or a Docker link called "service" sets variables like ours: ignored, with one warning."""
    monkeypatch.setenv("SERVICE_PORT", "tcp://10.43.0.9:80")
    if name is not None:
        monkeypatch.setenv("SERVICE_NAME", name)
    assert (Settings().name, Settings().port) == ("cards-api", 8002)
    (record,) = caplog.records
    assert "ignoring SERVICE_PORT=tcp://10.43.0.9:80" in record.getMessage()


DOCUMENTED = re.findall(
    r"^\| `(\w+)` \|", (Path(__file__).parents[3] / "docs/reference/environment.md").read_text(), re.MULTILINE
)
"""Every variable that anything here reads."""


def injected(service: str, port: int) -> dict[str, str]:
    """What every container gets for a Service of this name, unless it says ``enableServiceLinks: false``.

    Source: https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
    """
    link = f"{service}_PORT_{port}_TCP"
    return {
        f"{service}_SERVICE_HOST": "10.96.4.7",
        f"{service}_SERVICE_PORT": str(port),
        f"{service}_SERVICE_PORT_HTTP": str(port),
        f"{service}_PORT": f"tcp://10.96.4.7:{port}",
        link: f"tcp://10.96.4.7:{port}",
        f"{link}_PROTO": "tcp",
        f"{link}_PORT": str(port),
        f"{link}_ADDR": "10.96.4.7",
    }


def test_services_of_any_name_mislead_nobody(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever Kubernetes sets for Services named like the beginnings of our variables, the settings stay as they were,
    and each variable that looked like one of ours is named in one warning."""

    class Wide(Settings):
        admin_port: int = 9000
        database_port: int = Field(default=5432, validation_alias="DATABASE_PORT")

    readers = (ConsulSettings, Wide, MeshSettings)
    before = [each() for each in readers]
    words = [name.split("_") for name in [*DOCUMENTED, "SERVICE_ADMIN_PORT", "DATABASE_PORT"]]
    services = {"_".join(each[:end]) for each in words for end in range(1, len(each))}
    assert {"CONSUL", "SERVICE", "DATABASE", "SERVICE_ADMIN"} <= services
    for service in services:
        for name, value in injected(service, 80).items():
            monkeypatch.setenv(name, value)
    assert [each() for each in readers] == before
    ports = {"CONSUL_PORT", "SERVICE_PORT", "SERVICE_ADMIN_PORT", "DATABASE_PORT"}
    assert sorted(record.getMessage().split("=")[0] for record in caplog.records) == [
        f"ignoring {port}" for port in sorted(ports)
    ]


def test_health_check_headers_show_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The headers of the check may hold a token: it is sent, and stands in no repr and no error."""
    monkeypatch.setenv("SERVICE_HEALTH_CHECK_HEADERS", json.dumps({"Authorization": f"Bearer {TOKEN}"}))
    settings = Settings()
    registration = Registration.of(settings, "127.0.0.1")
    assert registration.health_check_headers == {"Authorization": f"Bearer {TOKEN}"}
    shown = f"{settings!r} {settings.model_dump_json()} {registration!r}"
    monkeypatch.setenv("SERVICE_HEALTH_CHECK_HEADERS", json.dumps({"Authorization": f"Bearer {TOKEN}\n"}))
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert TOKEN not in f"{shown} {caught.value} {caught.value!r}"


def test_metadata_that_fills_consul_leaves_no_room_for_ours() -> None:
    """With as much metadata as Consul takes, nothing is registered beside it, and the instance is."""
    full = {f"key-{number}": "" for number in range(64)}
    assert Registration.of(Settings(meta=full), "127.0.0.1", {"version": "1"}).meta == full
    assert Registration.of(Settings(meta={"secure": "no"}), "127.0.0.1").meta == {"secure": "no"}


def test_a_zone_is_registered_as_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """SERVICE_ZONE becomes the metadata zone, which SERVICE_META may overrule; blank is unset, and no name is told."""
    monkeypatch.setenv("SERVICE_ZONE", "eu-1a")
    assert Registration.of(Settings(), "127.0.0.1").meta["zone"] == "eu-1a"
    assert Registration.of(Settings(meta={"zone": "b"}), "127.0.0.1").meta["zone"] == "b"
    monkeypatch.setenv("SERVICE_ZONE", "")
    assert "zone" not in Registration.of(Settings(), "127.0.0.1").meta
    monkeypatch.setenv("SERVICE_ZONE", "eu 1a")
    with pytest.raises(ValidationError, match="not a zone"):
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
