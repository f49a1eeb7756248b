"""`nox -s upgrade`: gives the servers of Consul the image that CONSUL_IMAGE names, one after another, under load."""

import sys

from deploy.compose.images import choose_images
from deploy.compose.locked.roll import roll
from deploy.compose.stack import Stack, StackError, check_engine, overlaid


def main() -> int:
    """Upgrades; returns the exit code."""
    try:
        check_engine()
        roll(Stack(choose_images(print) | overlaid("locked")), print)
    except StackError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
