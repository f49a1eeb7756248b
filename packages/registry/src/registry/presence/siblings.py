"""The processes of this host that serve the same instance on one port, such as a server's workers."""

import asyncio
import fcntl
import hashlib
import logging
import os
import tempfile
from pathlib import Path

__all__ = ["PAUSE", "Siblings"]

logger = logging.getLogger("registry")

PAUSE = 0.05
"""Seconds between two looks at what siblings do."""


class Siblings:
    """Tells a process that leaves whether it is the last one of its instance. Fails never.

    Each shares a lock on one file below the temporary directory, and the last to leave gets it for itself. The system
    takes the lock from a process that is killed. (Asking the port instead would not tell: the process that asks may
    answer itself, and some servers keep the port open while nobody serves.)
    """

    def __init__(self) -> None:
        self._file: int | None = None
        self._path = Path()
        self._is_last = False

    @property
    def taken_out(self) -> bool:
        """Whether another one was the last, and has taken the instance out of Consul already."""
        return self._file is not None and os.fstat(self._file).st_nlink == 0

    async def join(self, instance_id: str) -> None:
        """Counts this process among those that serve this instance; waits while the last one is just leaving."""
        self.close()
        try:
            name = hashlib.sha256(f"{os.getuid()} {instance_id}".encode()).hexdigest()[:32]
            self._path = Path(tempfile.gettempdir(), f"registry-{name}.lock")
            while True:
                if self._try_to_join():
                    return
                await asyncio.sleep(PAUSE)
        except OSError as error:
            self.close()
            message = "no lock below the temporary directory: each worker that stops will deregister the instance"
            logger.info(message, extra={"instance": instance_id, "error": str(error)})

    def _try_to_join(self) -> bool:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        found = os.fstat(self._file)
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            # Whoever else can open it can hold the lock, and so keep an instance registered.
            raise PermissionError(f"{self._path} is not this user's alone")
        try:
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if not self.taken_out:
                return True
        except BlockingIOError:
            pass
        self.close()
        return False

    def leave(self) -> bool:
        """Whether no other process serves this instance on. Then none can join before ``close``."""
        if self._file is None:
            return True
        try:
            # In this order: of two that leave at once, one at least sees nobody else.
            fcntl.flock(self._file, fcntl.LOCK_UN)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self._is_last = not self.taken_out
        return True

    def close(self) -> None:
        """Leaves, if that was not done, and lets others join."""
        if self._file is None:
            return
        if self._is_last:
            self._path.unlink(missing_ok=True)
        os.close(self._file)
        self._file, self._is_last = None, False
