"""`nox -s down`: removes every container and network that `nox -s up` made; `-- --volumes` what they stored, too."""

import argparse
import sys

from deploy.compose.stack import Stack, StackError, check_engine, overlaid


def main() -> int:
    """Removes the system; returns the exit code."""
    parser = argparse.ArgumentParser(prog="nox -s down --", description=__doc__)
    parser.add_argument(
        "--volumes",
        action="store_true",
        help="remove the cards, the data of Consul and Prometheus, and all secrets as well",
    )
    options = parser.parse_args()
    try:
        check_engine()
        Stack(overlaid("observe", "locked")).compose(
            "down", "--remove-orphans", *(["--volumes"] if options.volumes else [])
        )
    except StackError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
