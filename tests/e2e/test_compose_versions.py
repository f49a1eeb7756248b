"""Compose reads the files the same way in its old version, 1.29, and in version 2."""

import subprocess
from typing import Any

import yaml

from deploy.compose.stack import HERE
from tests.e2e.system import System
from tools.services import ROOT

_INSTALL = """
export DEBIAN_FRONTEND=noninteractive
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends docker-compose; } >&2 || exit 1
docker-compose version --short
"""
_MARK = "# ----"
_SECONDS = 240
_FILES = ["-f", str(HERE / "docker-compose.yml")]
_OBSERVED = [*_FILES, "-f", str(HERE / "docker-compose.observe.yml")]
_LOCKED = [*_FILES, "-f", str(HERE / "docker-compose.locked.yml")]


def test_both_versions_mean_the_same(system: System) -> None:
    """This machine's Compose and the one of the base image's Debian, which is another, agree on all that counts."""
    ours = system.stack.ask("version", "--short").strip()
    theirs, *documents = in_a_container(system).split(_MARK)
    assert {ours.lstrip("v")[0], theirs.lstrip("v")[0]} == {"1", "2"}, "the two are of the same generation"
    for files, document in zip((_FILES, _LOCKED, _OBSERVED), documents, strict=True):
        assert document.strip()
        mine = read(system.stack.ask(*files, "config"))
        assert mine == read(document)
        assert mine["services"].keys() >= {"consul", "postgres", "edge", "backend"}
    assert mine["services"].keys() >= {"prometheus", "jaeger"}


def in_a_container(system: System) -> str:
    """The version and both configurations that the Compose of the base image's Debian prints, the tree mounted."""
    variables = [
        f"{name}={value}" for name, value in system.stack.variables.items() if not name.startswith("COMPOSE_F")
    ]
    command = ["docker", "run", "--rm", "--network", "host", "-v", f"{ROOT}:{ROOT}:ro", "-w", str(ROOT)]
    command += [word for variable in variables for word in ("-e", variable)]
    command += [system.stack.variables["PYTHON_IMAGE"], "sh", "-c"]
    reads = [f"echo '{_MARK}' && docker-compose {' '.join(files)} config" for files in (_FILES, _LOCKED, _OBSERVED)]
    command += [" && ".join([_INSTALL.strip(), *reads])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def read(document: str) -> dict[str, Any]:
    """What counts of a configuration, in one spelling: the two versions print some things differently."""
    found: dict[str, Any] = yaml.safe_load(document)
    services = {name: service(each) for name, each in found["services"].items()}
    mounted = {mount[0] for each in services.values() for mount in each["volumes"]}
    return {
        "services": services,
        "volumes": sorted(mounted & found["volumes"].keys()),  # version 2 leaves out what nobody mounts
        "networks": {
            name: (each["ipam"]["config"], each.get("internal", False)) for name, each in found["networks"].items()
        },
        "secrets": {name: each["file"] for name, each in found["secrets"].items()},
    }


def service(definition: dict[str, Any]) -> dict[str, Any]:
    """One service, in one spelling."""
    known = dict(definition)
    build = known.pop("build", None)
    arguments = {name: value for name, value in build["args"].items() if value} if build else None
    known.pop("command", None)
    networks = known.pop("networks", None) or {"default": None}
    return known | {
        "build": (build["dockerfile"], arguments) if build else None,
        "depends_on": {name: each["condition"] for name, each in known.pop("depends_on", {}).items()},
        "ports": sorted(map(port, known.pop("ports", []))),
        "volumes": sorted(map(volume, known.pop("volumes", []))),
        "networks": {name: each or {} for name, each in networks.items()},
        "secrets": [each["source"] for each in known.pop("secrets", [])],
        "mem_limit": memory(known.pop("mem_limit", "")),
        "memswap_limit": memory(known.pop("memswap_limit", "")),
    }


def memory(limit: str | int) -> str:
    """In bytes; empty: there is none."""
    return str(int(limit[:-1]) * 2**20) if isinstance(limit, str) and limit.endswith("m") else str(limit)


def port(mapping: str | dict[str, Any]) -> tuple[str, str, str]:
    """Address, published port and the container's."""
    if isinstance(mapping, str):
        address, published, target = mapping.removesuffix("/tcp").split(":")
        return address, published, target
    return mapping["host_ip"], str(mapping["published"]), str(mapping["target"])


def volume(mount: str | dict[str, Any]) -> tuple[str, str, bool]:
    """What is mounted, where, and whether it is read-only."""
    if isinstance(mount, str):
        source, target, *mode = mount.split(":")
        return source, target, mode == ["ro"]
    return mount["source"], mount["target"], mount.get("read_only", False)
