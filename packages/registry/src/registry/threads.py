"""Blocking work beside the event loop that must not hold up the end of a process, however long it takes."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

__all__ = ["in_daemon_thread"]


async def in_daemon_thread(work: Callable[[], object], name: str) -> None:
    """Returns when the work is done. Cancelling it only ends the waiting."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        work()
        with suppress(RuntimeError):  # Too late: the loop is closed.
            loop.call_soon_threadsafe(done.set)

    # Not by a worker of the loop's: that one would be waited for.
    threading.Thread(target=run, name=name, daemon=True).start()
    await done.wait()
