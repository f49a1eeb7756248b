"""What the ways to a binary share: how one of them fails, and how it shows that it is getting on."""

import fcntl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["Progress", "UnavailableError", "alone", "run", "say"]

_TERMINAL_SECONDS = 1.0
_LOG_SECONDS = 15.0
_STOP_SECONDS = 2.0


class UnavailableError(RuntimeError):
    """This way leads to no binary; the message says why, in one line."""


def say(text: str) -> None:
    """Write to stderr, at once: stdout belongs to whoever asked."""
    sys.stderr.write(text)
    sys.stderr.flush()


class Progress:
    """How far a way has got: one line that renews itself on a terminal; elsewhere a line every fifteen seconds."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._begun = time.monotonic()
        self._due = self._begun + (0.0 if self._live else _LOG_SECONDS)

    def show(self, state: str, *, last: bool = False) -> None:
        """Show the state if it is time to, or if it is the last one."""
        now = time.monotonic()
        if now < self._due and not last:
            return
        self._due = now + (_TERMINAL_SECONDS if self._live else _LOG_SECONDS)
        line = f"  {now - self._begun:4.0f} s: {state}"
        say(f"\r{line}\x1b[K" + ("\n" if last else "") if self._live else f"{line}\n")


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold `lock`, after waiting for its present holder; the system frees it when a holder is killed."""
    with lock.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Another process is getting {lock.stem.capitalize()}: waiting for it.\n")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(
    command: Sequence[str],
    *,
    folder: Path,
    log: Path,
    environment: Mapping[str, str],
    silence: float,
    state: Callable[[list[str]], str],
) -> None:
    """Run a command in `folder` until it ends, with all that it writes in `log`; `state` makes progress of the lines.

    Blocks. Raises: UnavailableError, when it fails, or writes nothing for `silence` seconds; OSError.
    """
    progress = Progress()
    heard, written = time.monotonic(), 0
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        ) as process,
    ):
        try:
            while process.returncode is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=min(_TERMINAL_SECONDS, silence))
                lines = log.read_text(errors="replace").splitlines()
                progress.show(state(lines), last=process.returncode is not None)
                if log.stat().st_size != written:
                    heard, written = time.monotonic(), log.stat().st_size
                if process.returncode is None and time.monotonic() - heard >= silence:
                    raise UnavailableError(f"nothing has moved for {silence:g} s, given up; see {log}")
        except BaseException:
            _end(process)
            raise
    if process.returncode != 0:
        # Compilers say what is wrong first and what follows from it later, so the log has more than the last line.
        raise UnavailableError(f"{next(filter(None, reversed(lines)), 'failed without a word')} (see {log})")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
