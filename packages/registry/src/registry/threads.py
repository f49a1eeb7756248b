"""Blocking work beside the event loop that must not hold up the end of a process, however long it takes."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

__all__ = ["in_daemon_thread"]

T = TypeVar("T")


async def in_daemon_thread(work: Callable[[], T], name: str) -> T:
    """What the work returns or raises, once it is done. Cancelling it only ends the waiting."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except Exception as error:
            tell(partial(outcome.set_exception, error))
        else:
            tell(partial(outcome.set_result, result))

    def tell(settle: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # Too late: the loop is closed.
            loop.call_soon_threadsafe(lambda: None if outcome.done() else settle())

    # Not by a worker of the loop's: that one would be waited for.
    threading.Thread(target=run, name=name, daemon=True).start()
    return await outcome
