"""`nox -s rotate`: new tokens for the services, a new gossip key or a new authority, while the locked system runs."""

import argparse
import sys

from deploy.compose.stack import Stack, StackError, check_engine, overlaid


def main() -> int:
    """Rotates; returns the exit code."""
    parser = argparse.ArgumentParser(prog="nox -s rotate --", description=__doc__)
    parser.add_argument("what", choices=["tokens", "gossip", "ca"])
    what = parser.parse_args().what
    try:
        check_engine()
        Stack(overlaid("locked")).job(what)
    except StackError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write("Done: the new one is in use, and the old one is worth nothing.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
