"""`nox -s backup`: everything that Consul and the keeper hold, in one file, while the locked system runs."""

import argparse
import os
import sys
from pathlib import Path

from deploy.compose.stack import Stack, StackError, exit_code, overlaid


def main() -> int:
    """Writes the file; returns the exit code."""
    parser = argparse.ArgumentParser(prog="nox -s backup --", description=__doc__)
    parser.add_argument("file", type=Path, help="a new file; it will hold every token and every key")
    path: Path = parser.parse_args().file

    def work() -> None:
        save(Stack(overlaid("locked")), path)
        sys.stdout.write(f"{path} holds every token and every key: encrypt it, and keep it where you keep passwords.\n")

    return exit_code(work, FileExistsError)


def save(stack: Stack, path: Path) -> None:
    """Writes a new file that nobody else may read. Blocks. Raises: StackError, FileExistsError."""
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            stack.job("save", stdout=file)
    except StackError:
        path.unlink()
        raise


if __name__ == "__main__":
    sys.exit(main())
