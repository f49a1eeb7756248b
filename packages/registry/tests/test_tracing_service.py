"""What a service exports of its traces, when, and at whose wish."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from demo.collector import Collector, running_collector
from registry import InvalidInputError, ServiceSettings
from registry.testing.agent import ConsulAgent
from registry.testing.ports import free_ports
from registry.tracing import server_telemetry, set_up_tracing
from tests.support.command import ServiceProcess, wait_until

HERE = Path(__file__).parent
SETTINGS = ServiceSettings(name="traced-api", port=8009)
SLOWLY = 60.0
"""Seconds until spans are exported that nobody flushes: longer than any test here."""
GUNICORN = ["gunicorn", "traced_app:app", "--worker-class=uvicorn_worker.UvicornWorker", "--workers=2", "--preload"]
COMMANDS = {
    "uvicorn": ["uvicorn", "traced_app:app"],
    "uvicorn, two workers": ["uvicorn", "traced_app:app", "--workers=2", "--timeout-worker-healthcheck=30"],
    "gunicorn, forked after the app was made": GUNICORN,
}


class Traced(ServiceProcess):
    """`traced_app`, without a Consul unless one is given, under any program."""

    def __init__(self, command: list[str], variables: dict[str, str], consul: ConsulAgent | None = None) -> None:
        nowhere = {"CONSUL_HTTP_ADDR": f"127.0.0.1:{free_ports(1)[0]}"} if consul is None else {}
        env = nowhere | {"PYTHONPATH": str(HERE), **variables}
        super().__init__("traced_app:app", "traced-api", consul=consul, port=None, cwd=HERE, env=env)
        program = str(Path(sys.executable).with_name(command[0]))
        where = f"--bind=127.0.0.1:{self.port}" if command[0] == "gunicorn" else f"--port={self.port}"
        self._command = [program, *command[1:], where]


@pytest.fixture
def collector() -> Iterator[Collector]:
    with running_collector() as running:
        yield running


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of whoever runs this."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.mark.real
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_the_last_spans_are_exported_at_the_end(command: list[str], collector: Collector) -> None:
    """Of each of its processes, although uvicorn ends by the signal: no other span would make a collector wait."""
    service = Traced(command, collector.environment(SLOWLY))
    try:
        service.start()
        pids: list[int] = []
        wanted = 2 if "two" in " ".join(command) or "--workers=2" in command else 1
        while len(pids) < 20 or (len(set(pids)) < wanted and len(pids) < 2000):
            pids.append(httpx.get(f"{service.url}/pid", trust_env=False).json())
        assert len(set(pids)) == wanted
        assert collector.spans == []
        service.end(signal.SIGTERM)
        assert [span.name for span in collector.spans].count("GET /pid") == len(pids), service.log
    finally:
        service.close()


@pytest.mark.real
def test_a_collector_that_hangs_delays_the_end_by_two_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        endpoint = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        service = Traced(COMMANDS["uvicorn"], {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})
        try:
            service.start()
            assert service.end(signal.SIGTERM) < 4
            assert "does not answer" in service.log
        finally:
            service.close()


def test_logs_name_the_trace(consul_agent: ConsulAgent, collector: Collector) -> None:
    """A record that is written within a request has the ids of its span; any other has none."""
    service = Traced(COMMANDS["uvicorn"], collector.environment() | {"LOG_FORMAT": "json"}, consul_agent)
    try:
        service.start()
        wait_until(service.is_found)
        assert service.http.get("/calls").json() == 200
        service.end(signal.SIGTERM)
        records = {record["message"]: record for record in map(json.loads, service.log.splitlines())}
    finally:
        service.close()
    [request] = [span for span in collector.spans if span.name == "GET /calls"]
    assert (records["calling"]["trace_id"], records["calling"]["span_id"]) == (request.trace, request.id)
    assert "trace_id" not in records["Application startup complete."]


def test_consul_is_not_traced(consul_agent: ConsulAgent, collector: Collector) -> None:
    """Even where httpx is instrumented, its checks, long polls and registration make no trace."""
    service = Traced(COMMANDS["uvicorn"], collector.environment() | {"INSTRUMENT": "httpx"}, consul_agent)
    try:
        service.start()
        wait_until(service.is_found)
        assert service.http.get("/calls").json() == 200
        service.end(signal.SIGTERM)
    finally:
        service.close()
    roots = {span.name for span in collector.spans if not span.parent}
    assert "GET /calls" in roots
    assert roots <= {"GET /calls", "GET"}, roots  # "GET": that nobody serves "/"
    assert {span.kind for span in collector.spans if not span.parent} == {"SERVER"}


@pytest.mark.parametrize(
    "variables",
    [{}, {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}],
    ids=["unset", "disabled"],
)
def test_nothing_is_traced_unless_asked_for(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert set_up_tracing(SETTINGS) is None


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_TRACES_EXPORTER": "zipkin"},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"},
    ],
)
def test_an_exporter_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInputError, match="OTEL_TRACES_EXPORTER"):
        set_up_tracing(SETTINGS)


def set_up(variables: dict[str, str]) -> list[str]:
    """What a process with these variables has then: its sampler, its service's name, how many exporters."""
    program = (
        "from registry import ServiceSettings; from registry.tracing import set_up_tracing;"
        "from opentelemetry import trace;"
        "set_up_tracing(ServiceSettings(name='traced-api', port=8009, version='1.2')); p = trace.get_tracer_provider();"
        "print(p.sampler.get_description(), p.resource.attributes['service.name'],"
        " p.resource.attributes['service.version'], len(p._active_span_processor._span_processors) - 1, sep='|')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | variables, check=True, capture_output=True, text=True
    )
    return done.stdout.strip().split("|")


@pytest.mark.real
def test_the_standard_variables_are_heeded() -> None:
    """Sampler, names, exporters; what the settings say is only for what the variables do not."""
    sampler, *rest = set_up({"OTEL_TRACES_EXPORTER": "none"})
    assert sampler.startswith("ParentBased{root:AlwaysOnSampler")
    assert rest == ["traced-api", "1.2", "0"]
    sampler, *rest = set_up(
        {
            "OTEL_TRACES_EXPORTER": "otlp,console",
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": "0.25",
            "OTEL_SERVICE_NAME": "other-api",
            "OTEL_RESOURCE_ATTRIBUTES": "service.name=third-api,service.version=7",
        }
    )
    assert sampler.startswith("ParentBased{root:TraceIdRatioBased{0.25}")
    assert rest == ["other-api", "7", "2"]


def test_what_only_machines_ask_is_not_traced() -> None:
    """Wherever the health router is."""
    excluded = server_telemetry(ServiceSettings(name="traced-api", port=1, health_check_path="/v1/health"))["exclude"]
    assert excluded is not None
    paths = ("/health", "/v1/health", "/metrics", "/registry/state", "/stock", "/stock/health")
    assert [path for path in paths if not excluded({"path": path})] == ["/stock", "/stock/health"]
