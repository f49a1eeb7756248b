"""The benchmarks run, and write down what they found."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.capacity_page import BEGIN, END

ROOT = Path(__file__).parents[1]


def test_quick_run(tmp_path: Path) -> None:
    """A run on tiny numbers measures every client, plays a scene, and writes the page, the samples and the plot."""
    command = [sys.executable, "-m", "benchmarks", "--quick", "--output", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    clients = {sample["client"] for sample in results["samples"]}
    assert clients == {"usual", "httpx", "httpx2", "httpx_aiohttp", "transport", "facade", "aiohttp"}
    assert results["consul_requests"] == 0
    assert {"none", "metrics", "middleware"} <= results["overhead"].keys()
    assert len(results["blocking"]) == 2
    assert [each["callers"] for each in results["mesh"]] == [1, 8]
    assert all(each["ratio"] > 0 for each in results["mesh"])
    page = (tmp_path / "README.md").read_text()
    assert "| metrics of a call |" in page
    assert "calls/s at 4 callers, by bare httpx" in page
    assert results["failover"][0]["scene"] in page
    assert f"| {results['overload'][0]['shedding']} |" in page
    assert [(each["instances"], len(each["changes"])) for each in results["held"]] == [(10, 2), (300, 2)]
    assert results["churn"]["changes"] > 0
    assert "| memory of a caller of 300 |" in page
    ElementTree.parse(tmp_path / "throughput.svg")


def test_quick_run_of_capacity(tmp_path: Path) -> None:
    """A run on tiny numbers replaces the figures in a page, and nothing else there."""
    page = tmp_path / "scale.md"
    page.write_text(f"Before.\n\n{BEGIN}\nOld figures.\n\n{END}\nAfter.\n")
    command = [sys.executable, "-m", "benchmarks.capacity", "--quick", "--output", str(page)]
    run = subprocess.run(command, cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, rest = page.read_text().split(BEGIN)
    found, after = rest.split(END)
    assert (before, after) == ("Before.\n\n", "\nAfter.\n")
    assert "Old" not in found
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.splitlines()]
    answers = {row[0]: int(row[1].removesuffix(" kB")) for row in rows if len(row) == 7 and row[1].endswith(" kB")}
    assert answers.keys() == {"10", "100"}
    assert answers["100"] > 5 * answers["10"]
    assert [row[0] for row in rows if len(row) == 5] == ["services", "---", "0", "3"]
    assert [row[:2] for row in rows if len(row) == 7 and "×" in row[0]][-1] == ["100 × 100", "10,000"]
