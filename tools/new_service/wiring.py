"""The places outside its folder that name a service: each has a mark, above which a rendered block is put.

What can go by services/* or by ``tools.services`` does so and is not here.
"""

from collections.abc import Mapping
from pathlib import Path

from tools.services import ROOT

__all__ = ["MARKS", "wire"]

MARKS = {
    "pyproject.toml": ("mypy_path", "root_packages", "independent"),
    "deploy/compose/docker-compose.yml": ("compose", "edge_port"),
    "deploy/compose/docker-compose.observe.yml": ("observe",),
    "deploy/compose/docker-compose.locked.yml": ("locked", "locked_reader", "locked_volume"),
    "deploy/keeper/grants.py": ("calls",),
    "deploy/compose/haproxy.cfg": ("edge",),
    "deploy/kubernetes/base/services.yaml": ("kubernetes",),
    "deploy/kubernetes/locked/services.yaml": ("kubernetes_locked",),
    "README.md": ("readme",),
}
"""File → its marks; the block of a mark is templates/wiring/<mark>.jinja."""


def wire(blocks: Mapping[str, str]) -> dict[Path, str]:
    """Each file's new text; writes nothing. ``blocks``: mark → block. Raises: ValueError, when a mark is not there."""
    texts = {}
    for name, marks in MARKS.items():
        lines = (ROOT / name).read_text().splitlines(keepends=True)
        for mark in marks:
            marked = {f"# new-service: {mark}", f"<!-- new-service: {mark} -->"}
            places = [number for number, line in enumerate(lines) if line.strip() in marked]
            if len(places) != 1:
                raise ValueError(f"{name} must have one line `# new-service: {mark}`, not {len(places)}")
            lines.insert(places[0], blocks[mark])
        texts[ROOT / name] = "".join(lines)
    return texts
