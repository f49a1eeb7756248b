"""`nox -s newcomer`: the tutorial, typed as it stands by somebody who has nothing yet, with a clock beside it.

Nothing but the page says what is typed. The caches of pip and Go are empty, and a Consul is used only from PATH: where
there is none, it is built. Standard library only, like the newcomer.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.pages import Shell, blocks, check_output

PAGE = Path(__file__).parents[1] / "docs/tutorial.md"
LIMIT = 600.0
"""Seconds from the first command to the end."""


def main() -> int:
    """Returns 0 when everything was as the page says, in time."""
    with tempfile.TemporaryDirectory(prefix="newcomer-") as name:
        home = Path(name)
        _copy_repository(home / "registry")
        warm = {"CONSUL_BIN", "VIRTUAL_ENV", "PIP_NO_INDEX", "GOPATH"}
        environment = {
            variable: value
            for variable, value in os.environ.items()
            if variable not in warm and not variable.startswith(("CONSUL_", "SERVICE_", "NOX"))
        }
        caches = {"XDG_CACHE_HOME": home / "cache", "GOMODCACHE": home / "cache/modules", "GOCACHE": home / "cache/go"}
        shell = Shell(home, environment | {variable: str(folder) for variable, folder in caches.items()})
        begun = time.monotonic()
        try:
            _follow(shell, begun)
            seconds = time.monotonic() - begun
        finally:
            shell.close()
            # Go's modules are read-only.
            subprocess.run(["chmod", "-R", "u+w", name], check=False)
    _say(f"\nFollowed to the end in {seconds:.0f} s.\n")
    return 0 if seconds < LIMIT else 1


def _copy_repository(folder: Path) -> None:
    """What git knows of it, changes included."""
    root = PAGE.parents[1]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((root / name).read_bytes())


def _follow(shell: Shell, begun: float) -> None:
    printed = ""
    for block in blocks(PAGE.read_text()):
        match block.language, block.options.partition("=")[::2]:
            case _, ("file", name):
                (shell.directory / name).write_text(block.code)
            case "bash", ("", ""):
                _say(f"{time.monotonic() - begun:4.0f} s\n{block.code}")
                printed = shell.type(block.code, LIMIT)
                _say(f"{printed}\n")
            case "text", ("", ""):
                check_output(block.code, printed)
            case language, _:
                raise AssertionError(f"line {block.line}: nobody knows what to do with {language} {block.options}")


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
