"""What Kubernetes' API server itself says of the manifests, where there is one: it sees what no schema does."""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from deploy.kubernetes.render import HERE, OVERLAYS, render
from tests.support.api_server import ApiServer, ApiServerNotFoundError, running_api_server

pytestmark = pytest.mark.real
AGENTS_PORT = 'hostPort (container "consul" uses hostPort 8500)'
"""What the standard `restricted` has against the agents, and nothing against anybody else."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """One with the namespace, in which what is applied is only tried."""
    try:
        with running_api_server(tmp_path_factory.mktemp("api-server")) as started:
            done = started.ask("apply", "-f", str(HERE / "base/namespace.yaml"))
            assert done.returncode == 0, done.stderr
            yield started
    except ApiServerNotFoundError as error:
        pytest.skip(f"{error}, which `nox -s k8s` would have made")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_server_accepts_every_object(server: ApiServer, overlay: str) -> None:
    """It refuses nothing, and warns of nothing but the agents' port of the node."""
    done = server.ask("apply", "--dry-run=server", "-k", str(HERE / overlay))
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("Warning")]
    assert [AGENTS_PORT in line for line in warnings] == [True]
    assert done.stdout.count("(server dry run)") == sum(1 for _ in yaml.safe_load_all(render(HERE / overlay)))


def test_it_sees_what_schemas_do_not(server: ApiServer) -> None:
    """A selector that fits no pod, a quantity that is none, and a mount of a volume that is not there are refused."""
    objects = list(yaml.safe_load_all(render(HERE / OVERLAYS[0])))
    deployment = next(each for each in objects if each["kind"] == "Deployment")
    for path, value, reason in (
        ("selector.matchLabels", {"app": "another"}, "does not match template `labels`"),
        ("template.spec.containers.0.resources.limits.memory", "256 megabytes", "quantities must match"),
        ("template.spec.volumes.0.name", "another", "volumeMounts[0].name: Not found"),
    ):
        broken = yaml.safe_load(yaml.safe_dump(deployment))
        change(broken["spec"], path.split("."), value)
        refused = server.ask("apply", "--dry-run=server", "-f", "-", given=yaml.safe_dump(broken))
        assert refused.returncode != 0
        assert reason in refused.stderr


def change(target: Any, path: list[str], value: object) -> None:
    """Sets what is there at the end of the path."""
    *way, last = path
    for step in way:
        target = target[int(step) if isinstance(target, list) else step]
    target[last] = value
