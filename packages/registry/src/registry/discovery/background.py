"""The one event loop that works for all threads of a process that has none of its own."""

import asyncio
import os
import selectors
import threading

from registry.errors import RegistryError

__all__ = ["BACKGROUND"]


class Background:
    """An event loop in a daemon thread, started when it is first asked for. Safe to share by threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._selector: selectors.DefaultSelector
        self._thread: threading.Thread
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def loop(self) -> asyncio.AbstractEventLoop:
        """Runs; starts it when it must. Raises: RegistryError on the loop's own thread, which must not wait for it."""
        with self._lock:
            if self._loop is None:
                self._selector = selectors.DefaultSelector()
                loop = asyncio.SelectorEventLoop(self._selector)
                self._thread = threading.Thread(target=loop.run_forever, name="registry", daemon=True)
                self._thread.start()
                self._loop = loop
        if threading.current_thread() is self._thread:
            raise RegistryError(
                "a policy or resolver can't call through SyncDiscoveryTransport: it would wait for itself"
            )
        return self._loop

    def _forget(self) -> None:
        """In a forked child: nobody runs the loop, and its sockets are the parent's too."""
        self._lock = threading.Lock()
        if self._loop is not None:
            # The child must neither keep the parent's connections open nor, when it disposes of their objects, take
            # them out of the epoll that it shares with the parent. Closed, the descriptors could become another's.
            nowhere = os.open(os.devnull, os.O_RDWR)
            for descriptor in (self._selector.fileno(), *(key.fd for key in self._selector.get_map().values())):
                os.dup2(nowhere, descriptor, inheritable=False)
            os.close(nowhere)
            self._loop.set_exception_handler(lambda *_: None)
            self._loop = None


BACKGROUND = Background()
"""The process's own; a forked child gets another one."""
