"""`nox -s consul`: which tests it chooses, and over which versions."""

import re
import subprocess
import sys

from tools.consul import VERSIONS
from tools.services import ROOT


def test_only_tests_with_a_consul_are_chosen() -> None:
    """Of a module with both kinds, those that no agent serves are left out."""
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "tests.support.consul_only"]
    done = subprocess.run(
        [*collect, "packages/registry/tests/test_testing_agent.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    chosen = set(re.findall(r"::(\w+)", done.stdout))
    assert {"test_acl_denies_by_default", "test_shared_agent_leads_and_has_a_page"} <= chosen
    assert "test_taken_port_is_a_clear_error" not in chosen
    assert "deselected" in done.stdout


def test_the_documented_versions_are_the_tested_ones() -> None:
    """The page about Consul names each version that the session runs over, in its table."""
    page = (ROOT / "docs/howto/consul.md").read_text()
    assert re.findall(r"^\| (1\.\d+\.\d+) \|", page, re.MULTILINE) == list(VERSIONS)
