"""Control groups: one for the control plane, one for each node, in one for all. Of version 1 and 2."""

import os
from contextlib import suppress
from pathlib import Path

from tools.kube.place import FABRIC

__all__ = ["entered", "group_of", "make_group", "remove_group"]

_ROOT = Path("/sys/fs/cgroup")
_WEIGHTS = {"cpu.shares": "10000", "cpu.weight": "1000"}
"""All nodes together would count as one process of the machine otherwise, which starves them on a busy one."""
_PROCESSES = "processes"


def group_of(name: str) -> str:
    """The path of the group below the hierarchy's root."""
    return f"/{FABRIC}/{name}"


def make_group(name: str) -> None:
    """Makes it, in every hierarchy, with a group in it for processes that are in no pod."""
    for hierarchy in _hierarchies():
        parent = hierarchy
        for part in (FABRIC, name, _PROCESSES):
            if (parent / "cgroup.subtree_control").exists():
                controllers = (parent / "cgroup.controllers").read_text().split()
                (parent / "cgroup.subtree_control").write_text(" ".join(f"+{each}" for each in controllers))
            group = parent / part
            group.mkdir(exist_ok=True)
            for setting in ("cpuset.cpus", "cpuset.mems"):
                if hierarchy.name == "cpuset":
                    (group / setting).write_text((parent / setting).read_text())
            parent = group
        for setting, weight in _WEIGHTS.items():
            if (hierarchy / FABRIC / setting).exists():
                (hierarchy / FABRIC / setting).write_text(weight)


def entered(name: str, command: list[str]) -> list[str]:
    """The command that runs another in the group; it takes its place, so it has its pid, too."""
    files = [str(hierarchy / FABRIC / name / _PROCESSES / "cgroup.procs") for hierarchy in _hierarchies()]
    enter = "".join(f"echo $$ >{file}; " for file in files)
    return ["sh", "-ec", f'{enter} exec "$@"', "sh", *command]


def remove_group(name: str) -> bool:
    """Whether it could: not a group whose processes are still ending. The common one goes with the last."""
    try:
        for hierarchy in _hierarchies():
            for folder, _, _ in os.walk(hierarchy / FABRIC / name, topdown=False):
                Path(folder).rmdir()
            with suppress(OSError):
                (hierarchy / FABRIC).rmdir()
    except OSError:
        return False
    return True


def _hierarchies() -> list[Path]:
    """Each of version 1, or the only one of version 2."""
    if (_ROOT / "cgroup.controllers").exists():
        return [_ROOT]
    return [path for path in _ROOT.iterdir() if (path / "cgroup.procs").exists()]
