"""``nox -s screenshot``: README's picture of the topology page, of a real system that has just lost an instance."""

import signal
import sys
import tempfile
from pathlib import Path

from registry.testing.agent import running_agent
from tests.system import running_system
from tests.topology import Load, open_tab, running_browser
from tools.services import ROOT

PICTURE = ROOT / "docs/topology.png"
LOOK = {"viewport": {"width": 1440, "height": 900}, "color_scheme": "light", "reduced_motion": "reduce"}


def main() -> int:
    """Takes it, in about a minute."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running_agent() as consul,
        running_system(consul, Path(folder), 4, {"SERVICE_HEALTH_CHECK_INTERVAL": "5"}) as system,
        running_browser() as browser,
        open_tab(browser, system.front, **LOOK) as tab,
        Load(system.front, callers=2),
    ):
        victim = min(system.passing("backend-api"))
        tab.says(victim, "live")
        tab.wait("() => document.querySelectorAll('#instances meter').length >= 4", 0)
        tab.page.wait_for_timeout(10_000)  # the window of the shares
        system.processes.pop(victim).send_signal(signal.SIGKILL)
        tab.says(victim, "ejected: refused")
        tab.page.click("#pause")
        tab.page.screenshot(path=PICTURE, full_page=True)
    sys.stdout.write(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size // 1024} kB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
