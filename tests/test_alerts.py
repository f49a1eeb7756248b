"""The rules that Prometheus alerts by: when each one does and does not, and that what they look at is measured."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from registry.families import FAMILIES
from tests.programs import find_promtool
from tools.services import ROOT

RULES = ROOT / "deploy/compose/prometheus/rules.yml"
SCENES = ROOT / "tests/alerts.yml"
PAGE = ROOT / "docs/howto/collectors.md"


def rules() -> list[dict[str, Any]]:
    """Every rule."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def promtool(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What it says and ends with."""
    return subprocess.run([find_promtool(), *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_every_rule_alerts_when_it_should_and_only_then() -> None:
    """The scenes come to what they say, and each rule has one in which it alerts and one in which it does not."""
    done = promtool("test", "rules", str(SCENES))
    assert done.returncode == 0, done.stdout + done.stderr
    looks = [look for scene in yaml.safe_load(SCENES.read_text())["tests"] for look in scene["alert_rule_test"]]
    names = {rule["alert"] for rule in rules()}
    assert {look["alertname"] for look in looks if look.get("exp_alerts")} == names
    assert {look["alertname"] for look in looks if not look.get("exp_alerts")} == names


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: str(rule["alert"]))
def test_a_rule_that_is_changed_is_noticed(rule: dict[str, Any], tmp_path: Path) -> None:
    """Each rule, turned into its contrary, fails a scene."""
    changed = yaml.safe_load(RULES.read_text())
    for each in changed["groups"][0]["rules"]:
        if each == rule:
            each["expr"] = f"({rule['expr']}) unless ({rule['expr']})"
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(changed))
    scenes = SCENES.read_text().replace("../deploy/compose/prometheus/rules.yml", "rules.yml")
    (tmp_path / "scenes.yml").write_text(scenes)
    done = promtool("test", "rules", "scenes.yml", folder=tmp_path)
    assert done.returncode != 0
    assert f"alertname: {rule['alert']}" in done.stdout + done.stderr


def test_what_rules_look_at_is_measured() -> None:
    """Rules and scenes name families that there are, and labels that these have or that Prometheus adds."""
    families = {family.name: {*family.labels, "exported_instance", "instance", "job"} for family in FAMILIES}
    scenes = [
        series["series"] for scene in yaml.safe_load(SCENES.read_text())["tests"] for series in scene["input_series"]
    ]
    for expression in [*(rule["expr"] for rule in rules()), *scenes]:
        names = re.findall(r"\bregistry_\w+", expression)
        assert names
        labels = {
            label
            for group in re.findall(r"by \((.*?)\)|\{(.*?)\}", expression)
            for label in re.findall(r"(\w+)(?==|,|$)", re.sub(r'=~?"[^"]*"', "=", "".join(group)).replace(" ", ""))
        }
        assert labels <= set().union(*(families[name] for name in names)), expression


def test_the_page_has_every_rule() -> None:
    """The table has each rule, and no other."""
    rows = re.findall(r"^\| `(\w+)` \| ", PAGE.read_text(), re.MULTILINE)
    assert rows == [rule["alert"] for rule in rules()]
