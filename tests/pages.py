"""A page of the documentation as its reader meets it: fenced blocks, a terminal to type them into."""

import os
import re
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Timer

__all__ = ["Block", "Shell", "blocks", "check_output"]

_FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block; ``line`` is where its code begins, counted from 0."""

    language: str
    options: str
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [
        Block(found[1], found[2].strip(), found[3], text.count("\n", 0, found.start(3)))
        for found in _FENCE.finditer(text)
    ]


def check_output(expected: str, printed: str) -> None:
    """Raises: AssertionError, unless this was printed; ``…`` in a page stands for anything within its line."""
    pattern = re.escape(expected.strip("\n")).replace("…", ".*")
    assert re.fullmatch(pattern, printed.strip("\n")), f"the page says\n{expected}\nand this was printed:\n{printed}"


class Shell:
    """A reader's terminal: a bash that keeps its directory, its variables and its background jobs between blocks."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  # closed in close
        self._bash = subprocess.Popen(
            ["bash", "--norc", "-e"],
            cwd=directory,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )

    def type(self, code: str, seconds: float = 60.0) -> str:
        """Types it, waits until it is done, and returns what it printed on stdout.

        Raises: AssertionError with what it said on stderr, when a command fails or ``seconds`` have passed.
        """
        assert self._bash.stdin
        assert self._bash.stdout
        mark = uuid.uuid4().hex
        self._bash.stdin.write(f"{code}\necho {mark}\n")
        self._bash.stdin.flush()
        watchdog = Timer(seconds, self._kill)
        watchdog.start()
        printed = ""
        try:
            while not printed.endswith(f"{mark}\n"):
                line = self._bash.stdout.readline()
                assert line, (
                    f"this failed, or took longer than {seconds:.0f} s:\n{code}\n{printed}\n{self._complaints()}"
                )
                printed += line
        finally:
            watchdog.cancel()
        return printed.removesuffix(f"{mark}\n")

    @property
    def directory(self) -> Path:
        """Where the reader is now."""
        return Path(self.type("pwd").strip())

    def close(self) -> None:
        """Ends it, and every job that it left."""
        self._kill()
        self._bash.communicate()
        self._errors.close()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._bash.pid, signal.SIGKILL)

    def _complaints(self) -> str:
        self._errors.seek(0)
        return self._errors.read()
