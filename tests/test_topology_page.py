"""The topology page in a real browser, beside a system of real processes: what it shows is what happens."""

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from registry import ServiceRegistry
from registry.testing.agent import running_agent
from registry.testing.ports import free_ports
from tests.system import System, answers, running_system
from tests.topology import Load, one_browser, open_tab

DRAIN = 0.5


browser = pytest.fixture(scope="module")(one_browser)


@pytest.fixture(scope="module")
def system(consul_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One backend, one research-api, one front door. Who stops something starts it again."""
    with (
        running_agent(binary=consul_binary) as consul,
        running_system(consul, tmp_path_factory.mktemp("system"), 1, {"SERVICE_HEALTH_CHECK_INTERVAL": "1"}) as running,
    ):
        yield running


def start_backends(system: System, count: int = 1) -> list[str]:
    """So many more, once they are found."""
    started = [(system.start("backend", port), port) for port in free_ports(count)]
    for instance, port in started:
        system.until(
            lambda instance=instance, port=port: answers(port) and instance in system.passing("backend-api"),  # type: ignore[misc]
            f"{instance} passing",
        )
    return [instance for instance, _ in started]


def stop(system: System, *instances: str) -> None:
    """Ends them in good order."""
    processes = [system.processes.pop(instance) for instance in instances]
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait(20)


def test_a_kill_under_load_shows_within_one_and_a_half_seconds(system: System, browser: Browser) -> None:
    """kill -9: the page says that a caller has ejected it and why, then that it is gone, then shows it no more."""
    [victim] = start_backends(system)
    system.until(lambda: system.is_checked(victim), f"{victim} checked")
    # Fewer than five calls of a caller are under way at one backend: that many cut at once are "broken", not "refused".
    with Load(system.front, callers=2) as load, open_tab(browser, system.front) as tab:
        tab.says(victim, "live")
        tab.wait(
            "id => [...document.querySelectorAll('#instances tr')].some((row) => row.cells[0].textContent.includes(id)"
            " && row.cells[3]?.textContent[0] > '0')",
            victim,
        )
        process = system.processes.pop(victim)
        process.send_signal(signal.SIGKILL)
        seconds = tab.says(victim, "ejected: refused")
        sys.stderr.write(f"\nejected on the page {seconds:.2f} s after the kill\n")
        assert seconds < 1.5
        assert f"{victim}: its checks pass, says Consul" in tab.text("#disagreements")
        process.wait()
        tab.journal(victim, "ejected: refused")
        tab.says(victim, "gone: critical")
        tab.journal(victim, "left: critical")
        with ServiceRegistry("127.0.0.1", system.consul.http_port) as registry:
            registry.deregister_service(victim)
        tab.wait("id => !document.getElementById('instances').textContent.includes(id)", victim)
    assert load.failed == []


def test_scaling_is_followed(system: System, browser: Browser) -> None:
    """1 → 5 → 1: every instance that joins has a row, every one that withdraws has none, and both are told."""
    with open_tab(browser, system.front) as tab:
        tab.live()
        [first] = tab.rows("backend-api")
        more = start_backends(system, 4)
        tab.wait("document.querySelectorAll('#instances tbody[data-key=backend-api] th[scope=row]').length === 5")
        assert sorted(tab.rows("backend-api")) == sorted([first, *more])
        for instance in more:
            tab.says(instance, "live")
            tab.journal(instance, "joined")
        stop(system, *more)
        tab.wait("document.querySelectorAll('#instances tbody[data-key=backend-api] th[scope=row]').length === 1")
        for instance in more:
            tab.journal(instance, "left: withdrew")
        assert tab.rows("backend-api") == [first]


def test_a_pause_holds_the_picture_and_its_end_shows_the_newest(system: System, browser: Browser) -> None:
    """Paused by keyboard, nothing changes while others see more; afterwards the newest is there at once."""
    with open_tab(browser, system.front) as tab, open_tab(browser, system.front) as other:
        tab.live()
        tab.page.focus("#pause")
        tab.page.keyboard.press("Enter")
        assert tab.page.get_attribute("#pause", "aria-pressed") == "true"
        held, shown = tab.number, tab.text("main")
        [newcomer] = start_backends(system)
        other.says(newcomer, "live")
        assert (tab.number, tab.text("main")) == (held, shown)
        assert tab.text("#live").startswith("Paused")
        tab.page.keyboard.press("Enter")
        assert tab.number > held
        assert newcomer in tab.rows("backend-api")
        stop(system, newcomer)


def test_without_consul_the_map_stays(system: System, browser: Browser) -> None:
    """A banner says that Consul is away and how old its list is; instances and calls go on being shown."""
    with open_tab(browser, system.front) as tab:
        tab.live()
        before = {service: tab.rows(service) for service in ("backend-api", "research-api", "orchestrator-api")}
        system.consul.stop()
        try:
            tab.wait("!document.getElementById('outage').hidden")
            assert "Consul can't be asked: this is its list of" in tab.text("#outage")
            with Load(system.front, most=5) as load:
                pass
            number = tab.number
            tab.wait("number => Number(document.documentElement.dataset.number) > number + 1", number)
            assert {service: tab.rows(service) for service in before} == before
            for [instance] in before.values():
                tab.says(instance, "live")
            assert tab.barriers() == []
            with open_tab(browser, system.front) as another:
                assert {service: another.rows(service) for service in before} == before
        finally:
            system.consul.start()
        tab.wait("document.getElementById('outage').hidden")
        assert load.failed == []


def test_two_tabs_agree(system: System, browser: Browser) -> None:
    """Under load, the same number is the same page, word for word."""
    read = "[document.documentElement.dataset.number, document.querySelector('main').innerText]"
    with Load(system.front), open_tab(browser, system.front) as one, open_tab(browser, system.front) as two:
        one.live()
        two.live()
        agreed, deadline = set[str](), time.monotonic() + 60
        while len(agreed) < 3:
            assert time.monotonic() < deadline
            (first, left), (second, right) = one.page.evaluate(read), two.page.evaluate(read)
            if first == second:
                assert left == right
                agreed.add(first)


def test_a_stop_with_the_page_open_is_no_longer_and_a_restart_no_duplicate(system: System, browser: Browser) -> None:
    """SIGTERM ends the streams; the page waits for the next process, and shows its whole picture and no other."""
    [front] = system.passing("orchestrator-api")
    with open_tab(browser, system.front) as tab, open_tab(browser, system.front) as other:
        tab.live()
        other.live()
        epoch = tab.page.evaluate("document.documentElement.dataset.epoch")
        begun = time.monotonic()
        with system.without(front, signal.SIGTERM):
            seconds = time.monotonic() - begun
            tab.wait("document.getElementById('live').textContent.startsWith('Not connected')")
        sys.stderr.write(f"\nended {seconds:.2f} s after SIGTERM, with a drain of {DRAIN} s\n")
        assert seconds < DRAIN + 1
        tab.wait("epoch => document.documentElement.dataset.epoch !== epoch", epoch)
        tab.live()
        assert tab.rows("orchestrator-api") == [front]
        keys = tab.page.evaluate(
            "[...document.querySelectorAll('main [data-key]')].map((each) => each.parentNode.id + each.dataset.key)"
        )
        assert len(keys) == len(set(keys))
        for refused in (tab, other):
            refused.complaints.clear()


def test_what_was_counted_is_what_is_shown(system: System, browser: Browser) -> None:
    """Calls and picks on the page, as the front door sees them, grow by exactly what a caller sent and who answered."""
    [front] = system.passing("orchestrator-api")
    more = start_backends(system)
    backends = "#instances tbody[data-key=backend-api]"
    with open_tab(browser, f"{system.front}/?caller={front}") as tab:
        with Load(system.front, most=5):
            pass
        # What came before is on the page: two pictures in a row say the same.
        counted = [{}, {front: -1}, {front: -2}]
        while counted[-1] != counted[-3]:
            tab.live()
            counted.append(tab.numbers("#calls", 4))
        picks, calls = tab.numbers(backends, 3), sum(counted[-1].values())
        with Load(system.front, most=40, pause=0) as load:
            pass
        deadline = time.monotonic() + 30
        while sum(tab.numbers("#calls", 4).values()) != calls + 40:
            assert time.monotonic() < deadline, tab.numbers("#calls", 4)
            tab.live()
        shown = tab.numbers(backends, 3)
    assert {name: shown[name] - picks.get(name, 0) for name in load.answered} == load.answered
    assert (sum(load.answered.values()), load.failed) == (40, [])
    stop(system, *more)


def test_what_somebody_registers_stays_text(system: System, browser: Browser) -> None:
    """Markup in tags is text in the snapshot and in what the stream brings; nothing of it runs, and no style is set."""
    tags = [
        "<script>document.title = 'taken'</script>",
        '"><img src=x onerror="document.title=\'taken\'">',
        "{{ 7 * 7 }}",
    ]
    port = int(system.front.rsplit(":", 1)[1])
    with ServiceRegistry("127.0.0.1", system.consul.http_port) as registry:
        instance = registry.register_service("tagged", "127.0.0.1", port, tags=tags, health_check_interval="1s")
        try:
            with open_tab(browser, system.front) as tab, open_tab(browser, system.front) as later:
                for each in (tab, later):
                    each.says(instance, "live")
                    each.page.reload()
                    each.says(instance, "live")
                    assert all(tag in each.text("#instances tbody[data-key=tagged]") for tag in tags)
                    each.live()
                    assert all(tag in each.text("#instances tbody[data-key=tagged]") for tag in tags)
                    assert each.page.title() == "Topology"
                    assert each.page.locator("script").count() == 1
                    assert each.page.locator("img").count() == 0
        finally:
            registry.deregister_service(instance)
