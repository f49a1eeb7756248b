"""What every container may and may not do, what it gives away, and what people see of it all in Consul's UI."""

import json
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.e2e.browser import find_browser
from tests.e2e.conftest import PUBLISHED
from tests.e2e.report import Row
from tests.e2e.system import BACKEND, BACKENDS, PASSWORD, System, run_in

_GIVEAWAYS = ("token", "secret", "passw", "api_key")


def test_nobody_is_root_or_can_write(system: System) -> None:
    """No process of any container runs as root, has a capability, or can write to its root filesystem."""
    assert len(system.containers()) >= BACKENDS + 6
    for container in system.containers():
        attrs = container.attrs
        assert attrs["HostConfig"]["ReadonlyRootfs"], container.name
        assert attrs["HostConfig"]["CapDrop"] == ["ALL"], container.name
        assert not attrs["HostConfig"]["CapAdd"], container.name
        assert not attrs["HostConfig"]["Privileged"], container.name
        titles, processes = (container.top(ps_args="-eo uid,pid,cmd")[key] for key in ("Titles", "Processes"))
        assert titles[0] == "UID"
        assert processes, container.name
        assert [process for process in processes if process[0] == "0"] == [], container.name
        status = run_in(container, "cat", "/proc/1/status")
        assert "CapEff:\t0000000000000000" in status, container.name
        code, _ = container.exec_run(["sh", "-c", "echo x > /written"])
        assert code != 0, container.name


def test_the_service_is_not_the_first_process(system: System) -> None:
    """An init reaps and passes signals on; SIGTERM reaches the service, which drains."""
    for replica in system.replicas():
        first = run_in(replica.container, "cat", "/proc/1/comm").strip()
        assert first not in {"uvicorn", "python"}, replica


def test_no_secret_is_given_away(system: System) -> None:
    """No variable or log of a container is or holds a secret; nor is the password in what `docker inspect` shows of a
    container or an image, or in an image's history. Where secrets are files, a variable says which."""
    images = set()
    for container in system.containers():
        variables = dict(line.split("=", 1) for line in container.attrs["Config"]["Env"])
        names = {name for name in variables if any(word in name.lower() for word in _GIVEAWAYS)}
        assert not [name for name in names if not name.endswith("_FILE")], container.name
        assert PASSWORD not in json.dumps(container.attrs), container.name
        images.add(container.attrs["Image"])
        log = container.logs().decode(errors="replace").lower()
        lines = [line for line in log.splitlines() if PASSWORD in line or "x-consul-token" in line]
        assert lines == [], container.name
    for image in map(system.engine.images.get, images):
        assert PASSWORD not in json.dumps([image.attrs, image.history()]), image.tags


def test_the_interface_shows_the_backends(
    system: System, scene: Row, folder: Path, request: pytest.FixtureRequest
) -> None:
    """Consul's UI shows three healthy backends."""
    picture = folder / "consul-ui.png"
    with sync_playwright() as playwright:
        # As root in a container, Chromium has no sandbox of its own to offer.
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        page.goto(f"{system.consul}/ui/dc1/services/{BACKEND.name}/instances")
        for replica in system.replicas():
            expect(page.get_by_text(replica.instance, exact=False).first).to_be_visible(timeout=15_000)
        expect(page.get_by_text("All service checks passing")).to_have_count(BACKENDS, timeout=15_000)
        page.screenshot(path=picture)
        browser.close()
    assert picture.stat().st_size > 10_000
    if request.config.getoption("--publish"):
        PUBLISHED.mkdir(exist_ok=True)
        shutil.copy2(picture, PUBLISHED)
    scene.saw("screenshot: consul-ui.png")


def test_the_topology_page_is_on_a_port_of_its_own(system: System) -> None:
    """There it shows every replica and goes on doing so; on the ports for strangers there is nothing of it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"{system.page}/")
        for replica in system.replicas():
            row = page.locator("#instances").get_by_role("rowheader").filter(has_text=replica.instance)
            expect(row).to_have_count(1, timeout=15_000)
        expect(page.locator("#live")).to_have_text("Live, picture", timeout=15_000)
        browser.close()
    for address in system.edge.values():
        assert system.http.get(f"{address}/registry/state").status_code == 404
    for path in ("/", "/topology/topology.js"):
        assert system.http.get(f"{system.edge['orchestrator-api']}{path}").status_code == 404
