"""`nox -s upgrade`: gives the servers of Consul the image that CONSUL_IMAGE names, one after another, under load."""

import sys

from deploy.compose.images import choose_images
from deploy.compose.locked.roll import roll
from deploy.compose.stack import Stack, exit_code, overlaid
from registry.testing.agent import ConsulNotFoundError


def main() -> int:
    """Upgrades; returns the exit code."""
    return exit_code(lambda: roll(Stack(choose_images(print) | overlaid("locked")), print), ConsulNotFoundError)


if __name__ == "__main__":
    sys.exit(main())
