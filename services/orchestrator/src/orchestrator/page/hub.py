"""One look for all who look: it runs while somebody does, and all viewers see the same numbered picture."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

from orchestrator.page.callers import Callers
from orchestrator.page.catalog import Catalog
from orchestrator.page.compose import compose
from orchestrator.page.disagreements import Disagreements
from orchestrator.page.journal import Journal
from orchestrator.page.sheet import Sheet
from orchestrator.page.sight import Picture, uses, whole
from orchestrator.registry import ConsulSettings
from registry.discovery.peers import Peers

__all__ = ["Hub"]

_log = logging.getLogger("orchestrator")

PERIOD = 1.0
"""Seconds between two rounds of questions to all instances."""
PATIENCE = 0.3
"""Seconds that a picture waits for their answers; who is later is in the next one."""
LINGER = 5.0
"""Seconds that it goes on when nobody looks any more: a page is loaded before its stream begins."""
FIRST_PICTURE = 3.0
MAX_VIEWERS = 100


class Hub:
    """Belongs to one event loop; ``aclose`` ends it."""

    def __init__(
        self, settings: ConsulSettings, leaving: Callable[[], bool], peers: Callable[[], Peers | None] = lambda: None
    ) -> None:
        """``leaving``: whether this process was told to stop; then nobody may look any more.

        ``peers``: by which instances of the mesh are asked; None: this process is not of the mesh.
        """
        self._settings = settings
        self._leaving = leaving
        self._peers = peers
        self._task: asyncio.Task[None] | None = None
        self._picture: Picture | None = None
        self._published = asyncio.Event()
        """Replaced by a new one with each picture."""
        self._changed = asyncio.Event()
        self._viewers = 0
        self._left_at = 0.0
        self._sheets: dict[str, tuple[Sheet, str]] = {}

    @property
    def is_full(self) -> bool:
        """Whether no further viewer is let in."""
        return self._viewers >= MAX_VIEWERS or self._leaving()

    async def sheet(self, caller: str) -> Sheet | None:
        """The page as it stands; waits for the first picture, about 3 s at most. None: this process is leaving."""
        async with aclosing(self._follow(caller)) as sheets:
            async for sheet, _ in sheets:
                return sheet
        return None

    async def stream(self, caller: str) -> AsyncGenerator[str]:
        """Every new sheet as JSON, beginning with the present one; ends when this process is told to stop."""
        async with aclosing(self._follow(caller)) as sheets:
            async for _, text in sheets:
                yield text

    async def aclose(self) -> None:
        """Ends the look, and with it all streams."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _follow(self, caller: str) -> AsyncGenerator[tuple[Sheet, str]]:
        self._viewers += 1
        try:
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._look(), name="page: the look")
            number = 0
            while not self._task.done():
                published = self._published
                if self._picture is not None and self._picture.number != number:
                    number = self._picture.number
                    yield self._composed(self._picture, caller)
                else:
                    await published.wait()
        finally:
            self._viewers -= 1
            self._left_at = time.monotonic()

    def _composed(self, picture: Picture, caller: str) -> tuple[Sheet, str]:
        """Made once for all who share a point of view."""
        if caller not in self._sheets:
            sheet = compose(picture, caller)
            self._sheets[caller] = sheet, sheet.model_dump_json()
        return self._sheets[caller]

    async def _look(self) -> None:
        epoch, number = secrets.token_hex(8), 0
        journal, disagreements = Journal(), Disagreements()
        try:
            async with (
                Catalog(self._settings, self._changed.set) as catalog,
                Callers(self._changed.set, self._peers()) as callers,
            ):
                with suppress(TimeoutError):
                    async with asyncio.timeout(FIRST_PICTURE - PATIENCE):
                        await catalog.answered.wait()
                due = 0.0
                while not self._leaving() and (self._viewers or time.monotonic() - self._left_at < LINGER):
                    self._changed.clear()
                    callers.follow(each for listing in catalog.outlook().listings for each in listing.passing)
                    if time.monotonic() >= due:
                        due = time.monotonic() + PERIOD
                        await callers.ask(PATIENCE)
                    outlook = catalog.outlook()
                    now, known = time.monotonic(), callers.all()
                    journal.heard(news for caller in known for news in caller.take_news())
                    journal.compared(outlook.listings, time.time())
                    told = tuple(caller.freeze(now) for caller in known)
                    differences = disagreements.between(whole(outlook, told), uses(told), now)
                    number += 1
                    self._publish(Picture(epoch, number, time.time(), outlook, told, differences, tuple(journal)))
                    await self._until_due(due)
        except Exception:
            _log.exception("the look at the system failed: the next viewer begins it anew")
        finally:
            self._publish(None)

    def _publish(self, picture: Picture | None) -> None:
        self._picture, self._sheets = picture, {}
        published, self._published = self._published, asyncio.Event()
        published.set()

    async def _until_due(self, due: float) -> None:
        """Until the next round, or news in between."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, due - time.monotonic())):
                await self._changed.wait()
                await asyncio.sleep(0.05)  # what belongs together comes together
