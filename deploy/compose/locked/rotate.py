"""`nox -s rotate`: new tokens for the services, a new gossip key or a new authority, while the locked system runs."""

import argparse
import sys

from deploy.compose.stack import Stack, exit_code, overlaid


def main() -> int:
    """Rotates; returns the exit code."""
    parser = argparse.ArgumentParser(prog="nox -s rotate --", description=__doc__)
    parser.add_argument("what", choices=["tokens", "gossip", "ca"])
    what = parser.parse_args().what

    def work() -> None:
        Stack(overlaid("locked")).job(what)
        sys.stdout.write("Done: the new one is in use, and the old one is worth nothing.\n")

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
