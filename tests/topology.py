"""Looking at the topology page as people do, in a real browser, while a system runs and is called."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from tests.e2e.browser import find_browser

WAIT_MS = 60_000
"""What is waited for is told by events; only what has a promise of its own is timed."""


def one_browser() -> Iterator[Browser]:
    """For a fixture: one for all tests of a module."""
    with running_browser() as running:
        yield running


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Debian's Chromium, or the one that is installed. Raises: AssertionError, if there is none."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Tab:
    """One look at the page."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    """What the browser logged: errors, and what the content security policy refused."""

    def wait(self, condition: str, argument: object = None) -> float:
        """Until a JavaScript condition holds; returns the seconds that this took."""
        begun = time.monotonic()
        # As a function: an expression would be evaluated from its text, which the page's policy refuses.
        condition = f"() => {condition}" if argument is None else condition
        self.page.wait_for_function(condition, arg=argument, polling=20, timeout=WAIT_MS)
        return time.monotonic() - begun

    def says(self, instance: str, words: str) -> float:
        """Until the row of an instance has these words as its state."""
        condition = "([id, words]) => [...document.querySelectorAll('#instances tr')].some((row) =>"
        condition += " row.querySelector('th span')?.textContent === id"
        condition += " && row.querySelector('td')?.firstElementChild.textContent === words)"
        return self.wait(condition, [instance, words])

    def live(self) -> None:
        """Until the stream has brought something."""
        self.wait("document.getElementById('live').textContent.startsWith('Live')")
        number = self.number
        self.wait("number => Number(document.documentElement.dataset.number) !== number", number)

    def journal(self, *words: str) -> float:
        """Until a line of the journal has all of them."""
        condition = "words => [...document.querySelectorAll('#journal li')].some((line) =>"
        condition += " words.every((word) => line.textContent.includes(word)))"
        return self.wait(condition, list(words))

    def rows(self, service: str) -> list[str]:
        """The instances that are shown of a service."""
        shown = self.page.locator(f'#instances tbody[data-key="{service}"] th[scope=row] > span')
        return shown.all_text_contents()

    def numbers(self, table: str, column: int) -> dict[str, int]:
        """A column of a table's body, by the heading of each row."""
        read = "([table, column]) => [...document.querySelectorAll(table + ' tr:not(.group)')].map((row) =>"
        read += " [row.querySelector('th span').textContent, row.cells[column].firstElementChild.textContent])"
        return {name: int(text.replace(",", "")) for name, text in self.page.evaluate(read, [table, column])}

    def text(self, selector: str) -> str:
        """Of one element."""
        return self.page.locator(selector).inner_text()

    @property
    def number(self) -> int:
        """Of the picture that is shown."""
        return int(self.page.evaluate("Number(document.documentElement.dataset.number)"))

    def barriers(self) -> list[str]:
        """What axe-core finds that keeps people out."""
        return [f"{each['id']}: {each['nodes'][0]['html']}" for each in Axe().run(self.page).response["violations"]]


@contextmanager
def open_tab(browser: Browser, url: str, **options: object) -> Iterator[Tab]:
    """The page in a tab of its own; nothing may be logged that was not taken out of ``complaints``."""
    context = browser.new_context(**options)  # type: ignore[arg-type]
    try:
        tab = Tab(context.new_page())
        tab.page.on("console", lambda message: tab.complaints.append(message.text) if message.type == "error" else None)
        tab.page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.page.goto(url)
        yield tab
        assert tab.complaints == []
    finally:
        context.close()


class Load:
    """Publishes cards without pause, within ``with``; ``answered`` counts by instance.

    Several callers at once keep all instances busy. ``most``: so many cards, by one caller; else until the end.
    """

    def __init__(self, front: str, most: int | None = None, pause: float = 0.05, callers: int = 1) -> None:
        self._front = front
        self._most = most
        self._pause = pause
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(callers)]
        self.answered = Counter[str]()
        self.failed: list[str] = []

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._most is None:
            self._ends.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        card = {"title": "A card", "content": "Services find each other", "tags": ["registry"]}
        with httpx.Client(trust_env=False, timeout=20) as client:
            while not self._ends.is_set() and sum(self.answered.values()) + len(self.failed) != self._most:
                answer = client.post(f"{self._front}/api/publish", json=card)
                if answer.status_code == 201:
                    self.answered[answer.headers["X-Upstream-Instance"]] += 1
                else:
                    self.failed.append(answer.text)
                self._ends.wait(self._pause)
