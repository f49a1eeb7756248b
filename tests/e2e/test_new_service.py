"""The next service in containers: made in a copy of this repository, scaled to two; and in a repository of its own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from deploy.compose.images import choose_images
from deploy.compose.stack import compose_command
from registry.testing.ports import free_ports
from tests.clone import clone, run, succeed
from tests.e2e.system import wait_until
from tools.services import SERVICES

PROJECT = "registry-e2e-new"
NETWORK_PREFIX = "10.213.86"
SECONDS = 60.0


@contextmanager
def containers(folder: Path, variables: Mapping[str, str], *options: str) -> Iterator[None]:
    """What that folder's Compose file describes is up inside; after, nothing of it is left, its images neither."""
    compose = compose_command()
    try:
        succeed(folder, *compose, "up", "-d", "--build", *options, **variables)
        yield
    finally:
        run(folder, *compose, "down", "--volumes", "--remove-orphans", **variables)
        tag = variables["IMAGE_TAG"]
        patterns = ("--filter", f"reference=*:{tag}", "--filter", f"reference=*/*:{tag}")
        images = run(folder, "docker", "image", "ls", "--quiet", *patterns).stdout.split()
        run(folder, "docker", "image", "rm", "--force", *images)


def instance(port: str, path: str) -> str | None:
    """Who answers there with success; None: nobody."""
    try:
        answer = httpx.get(f"http://127.0.0.1:{port}{path}", timeout=10.0, trust_env=False)
    except httpx.TransportError:
        return None
    return answer.headers.get("X-Service-Instance") if answer.is_success else None


def test_a_new_service_works_in_containers(tmp_path: Path) -> None:
    """Both replicas of billing-api answer on its port, and callers find it by name; so they do with ledger-api,
    whose repository knows nothing of this one but the network to join."""
    copy, alone = tmp_path / "registry", tmp_path / "ledger"
    clone(copy)
    make = ("-m", "nox", "-s", "new-service", "--")
    succeed(copy, *make, "billing", "8004")
    succeed(copy, *make, "ledger", "8006", "--calls", "billing-api", "--standalone", str(alone))

    folders = [*(service.folder for service in SERVICES), "billing", "ledger", "consul_ui"]
    ports = {f"{name.upper()}_PORT": str(port) for name, port in zip(folders, free_ports(len(folders)), strict=True)}
    names = {"COMPOSE_PROJECT_NAME": PROJECT, "IMAGE_TAG": PROJECT, "NETWORK_PREFIX": NETWORK_PREFIX}
    variables = {**choose_images(print), **names, **ports}
    front, billing, ledger = (ports[f"{name}_PORT"] for name in ("ORCHESTRATOR", "BILLING", "LEDGER"))

    with containers(copy, variables, "--scale", "billing=2"):
        wait_until(lambda: instance(front, "/api/health/billing-api"), SECONDS, "a call of billing-api by name")
        answered: set[str | None] = set()

        def both_have_answered() -> bool:
            answered.add(instance(billing, "/api/neighbour"))
            return len(answered - {None}) == 2

        wait_until(both_have_answered, SECONDS, "answers of both replicas")
        assert all(str(name).startswith(f"billing-api-{NETWORK_PREFIX}.") for name in answered - {None})

        names = {"COMPOSE_PROJECT_NAME": f"{PROJECT}-ledger", "CONSUL_NETWORK": f"{PROJECT}_default"}
        with containers(alone, {**variables, **names, "IMAGE_TAG": f"{PROJECT}-ledger"}):
            wait_until(lambda: instance(front, "/api/health/ledger-api"), SECONDS, "a call of ledger-api by name")
            assert instance(ledger, "/api/neighbour"), "it calls billing-api by name"
