"""What the API server itself says of the manifests."""

import subprocess

import pytest

from deploy.kubernetes.render import HERE, OVERLAYS
from tests.k8s.system import System

EXPECTED = 'hostPort (container "consul" uses hostPort 8500)'
"""Of the agents, which every service of their node asks: no standard of pod security but `privileged` allows that."""


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if (HERE / name).exists()])
def test_the_server_accepts_every_manifest(system: System, overlay: str) -> None:
    """A dry run on the server refuses nothing, and warns of nothing but the agents' port."""
    command = system.cluster.command("apply", "--dry-run=server", "-k", str(HERE / overlay))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("Warning")]
    assert [line for line in warnings if EXPECTED not in line] == []
    assert done.stdout.count("(server dry run)") > 20
