"""What the compose files and what belongs to them promise, read from the files: needs no engine."""

import json
import re
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.compose import images, stack, up
from deploy.compose.collectors import COLLECTORS, RECIPES
from registry import ServiceSettings
from tools.services import SERVICES as TABLE

ROOT = Path(__file__).parent.parent
COMPOSE = ROOT / "deploy/compose"
TEXT = (COMPOSE / "docker-compose.yml").read_text()
DEFINITION: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = DEFINITION["services"]
OBSERVE_TEXT = (COMPOSE / "docker-compose.observe.yml").read_text()
OBSERVE: dict[str, Any] = yaml.safe_load(OBSERVE_TEXT)
CONTAINERS = SERVICES | {name: OBSERVE["services"][name] for name in COLLECTORS}
"""With the two that the overlay adds."""
OURS = {service.folder: service for service in TABLE}
HAPROXY = (COMPOSE / "haproxy.cfg").read_text()


def env(path: Path) -> dict[str, str]:
    """The variables of an env file."""
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if line and not line.startswith("#"))


def seconds(duration: str) -> float:
    """Compose's notation of whole seconds."""
    return float(duration.removesuffix("s"))


def test_the_services_are_the_ones_meant() -> None:
    """The stack is Consul, Postgres, the edge and exactly the services of this repository."""
    assert SERVICES.keys() == {"consul", "postgres", "edge", *OURS}
    ports = {folder: service.port for folder, service in OURS.items()}
    assert {"backend": 8002, "research": 8001, "orchestrator": 8003}.items() <= ports.items()


def test_the_overlay_adds_collectors_and_sends_traces() -> None:
    """It adds Prometheus and Jaeger, and changes nothing of the services but where traces go."""
    services = OBSERVE["services"]
    assert services.keys() == {"prometheus", "jaeger", *OURS}
    for folder in OURS:
        assert services[folder].keys() == {"environment"}
        assert services[folder]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://jaeger:4318"
    assert OBSERVE["x-base"] == {key: value for key, value in DEFINITION["x-base"].items() if key in OBSERVE["x-base"]}
    assert DEFINITION["x-base"].keys() - OBSERVE["x-base"].keys() == {"user", "environment", "healthcheck"}
    for name in COLLECTORS:
        assert services[name]["environment"] == {"GOMEMLIMIT": "200MiB"}, "below what ends it"


def test_the_collectors_listen_where_they_are_asked() -> None:
    """Ports of services and health checks are those in Jaeger's configuration; it keeps a bounded number of traces."""
    jaeger = yaml.safe_load((COMPOSE / "jaeger.yml").read_text())
    assert jaeger["receivers"]["otlp"]["protocols"]["http"]["endpoint"].endswith(":4318")
    assert OBSERVE["services"]["jaeger"]["ports"][0].endswith(
        jaeger["extensions"]["jaeger_query"]["http"]["endpoint"].removeprefix("0.0.0.0")
    )
    check = OBSERVE["services"]["jaeger"]["healthcheck"]["test"]
    assert jaeger["extensions"]["healthcheckv2"]["http"]["endpoint"] in check[-1]
    assert jaeger["extensions"]["jaeger_storage"]["backends"]["memory"]["memory"]["max_traces"] <= 10_000


def test_prometheus_asks_consul() -> None:
    """Targets come from Consul alone, and the rules file is beside the configuration."""
    settings = yaml.safe_load((COMPOSE / "prometheus/prometheus.yml").read_text())
    [scrape] = settings["scrape_configs"]
    assert [key for key in scrape if key.endswith("_configs")] == ["consul_sd_configs", "relabel_configs"]
    assert scrape["consul_sd_configs"] == [{"server": "consul:8500", "refresh_interval": "1s"}]
    assert [(COMPOSE / "prometheus" / name).exists() for name in settings["rule_files"]] == [True]


def test_local_collectors_are_the_official_versions() -> None:
    """What is built where no image can be pulled has the version of the image."""
    official = env(ROOT / ".env")
    required = {
        name: re.findall(
            rf"^require {re.escape(module)} v(\S+)$", (RECIPES / name / "go.mod").read_text(), re.MULTILINE
        )
        for name, (module, _) in COLLECTORS.items()
    }
    [prometheus], [jaeger] = required["prometheus"], required["jaeger"]
    # Prometheus calls its module 0.313.2 when the program is 3.13.2; Jaeger names 1.76.0 and 2.13.0 together.
    _, minor, patch = prometheus.split(".")
    assert official["PROMETHEUS_IMAGE"] == f"prom/prometheus:v{minor[0]}.{minor[1:]}.{patch}"
    assert (official["JAEGER_IMAGE"], jaeger) == ("jaegertracing/jaeger:2.13.0", "1.76.0")


def test_the_overlay_goes_over_whatever_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--observe`` adds one file to those of .env or of the shell, once."""
    overlay = "deploy/compose/docker-compose.observe.yml"
    monkeypatch.delenv("COMPOSE_FILE", raising=False)
    assert stack.overlaid("observe") == {"COMPOSE_FILE": f"deploy/compose/docker-compose.yml:{overlay}"}
    monkeypatch.setenv("COMPOSE_FILE", f"{overlay}:a.yml:b.yml")
    assert stack.overlaid("observe") == {"COMPOSE_FILE": f"a.yml:b.yml:{overlay}"}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_has_no_more_rights_than_it_needs(name: str) -> None:
    """Every container is non-root, on a read-only root, without capabilities and without a way to get some."""
    service = CONTAINERS[name]
    user, group = map(int, service["user"].split(":"))
    assert user > 0
    assert group > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"cap_add", "privileged", "network_mode", "pid", "devices"}
    assert not [
        volume for volume in service.get("volumes", []) if volume.startswith("./") and not volume.endswith(":ro")
    ]


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_has_limits(name: str) -> None:
    """Every container has a bound on memory (swap included), processes and CPU: one that runs wild harms no other."""
    service = CONTAINERS[name]
    assert service["mem_limit"] == service["memswap_limit"] == ("512m" if name == "postgres" else "256m")
    assert service["pids_limit"] == 256
    assert service["cpus"] == 1.0, "an engine refuses more than its machine has"


def test_only_the_backend_reaches_postgres() -> None:
    """Postgres is in a network that leads nowhere else, and of the others backend-api alone is in it."""
    networks = {name: set(service.get("networks", ["default"])) for name, service in CONTAINERS.items()}
    assert networks.pop("postgres") == {"database"}
    assert networks.pop("backend") == {"default", "database"}
    assert set(map(frozenset, networks.values())) == {frozenset({"default"})}
    assert DEFINITION["networks"]["database"]["internal"] is True


def test_the_networks_do_not_overlap() -> None:
    """Both are parts of NETWORK_PREFIX, and nobody in the first is given an address outside its upper half."""
    pools = {name: network["ipam"]["config"][0] for name, network in DEFINITION["networks"].items()}
    prefix = "${NETWORK_PREFIX:-10.213.85}"
    services, given, database = (
        ip_network(text.replace(prefix, "10.213.85"))
        for text in (pools["default"]["subnet"], pools["default"]["ip_range"], pools["database"]["subnet"])
    )
    assert not services.overlaps(database)
    assert services.supernet(new_prefix=24) == database.supernet(new_prefix=24)
    assert given == list(services.subnets())[1]


def test_the_password_is_in_a_file() -> None:
    """Who needs it gets it as a file, and nobody as a variable: `docker inspect` shows no password."""
    [secret] = DEFINITION["secrets"]
    assert {name for name, service in CONTAINERS.items() if "secrets" in service} == {"backend", "postgres"}
    path = f"/run/secrets/{secret}"
    assert SERVICES["postgres"]["environment"]["POSTGRES_PASSWORD_FILE"] == path
    assert SERVICES["backend"]["environment"]["DATABASE_PASSWORD_FILE"] == path
    for name, service in CONTAINERS.items():
        variables = service.get("environment", {})
        assert not [key for key in variables if "PASSWORD" in key and not key.endswith("_FILE")], name
    default = re.fullmatch(r"\$\{POSTGRES_PASSWORD_FILE:-(.*)\}", DEFINITION["secrets"][secret]["file"])
    assert default
    assert (COMPOSE / default[1]).stat().st_mode & 0o444 == 0o444, "two users read it"


def test_a_password_that_nobody_reads_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever sets the variable of releases before is told, and does not get the default password instead."""
    monkeypatch.setenv("POSTGRES_PASSWORD", "strong")
    assert up.main([]) == 1
    said = capsys.readouterr().err
    assert "POSTGRES_PASSWORD_FILE" in said
    assert "strong" not in said


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_ends_and_comes_back_in_good_order(name: str) -> None:
    """Every container has an init, a restart policy, bounded logs, a health check, and time to drain."""
    service = CONTAINERS[name]
    assert service["init"] is True
    assert service["restart"] == "unless-stopped"
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert service["healthcheck"]["test"][0] == "CMD"
    assert name in COLLECTORS or not {"curl", "wget"} & set(service["healthcheck"]["test"]), "only those images have it"
    # Withdrawing from a dead Consul takes 2 s, then the drain, then what uvicorn gives calls that are under way.
    drain = ServiceSettings.model_fields["drain_seconds"].default
    uvicorn = float(re.findall(r"UVICORN_TIMEOUT_GRACEFUL_SHUTDOWN=(\d+)", (COMPOSE / "Dockerfile").read_text())[0])
    assert seconds(service["stop_grace_period"]) > 2 + drain + uvicorn


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_can_scale(name: str) -> None:
    """No container has a fixed name; only those that do not scale publish ports: on loopback."""
    service = CONTAINERS[name]
    assert "container_name" not in service
    if name not in {"consul", "edge", *COLLECTORS}:
        assert "ports" not in service
        assert not isinstance(service.get("networks"), dict), "an address of its own"
    for port in service.get("ports", []):
        assert port.startswith(("127.0.0.1:", "${EDGE_ADDRESS:-127.0.0.1}:"))


def test_what_is_depended_on_is_healthy_first() -> None:
    """Whoever depends on a service waits until it is healthy, and the services wait for Consul."""
    for name, service in CONTAINERS.items():
        wanted = service.get("depends_on", {})
        assert all(condition == {"condition": "service_healthy"} for condition in wanted.values())
        assert ("consul" in wanted) == (name not in {"consul", "postgres", "jaeger"})
    assert "postgres" in SERVICES["backend"]["depends_on"]


def test_every_variable_has_a_default_that_names_one_thing() -> None:
    """Every variable has a default, the same wherever it stands, and the same as in .env."""
    used = re.findall(r"\$\{?(\w+)([^}]*)\}?", TEXT + OBSERVE_TEXT)
    assert used
    defaults: dict[str, str] = {}
    for name, default in used:
        assert default.startswith(":-"), name
        assert len(default) > 2, name
        assert defaults.setdefault(name, default.removeprefix(":-")) == default.removeprefix(":-"), name
    in_env = {name: image for name, image in env(ROOT / ".env").items() if name.endswith("_IMAGE")}
    assert in_env == {name: image for name, image in defaults.items() if name.endswith("_IMAGE")}
    python = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", (COMPOSE / "Dockerfile").read_text(), re.MULTILINE)
    assert python == [in_env["PYTHON_IMAGE"]]
    assert all(re.search(r":v?\d+\.\d+|:\d+-", image) for image in in_env.values()), "every image has a version"
    assert env(COMPOSE / "local-images.env").keys() == in_env.keys()


def test_the_root_finds_the_compose_file() -> None:
    """A bare docker-compose at the root finds the file, and its containers get the project's name."""
    variables = env(ROOT / ".env")
    assert (ROOT / variables["COMPOSE_FILE"]).samefile(COMPOSE / "docker-compose.yml")
    assert variables["COMPOSE_PROJECT_NAME"] == "registry"


def test_old_compose_accepts_the_keys() -> None:
    """Nothing that docker-compose 1.29 refuses or the legacy builder can't do has crept in."""
    assert {*DEFINITION, *OBSERVE} <= {"x-base", "x-traced", "services", "volumes", "networks", "secrets"}
    assert not {"develop", "annotations"} & {key for service in CONTAINERS.values() for key in service}
    assert not [name for name, service in CONTAINERS.items() if "start_interval" in service["healthcheck"]]
    lines = (COMPOSE / "Dockerfile").read_text().splitlines()
    comments = [line for line in lines if line.startswith("#")]
    instructions = [line for line in lines if not line.startswith("#")]
    assert not [line for line in comments if re.match(r"#\s*syntax", line)]
    assert not [line for line in instructions if "--mount" in line or "<<" in line]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert not [line for line in ignored if line.startswith("!") and "*" in line]


@pytest.mark.parametrize("folder", OURS)
def test_a_service_is_built_and_published_under_its_own_port(folder: str) -> None:
    """A service's port is the same in its image, behind the edge, and in front of it."""
    name, port = OURS[folder].name, OURS[folder].port
    arguments = SERVICES[folder]["build"]["args"]
    assert f"SERVICE={folder}" in arguments
    assert f"PORT={port}" in arguments
    assert [mapping for mapping in SERVICES["edge"]["ports"] if mapping.endswith(f":-{port}}}:{port}")]
    assert re.search(rf"frontend {folder} from public\n    bind :{port}\n(.*\n)+?    default_backend {name}\n", HAPROXY)
    assert re.search(
        rf"backend {name} from basics\n(.*\n)*?    server-template {folder} 1-\d+ _{name}\._tcp\.", HAPROXY
    )


def test_the_edge_has_the_settings_that_were_measured() -> None:
    """Every setting that the edge's figures rest on is there (docs/adr/0006-edge.md)."""
    lines = {line.strip() for line in HAPROXY.splitlines()}
    assert lines >= {
        "timeout connect 200ms",
        "timeout check 400ms",
        "timeout server 2s",
        "option redispatch 1",
        "retries 2",
        "retry-on conn-failure empty-response response-timeout",
        "balance roundrobin",
        "hold obsolete 10s",
        "hold nx 30s",
        'nameserver consul "${CONSUL_ADDRESS}:8600"',
    }
    servers = [line for line in lines if line.startswith("default-server ")]
    [server] = [line for line in servers if " ssl " not in line]
    [mesh] = [line for line in servers if " ssl " in line]
    assert mesh.endswith("verify required")
    for setting in (
        "check inter 500ms fastinter 200ms downinter 500ms fall 2 rise 1",
        "observe layer4 error-limit 3 on-error mark-down",
        "init-addr none",
    ):
        assert setting in server


def test_every_port_is_guarded() -> None:
    """Every frontend that strangers reach has all the limits, and no POST is repeated on any."""
    sections = re.split(r"^(?=[^\s#])", HAPROXY, flags=re.MULTILINE)
    [public] = [section for section in sections if section.startswith("defaults public ")]
    for rule in (
        "maxconn 1000",
        "option http-buffer-request",
        "http-request disable-l7-retry if !METH_GET",
        "http-request del-header X-Request-Deadline",
        "http-request del-header X-Retry-Attempt",
        "http-request del-header X-Subject",
        "http-request deny status 413 ",
        "http-request deny status 404 ",
    ):
        assert f"    {rule}" in public
    frontends = [section for section in sections if section.startswith("frontend ")]
    assert len(frontends) == len(OURS) + 2  # the page's port, and the container's own check
    for frontend in frontends:
        if not frontend.startswith("frontend alive from basics "):
            assert " from public\n" in frontend
            assert "    tcp-request connection track-sc0 src\n" in frontend
            assert "    tcp-request connection reject if { sc0_conn_cur gt 500 }\n" in frontend


def test_consul_keeps_its_data_and_its_address() -> None:
    """Consul's registrations outlive it, its DNS answers say when they are cut, and the edge knows its address."""
    consul = SERVICES["consul"]
    settings = json.loads((COMPOSE / "consul.json").read_text())
    assert f"consul-data:{settings['data_dir']}" in consul["volumes"]
    assert settings["server"] is True
    assert settings["dns_config"]["enable_truncate"] is True
    assert consul["networks"]["default"]["ipv4_address"] == SERVICES["edge"]["environment"]["CONSUL_ADDRESS"]
    [pool] = DEFINITION["networks"]["default"]["ipam"]["config"]
    assert pool["ip_range"].endswith(".64/26"), "nobody else is given an address that ends with .10"


def test_images_hold_no_secret() -> None:
    """No password or token goes into an image, neither by a build argument nor by a file."""
    for name in OURS:
        assert not [argument for argument in SERVICES[name]["build"]["args"] if re.search("(?i)passw|token", argument)]
    assert not re.search(r"(?i)passw|token|secret", (COMPOSE / "Dockerfile").read_text())
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*", "what is sent to the engine is named"


def test_local_images_are_remade_when_their_recipe_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The label by which an image counts as present changes with every file and setting that it is made of."""
    (tmp_path / "Dockerfile").write_text("FROM one\n")
    before = images._recipe(tmp_path)
    assert before == images._recipe(tmp_path)
    (tmp_path / "Dockerfile").write_text("FROM two\n")
    changed = images._recipe(tmp_path)
    monkeypatch.setattr(images, "_PACKAGES", "python3")
    assert len({before, changed, images._recipe(tmp_path)}) == 3


def test_an_image_follows_its_own_recipe() -> None:
    """A change of a collector's recipe remakes that collector's image, and no base image."""
    folders = {name: images._recipes_of(name) for name in env(COMPOSE / "local-images.env")}
    assert {name for name, found in folders.items() if found} == {f"{name.upper()}_IMAGE" for name in COLLECTORS}
    assert folders["JAEGER_IMAGE"] == (RECIPES, RECIPES / "jaeger")


@pytest.mark.parametrize("observe", [False, True], ids=["", "observed"])
@pytest.mark.parametrize(
    ("present", "reachable", "made", "official"),
    [
        (set(), True, False, True),
        (set(), False, True, False),
        ({"official"}, False, False, True),
        ({"local"}, True, True, False),
        ({"official", "local"}, False, False, True),
    ],
)
def test_up_takes_the_images_that_can_be_had(
    monkeypatch: pytest.MonkeyPatch, present: set[str], reachable: bool, made: bool, official: bool, observe: bool
) -> None:
    """Official images where they are or can be pulled, which makes none; local ones, made if need be, elsewhere.

    Nobody waits for the collectors' who did not ask for them.
    """
    calls: list[str] = []
    every = env(COMPOSE / "local-images.env")
    collectors = {f"{name.upper()}_IMAGE" for name in COLLECTORS}
    local_names = {name: image for name, image in every.items() if observe or name not in collectors}
    for name in every:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        images, "has_images", lambda names: ("local" if names.items() <= every.items() else "official") in present
    )
    monkeypatch.setattr(images, "can_have_official_images", lambda _: reachable)
    monkeypatch.setattr(images, "make_missing_images", lambda names: calls.append("made"))
    chosen = images.choose_images(lambda _: None, observe=observe)
    official_names = {name: image for name, image in env(ROOT / ".env").items() if name in local_names}
    assert chosen == (official_names if official else local_names)
    assert calls == (["made"] if made else [])


def test_up_takes_the_images_that_the_shell_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Image variables of the shell win: nothing is asked and nothing is made."""
    mine = {name: f"mine/{name.lower()}:1" for name in env(COMPOSE / "local-images.env")}
    for name, image in mine.items():
        monkeypatch.setenv(name, image)
    for question in ("has_images", "can_have_official_images"):
        monkeypatch.setattr(images, question, lambda _: pytest.fail("asked"))
    monkeypatch.setattr(images, "make_missing_images", lambda _: pytest.fail("made"))
    assert images.choose_images(lambda _: None, observe=True) == mine
