"""`nox -s restore`: starts the locked system with empty servers, and gives it back what `nox -s backup` has kept."""

import argparse
import subprocess
import sys
from pathlib import Path

from deploy.compose.images import choose_images
from deploy.compose.locked.roll import wait_until_healthy
from deploy.compose.stack import Stack, StackError, exit_code, overlaid
from deploy.keeper.grants import AGENT, SERVERS
from registry.testing.agent import ConsulNotFoundError

_RUNNING = "The system runs, and this would replace its secrets and all that Consul holds: run `nox -s down` first."


def main() -> int:
    """Restores; returns the exit code."""
    parser = argparse.ArgumentParser(prog="nox -s restore --", description=__doc__)
    parser.add_argument("file", type=Path, help="what `nox -s backup` wrote")
    path: Path = parser.parse_args().file

    def work() -> None:
        restore(Stack(choose_images(print) | overlaid("locked")), path)

    return exit_code(work, OSError, ConsulNotFoundError)


def restore(stack: Stack, path: Path, *options: str) -> None:
    """Returns when Consul has it all and leads. ``options``: for `up`. Blocks. Raises: StackError, OSError."""
    with path.open("rb") as archive:
        if any(container.state == "running" for container in stack.containers()):
            raise StackError(_RUNNING)
        stack.compose("down", "--remove-orphans")
        _remove_data(stack)
        stack.compose("build", "keeper")
        stack.job("restore-vault", stdin=archive)
        # Nobody else yet: they would get certificates of an authority that the backup replaces.
        stack.compose("up", "-d", "consul")
        archive.seek(0)
        stack.job("restore-consul", stdin=archive)
    # It tells the servers again what is registered with it.
    stack.compose("restart", "consul")
    wait_until_healthy(stack, "consul")
    stack.compose("up", "-d", *options)


def _remove_data(stack: Stack) -> None:
    """What servers and agent have stored: it belongs to other secrets."""
    stored = tuple(f"{node}-data" for node in (*SERVERS, AGENT))
    for volume in stack.volumes():
        if volume.endswith(stored):
            subprocess.run(["docker", "volume", "rm", volume], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
