"""Whoever reads the topology page: by keyboard, by screen reader, on a phone, without scripts, a thousand instances."""

import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser

from orchestrator.page import routes
from orchestrator.page.compose import compose
from tests.pictures import Album, instance, picture
from tests.topology import one_browser, open_tab

PHONE = {"viewport": {"width": 360, "height": 740}}


browser = pytest.fixture(scope="module")(one_browser)


@contextmanager
def served(album: Album) -> Iterator[str]:
    """The page on these pictures; its address."""
    app = FastAPI()
    app.state.hub = album
    app.include_router(routes.router)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        album.is_full = server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    """A small system."""
    with served(Album(6)) as address:
        yield address


@pytest.mark.parametrize("look", [{}, PHONE, {"color_scheme": "dark"}, {"forced_colors": "active"}], ids=str)
def test_nothing_keeps_anybody_out(page: str, browser: Browser, look: dict[str, object]) -> None:
    """axe-core finds nothing: live and paused, on a phone, in the dark, in colours that the reader has chosen."""
    with open_tab(browser, page, **look) as tab:
        tab.live()
        assert tab.barriers() == []
        tab.page.click("#pause")
        tab.page.click("summary")
        assert tab.barriers() == []


def test_an_outage_keeps_nobody_out(browser: Browser) -> None:
    """The banner is an alert, and readable."""
    with served(Album(3, outage="refused")) as page, open_tab(browser, page) as tab:
        tab.live()
        assert tab.page.get_by_role("alert").inner_text().startswith("Consul can't be asked: this is its list of 12 s")
        assert tab.barriers() == []


def test_a_phone_shows_all_and_scrolls_only_within_tables(page: str, browser: Browser) -> None:
    """At 360 px the page is as wide as the screen; what is wider scrolls in a region of its own."""
    with open_tab(browser, page, **PHONE) as tab:
        tab.live()
        assert tab.page.evaluate("document.documentElement.scrollWidth") == 360
        regions = tab.page.locator(".scroll")
        assert regions.count() == 4
        assert all(each.get_attribute("tabindex") == "0" for each in regions.all())
        for each in ("#caller", "#pause"):
            box = tab.page.locator(each).bounding_box()
            assert box
            assert box["height"] >= 24
            assert box["x"] + box["width"] <= 360


def test_everything_is_reached_by_keyboard(page: str, browser: Browser) -> None:
    """Tab goes through all that can be used, as it is read, with the focus to be seen; keys do the rest."""
    with open_tab(browser, page) as tab:
        tab.live()
        reached = []
        for _ in range(7):
            tab.page.keyboard.press("Tab")
            reached.append(
                tab.page.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-labelledby')"
                                  " || document.activeElement.localName")
            )  # fmt: skip
            assert tab.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        headings = [f"{name}-heading" for name in ("instances", "calls", "drawing", "journal")]
        assert reached == ["caller", "pause", *headings, "summary"]
        tab.page.keyboard.press("Enter")
        assert tab.page.get_by_text("p2c_cost").is_visible()
        tab.page.focus("#caller")
        tab.page.keyboard.press("ArrowDown")
        caller = instance("research-api", 0).id
        tab.wait("caller => document.querySelectorAll('#calls tr').length === 1", caller)
        assert tab.page.url.endswith(f"/?caller={caller}")


def test_a_screen_reader_is_told_where_it_is(page: str, browser: Browser) -> None:
    """Tables have headings for columns, rows and groups; the state is told in words; the journal is a log."""
    with open_tab(browser, page) as tab:
        tab.live()
        backends = tab.page.get_by_role("region", name="Instances").get_by_role("row")
        assert backends.nth(0).get_by_role("columnheader").count() == 8
        assert backends.nth(1).get_by_role("rowheader").count() == 1
        first = instance("backend-api", 0).id
        row = tab.page.get_by_role("row").filter(has=tab.page.get_by_role("rowheader", name=first)).first
        assert "ejected: refused" in row.inner_text()
        assert tab.page.get_by_role("log", name="Journal").get_by_role("listitem").count() >= 1
        assert tab.page.get_by_role("img", name="Callers, services and instances").count() == 1
        assert tab.page.get_by_role("button", name="Pause").get_attribute("aria-pressed") == "false"


def test_who_wants_no_motion_gets_none(page: str, browser: Browser) -> None:
    """With prefers-reduced-motion nothing moves; without, lines fade."""
    read = "getComputedStyle(document.querySelector('.link')).transitionDuration"
    for wish, moves in (("reduce", False), ("no-preference", True)):
        with open_tab(browser, page, reduced_motion=wish) as tab:
            assert (tab.page.evaluate(read) != "0s") == moves


def test_without_scripts_it_is_a_snapshot(page: str, browser: Browser) -> None:
    """Everything is there, it says of when, and the point of view is chosen with a button."""
    with open_tab(browser, page, java_script_enabled=False) as tab:
        assert len(tab.rows("backend-api")) == 7
        assert tab.text("#status").startswith("Snapshot of ")
        assert tab.page.locator("#calls tr").count() == 3
        assert not tab.page.locator("#pause").is_visible()
        caller = instance("research-api", 1).id
        tab.page.select_option("#caller", caller)
        tab.page.click("#look")
        assert tab.page.url.endswith(f"/?caller={caller}")
        assert tab.page.locator("#calls tr").count() == 1
        assert tab.page.locator("#caller").input_value() == caller


def test_a_hidden_tab_asks_for_nothing(page: str, browser: Browser) -> None:
    """Its stream is closed while nobody sees it, and begins anew with the whole page once somebody does."""
    hide = "(hidden) => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });"
    hide += " document.dispatchEvent(new Event('visibilitychange')); }"
    with open_tab(browser, page) as tab:
        tab.live()
        tab.page.evaluate(hide, True)
        assert tab.text("#live").startswith("Not connected")
        number = tab.number
        tab.page.wait_for_timeout(1200)  # two pictures
        assert tab.number == number
        tab.page.evaluate(hide, False)
        tab.live()


def test_zones_appear_with_the_first_instance_that_has_one(browser: Browser) -> None:
    """The open page gets a column with its heading and loses it again; nothing keeps anybody out, and labels fit."""
    album = Album(6, period=0.2)
    with served(album) as page, open_tab(browser, page) as tab:
        tab.live()
        rows = tab.page.get_by_role("region", name="Instances").get_by_role("row")
        for zones, count in ((("eu-1a", "eu-1b"), 9), ((), 8), (("eu-1a",), 9)):
            album.zones = zones
            tab.wait("count => document.getElementById('columns').children.length === count", count)
            assert rows.nth(0).get_by_role("columnheader").count() == count
            assert tab.page.locator("#instances tr.group th").first.get_attribute("colspan") == str(count)
            assert rows.nth(2).locator("th, td").count() == count
        assert tab.page.get_by_role("columnheader", name="Zone").count() == 1
        assert rows.nth(2).get_by_role("cell", name="eu-1a", exact=True).count() == 1
        assert tab.barriers() == []


@pytest.mark.parametrize("zones", [(), ("eu-1a", "eu-1b")], ids=str)
def test_the_template_and_the_script_draw_the_same(browser: Browser, zones: Sequence[str]) -> None:
    """What the template writes, and what the script makes where nothing was before, differ in nothing."""
    read = "() => document.querySelector('main').innerHTML.replace(/\\s+/g, ' ').replaceAll('> <', '><')"
    for point in ("", instance("research-api", 0).id):
        with served(Album(4, period=0.2, zones=zones)) as page, open_tab(browser, f"{page}/?caller={point}") as tab:
            tab.live()
            tab.page.click("#pause")
            number, made = tab.number, tab.page.evaluate(read)
            sheet = compose(picture(4, number, zones=zones), point)
            tab.page.set_content(routes.render(sheet))
            assert tab.page.evaluate(read) == made


def test_a_thousand_instances_update_in_a_tenth_of_a_second(browser: Browser) -> None:
    """Every figure of every row changes twice a second; the middle one takes less."""
    with served(Album(1000)) as page, open_tab(browser, page) as tab:
        tab.live()
        tab.page.evaluate(
            "window.tasks = []; new PerformanceObserver((list) =>"
            " tasks.push(...list.getEntries().map((task) => task.duration))).observe({ type: 'longtask' })"
        )
        tab.page.evaluate("performance.clearMeasures('sheet')")
        tab.wait("performance.getEntriesByName('sheet').length >= 15")
        assert len(tab.rows("backend-api")) == 1001
        updates = tab.page.evaluate("performance.getEntriesByName('sheet').map((update) => update.duration)")
        tasks = tab.page.evaluate("window.tasks")
        sys.stderr.write(
            f"updates {sorted(map(round, updates))} ms, with style and layout {sorted(map(round, tasks))} ms\n"
        )
        assert median(updates) < 100
