"""`nox -s down`: removes every container and network that `nox -s up` made; `-- --volumes` what they stored, too."""

import argparse
import sys

from deploy.compose.stack import Stack, exit_code, overlaid


def main() -> int:
    """Removes the system; returns the exit code."""
    parser = argparse.ArgumentParser(prog="nox -s down --", description=__doc__)
    parser.add_argument(
        "--volumes",
        action="store_true",
        help="remove the cards, the data of Consul and Prometheus, and all secrets as well",
    )
    volumes = ["--volumes"] if parser.parse_args().volumes else []
    return exit_code(lambda: Stack(overlaid("observe", "locked")).compose("down", "--remove-orphans", *volumes))


if __name__ == "__main__":
    sys.exit(main())
