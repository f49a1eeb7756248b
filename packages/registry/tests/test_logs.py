"""What is logged: every record in a form that holds, whoever runs the service; and a user's own set-up stays."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

import registry.logs
from registry import InvalidInputError, ServiceSettings
from registry.logs import JsonFormatter, TextFormatter, set_fields, setup_logging
from registry.testing.fixtures import ConsulAgent
from registry.testing.ports import free_ports
from tests.support.command import ServiceProcess, wait_until

HERE = Path(__file__).parent
WORKERS = ["--workers=2", "--timeout-worker-healthcheck=30"]
LOG_CONFIG = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"all": {"()": "registry.logs.LogHandler"}},
    "root": {"level": "INFO", "handlers": ["all"]},
}


@pytest.fixture(autouse=True)
def fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known but what the test says."""
    monkeypatch.setattr(registry.logs, "_fields", {})


def record(message: str, *args: object, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    """A record as a logger makes it."""
    return logging.getLogger("shop").makeRecord("shop", level, __file__, 1, message, args, None, extra=extra)


def as_json(made: logging.LogRecord) -> dict[str, Any]:
    """The record's line, which must be one, parsed as strictly as RFC 8259."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = JsonFormatter().format(made)
    assert len(line.splitlines()) == 1
    parsed: dict[str, Any] = json.loads(line, parse_constant=refuse)
    return parsed


def test_a_text_line_shows_everything() -> None:
    """Time, level, logger, message, then every extra; words as they are, whatever else in quotes."""
    set_fields("instance", lambda: {"instance": "shop-1"})
    made = record("sold %s", "tea", price=2.5, to="Ann", why="a = b", tags=["x", 'y"'], none=None)
    made.created, made.msecs = 1_800_000_000.25, 250.0
    assert TextFormatter().format(made) == (
        "2027-01-15T08:00:00.250Z INFO    shop: sold tea  "
        r'price=2.5 to=Ann why="a = b" tags=["x", "y\""] none=null instance=shop-1'
    )


def test_a_json_line_shows_everything() -> None:
    """The same as one object; an extra that is called like ours takes nothing away."""
    set_fields("instance", lambda: {"instance": "shop-1"})
    made = record("sold %s", "tea", price=2.5, to={"name": "Ann"}, level_="low", time="tomorrow", logger=None)
    made.created, made.msecs = 1_800_000_000.25, 250.0
    assert as_json(made) == {
        "time": "2027-01-15T08:00:00.250Z",
        "level": "INFO",
        "logger": "shop",
        "message": "sold tea",
        "price": 2.5,
        "to": {"name": "Ann"},
        "level_": "low",
        "time_": "tomorrow",
        "logger_": None,
        "instance": "shop-1",
    }


class Unspeakable:
    def __repr__(self) -> str:
        raise ValueError("no words")


LOOP: list[object] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Path("/tmp"), f"{Path('/tmp')!r}"),
        (SecretStr("hunter2"), "SecretStr('**********')"),
        ({"password": SecretStr("hunter2")}, {"password": "SecretStr('**********')"}),
        (ServiceSettings.model_construct(health_check_headers={"T": SecretStr("hunter2")}), None),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        (float("nan"), "nan"),
        (LOOP, "[[...]]"),
        (b"\xff", r"b'\xff'"),
        ("\ud800", "\ud800"),
        (Unspeakable(), "<Unspeakable, whose repr failed: ValueError>"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_json_has_no_form_for_is_shown_by_its_repr(value: object, shown: object) -> None:
    """Nothing that somebody logs breaks a line, and no secret comes out of its type."""
    line = as_json(record("odd", odd=value))
    assert shown is None or line["odd"] == shown
    text = TextFormatter().format(record("odd", odd=value))
    assert len(text.splitlines()) == 1
    assert "hunter2" not in f"{line}{text}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=10,
)
NAMES = st.text(min_size=1).filter(lambda name: name not in vars(record("")) and name not in {"message", "asctime"})


@given(st.text(), st.dictionaries(NAMES, JSON))
def test_any_record_is_one_line(message: str, extra: dict[str, object]) -> None:
    """Whatever strangers put into messages and extras, a line stays a line, and JSON parses."""
    made = logging.getLogger("shop").makeRecord("shop", 20, __file__, 1, "%s", (message,), None, extra=extra)
    assert as_json(made)["message"] == message.strip()
    assert len(TextFormatter().format(made).splitlines()) == 1


def test_an_exception_is_one_field_or_indented_below() -> None:
    """The whole traceback with its notes; in text no line of it can pass for a record."""
    try:
        error = ValueError("spoilt\n2027-01-15T08:00:00.250Z INFO    shop: forged")
        error.add_note("attempt 1 on shop-2")
        raise error
    except ValueError:
        made = logging.getLogger("shop").makeRecord("shop", 40, __file__, 1, "failed", (), sys.exc_info())
    line = as_json(made)
    assert line["exception"].startswith("Traceback (most recent call last):\n")
    assert line["exception"].endswith("attempt 1 on shop-2")
    first, *below = TextFormatter().format(made).split("\n")
    assert first.endswith("ERROR   shop: failed")
    assert below
    assert all(part.startswith("    ") for part in below)


def test_arguments_that_do_not_fit_lose_no_record() -> None:
    """A mistake in a log call shows the message and what was given, instead of a traceback between the lines."""
    assert as_json(record("%d cards", "seven"))["message"] == "%d cards ('seven',)"


def fails() -> dict[str, object]:
    raise LookupError


def test_a_record_shows_what_is_known_where_it_is_written() -> None:
    """The trace is asked for at each record; whatever fails or is unknown is left out; a record's own word counts."""
    trace: dict[str, object] = {"trace_id": "ab", "span_id": "cd"}
    set_fields("settings", lambda: {"instance": "shop-?-1"})
    set_fields("trace", lambda: trace)
    set_fields("broken", fails)
    found = as_json(record("in a span"))
    assert (found["instance"], found["trace_id"], found["span_id"]) == ("shop-?-1", "ab", "cd")
    trace.clear()
    set_fields("registrar", lambda: {"instance": None})
    assert as_json(record("before", instance=None))["instance"] == "shop-?-1"
    set_fields("registrar", lambda: {"instance": "shop-::1-1"})
    assert as_json(record("after"))["instance"] == "shop-::1-1"
    assert as_json(record("of another", instance="shop-2"))["instance"] == "shop-2"
    assert "trace_id" not in as_json(record("out of it"))


@pytest.mark.parametrize(("variable", "value"), [("LOG_FORMAT", "xml"), ("LOG_LEVEL", "loud")])
def test_an_invalid_variable_is_named(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says which variable, and what may stand there."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidInputError, match=f"{variable}: set it to "):
        setup_logging(ServiceSettings(name="shop", port=1))


def run(program: str, **variables: str) -> str:
    """What this program prints, and logs."""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"SERVICE_NAME": "shop", "SERVICE_PORT": "1"} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout + ran.stderr


@pytest.mark.real
def test_importing_changes_nothing() -> None:
    """The package gets no handler and no level anywhere before a service asks for it."""
    program = """
import logging
import registry, registry.fastapi, registry.logs
print([logging.root.handlers, logging.root.level, logging.getLogger("registry").handlers])
"""
    assert run(program) == "[[], 30, []]\n"


@pytest.mark.real
def test_a_set_up_before_ours_stays() -> None:
    """Whoever has given the root logger a handler gets exactly what he asked for."""
    program = """
import logging
from registry import ServiceSettings
from registry.logs import setup_logging
logging.basicConfig(format="mine %(message)s")
setup_logging(ServiceSettings())
logging.getLogger("httpx").warning("seen")
logging.getLogger("shop").info("not seen")
"""
    assert run(program, LOG_LEVEL="DEBUG") == "mine seen\n"


@pytest.mark.real
def test_levels_and_warnings() -> None:
    """LOG_LEVEL is for all; libraries that log their every step come one level later; warnings are records."""
    program = """
import logging, warnings
from registry import ServiceSettings
from registry.logs import setup_logging
setup_logging(ServiceSettings())
setup_logging(ServiceSettings())  # a second app in the same process
logging.getLogger("httpx").info("each request")
logging.getLogger("shop").info("once")
warnings.warn("odd")
"""
    lines = [json.loads(line) for line in run(program, LOG_FORMAT="JSON").splitlines()]
    assert [(line["logger"], line["instance"]) for line in lines] == [
        ("shop", "shop-?-1"),
        ("py.warnings", "shop-?-1"),
    ]
    assert run(program, LOG_LEVEL="error") == ""
    assert "httpx: each request" in run(program, LOG_LEVEL="debug")


class Shop(ServiceProcess):
    """`logs_app`, under uvicorn or another program."""

    def __init__(self, command: list[str], consul: ConsulAgent | None, env: Mapping[str, str]) -> None:
        port = free_ports(1)[0]
        variables = {"PYTHONPATH": str(HERE), "LOG_FORMAT": "json", "SERVICE_ADDRESS": "127.0.0.1", **env}
        super().__init__("logs_app:app", "shop", consul=consul, port=port, cwd=HERE, env=variables)
        program = str(Path(sys.executable).with_name(command[0]))
        self._command = [program, *(part.format(port=port, directory=self.directory) for part in command[1:])]

    def lines(self) -> list[dict[str, Any]]:
        """Every line of its log. Raises: ValueError, when one is not JSON."""
        return [json.loads(line) for line in self.log.splitlines()]

    def messages(self, logger: str) -> list[str]:
        """What this logger wrote."""
        return [line["message"] for line in self.lines() if line["logger"] == logger]


UVICORN = ["uvicorn", "logs_app:app", "--port={port}"]
GUNICORN = ["gunicorn", "logs_app:app", "--worker-class=uvicorn_worker.UvicornWorker", "--bind=127.0.0.1:{port}"]
Start = Callable[..., Shop]


@pytest.fixture
def start(consul_agent: ConsulAgent) -> Iterator[Start]:
    """Starts the shop with this command line, and returns when it is found."""
    with ExitStack() as stack:

        def run(command: list[str], files: Mapping[str, object] | None = None, **env: str) -> Shop:
            shop = Shop(command, consul_agent, env)
            stack.callback(shop.close)
            for name, content in (files or {}).items():
                (shop.directory / name).write_text(json.dumps(content))
            shop.start()
            wait_until(shop.is_found, 20)
            return shop

        yield run


def visit(shop: Shop) -> None:
    """One request of each kind, then the end."""
    paths = ("/work", "/error", "/health?instance=", "/metrics")
    # Each on a connection of its own: uvicorn closes it after an exception.
    answers = [httpx.get(shop.url + path, trust_env=False).status_code for path in paths]
    assert answers == [200, 500, 404, 404]
    shop.end(signal.SIGTERM)


def test_every_record_of_a_run_is_json(start: Start) -> None:
    """Under the plain command: uvicorn's own, the service's and ours, each of this instance; no poll is among them."""
    shop = start(UVICORN)
    visit(shop)
    lines = shop.lines()
    assert {line["instance"] for line in lines} == {shop.id}
    assert {line["logger"] for line in lines} == {"uvicorn.error", "uvicorn.access", "registry", "shop"}
    assert shop.messages("registry") == [f"registered {shop.id}", f"deregistered {shop.id}"]
    access = [line for line in lines if line["logger"] == "uvicorn.access"]
    assert [(line["method"], line["path"], line["status"]) for line in access if line["path"] != "/"] == [
        ("GET", "/work", 200),
        ("GET", "/error", 500),
    ]
    (sold,) = (line for line in lines if line["logger"] == "shop")
    assert (sold["message"], sold["price"], sold["to"]) == ("sold tea", 2.5, "two\npeople")
    (failed,) = (line for line in lines if "exception" in line)
    assert failed["exception"].endswith("RuntimeError: unhandled")


def test_at_debug_polls_are_logged(start: Start) -> None:
    """Somebody who wants to see everything sees health checks, too."""
    shop = start(UVICORN, LOG_LEVEL="DEBUG")
    visit(shop)
    polls = [line for line in shop.lines() if line.get("path", "").startswith(("/health", "/metrics"))]
    assert {line["level"] for line in polls} == {"DEBUG"}
    assert {line["path"] for line in polls} >= {"/health?instance=", "/metrics", f"/health?instance={shop.id}"}
    assert "looking" in shop.messages("shop")


def test_a_record_names_the_trace_of_its_request(start: Start) -> None:
    """Whatever a request logs carries its caller's trace and the request's own span; nothing else carries any."""
    shop = start(UVICORN, OTEL_TRACES_EXPORTER="none")
    trace, caller = "ab" * 16, "cd" * 8
    httpx.get(f"{shop.url}/work", headers={"traceparent": f"00-{trace}-{caller}-01"}, trust_env=False)
    shop.end(signal.SIGTERM)
    (sold,) = (line for line in shop.lines() if line["logger"] == "shop")
    assert sold["trace_id"] == trace
    assert re.fullmatch("[0-9a-f]{16}", sold["span_id"])
    assert sold["span_id"] != caller
    (access,) = (line for line in shop.lines() if line.get("path") == "/work")
    assert (access["trace_id"], access["span_id"]) == (trace, sold["span_id"])
    assert {line["logger"] for line in shop.lines() if "trace_id" not in line} >= {"registry", "uvicorn.error"}


def test_a_text_run_is_readable(start: Start) -> None:
    """By default: one line each, which begins with time, level and logger, and ends with what is known."""
    shop = start(UVICORN, LOG_FORMAT="")
    shop.http.get("/work")
    shop.end(signal.SIGTERM)
    head = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z (INFO   |WARNING) [\w.]+: \S.*  .*instance=" + re.escape(shop.id))
    assert [line for line in shop.log.splitlines() if not head.fullmatch(line)] == []
    assert f"INFO    registry: registered {shop.id}  instance={shop.id}\n" in shop.log
    assert r'shop: sold tea  price=2.5 to="two\npeople" instance=' in shop.log
    assert "/health" not in shop.log


RUNNERS: dict[str, tuple[list[str], str]] = {
    "uvicorn, two workers": ([*UVICORN, *WORKERS], r"INFO: +|$"),
    "uvicorn, reload": ([*UVICORN, "--reload", "--reload-dir={directory}"], r"INFO: +"),
    "gunicorn, two workers": ([*GUNICORN, "--workers=2"], r"\[.*\] \[\d+\] \[INFO\]|$"),
    "gunicorn, the app made before the workers": ([*GUNICORN, "--preload"], r"\[.*\] \[\d+\] \[INFO\]|$"),
    "fastapi run": (["fastapi", "run", "logs_app.py", "--port={port}"], r" |$|INFO: +(Started|Waiting)"),
    "uvicorn.run(app)": (["python", "logs_app.py"], r"INFO: +(Started|Waiting)"),
}
"""Command lines, and how those lines begin that are written by a process without the app, or before it begins."""


@pytest.mark.parametrize("name", RUNNERS)
def test_under_other_commands_the_app_s_process_logs_the_same(start: Start, name: str) -> None:
    """The processes that serve write JSON only; a supervisor, which never imports the app, its own lines."""
    command, others = RUNNERS[name]
    shop = start(command)
    # One that is told to stop before it has joined the others would register and deregister once more.
    wait_until(lambda: shop.log.count(f"registered {shop.id}") == 1 + ("two workers" in name), 30)
    visit(shop)
    lines = [line for line in shop.log.splitlines() if not re.match(others, line)]
    found = [json.loads(line) for line in lines]
    assert {line["instance"] for line in found} == {shop.id}
    messages = [line["message"] for line in found]
    assert f"registered {shop.id}" in messages
    assert messages.count(f"deregistered {shop.id}") == 1
    assert "Application startup complete." in messages
    assert "sold tea" in messages
    assert "/health" not in "".join(messages)


def test_with_our_handler_in_a_log_config_the_supervisor_logs_the_same(start: Start) -> None:
    """``--log-config`` with ``LogHandler`` reaches the process that starts the workers: every line is JSON, once."""
    shop = start([*UVICORN, *WORKERS, "--log-config={directory}/logging.json"], {"logging.json": LOG_CONFIG})
    wait_until(lambda: shop.messages("registry").count(f"registered {shop.id}") == 2, 30)
    visit(shop)
    messages = [line["message"] for line in shop.lines()]
    assert any("Started parent process" in message for message in messages)
    assert messages.count("sold tea") == 1
    assert messages.count(f"registered {shop.id}") == 2
    assert "/health" not in "".join(messages)


OWN: dict[str, dict[str, object]] = {
    "of the root logger": {"root": {"level": "INFO", "handlers": ["own"]}},
    "of uvicorn's only": {"loggers": {"uvicorn": {"level": "INFO", "handlers": ["own"]}}},
}


@pytest.mark.parametrize("loggers", OWN.values(), ids=OWN)
def test_a_log_config_of_one_s_own_stays(start: Start, loggers: dict[str, object]) -> None:
    """What a user configures with ``--log-config`` is what he gets: no line of ours, none twice."""
    config: dict[str, object] = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"own": {"format": "own %(name)s %(message)s"}},
        "handlers": {"own": {"class": "logging.StreamHandler", "formatter": "own"}},
    }
    shop = start([*UVICORN, "--log-config={directory}/logging.json"], {"logging.json": config | loggers})
    shop.end(signal.SIGTERM)
    assert shop.log.count("own uvicorn.error Application startup complete.") == 1
    assert '{"time"' not in shop.log
    assert ("own registry registered" in shop.log) is ("root" in loggers)


def test_uvicorn_s_options_keep_their_meaning(start: Start) -> None:
    """``--no-access-log`` and ``--log-level warning`` silence what they silence without us."""
    shop = start([*UVICORN, "--no-access-log", "--log-level=warning"])
    visit(shop)
    assert {line["logger"] for line in shop.lines()} == {"registry", "shop", "uvicorn.error"}
    assert shop.messages("uvicorn.error") == ["Exception in ASGI application"]


@pytest.mark.real
def test_without_consul_one_line_says_it_all() -> None:
    """What fails, what that means, what happens next and why, in one line, once."""
    with ExitStack() as stack:
        env = {"CONSUL_HTTP_ADDR": f"localhost:{free_ports(1)[0]}", "LOG_FORMAT": "text"}
        shop = Shop(UVICORN, None, env)
        stack.callback(shop.close)
        shop.start()
        wait_until(lambda: "registration failed" in shop.log)
        assert shop.end(signal.SIGTERM) < 10
        (line,) = (line for line in shop.log.splitlines() if "registration failed" in line)
    assert re.search(
        r"Z WARNING registry: registration failed, so callers can't find this service; it serves on and tries again "
        r"every 2 s: Consul at http://localhost:\d+ can't be reached: .*; is it running\?  instance=shop-127",
        line,
    )
