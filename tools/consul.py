"""`nox -s consul`: the package's tests over several versions of Consul, from the last one under the MPL on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from registry.testing.binary import RECIPE, cached, pinned_version
from registry.testing.golang import build
from registry.testing.progress import UnavailableError
from tools.services import ROOT

VERSIONS = ("1.16.3", "1.20.6", pinned_version())
DIFFERENCES = {"1.16.3": ["test_resolver.py::test_other_peoples_names_are_found[{}//x]"]}
"""What an older version can't do, for which no test of ours is at fault: it redirects a path with two slashes."""
_MODULE = "github.com/hashicorp/consul"


def main(arguments: list[str]) -> int:
    """Run the tests over each of these versions (default: VERSIONS); returns the number of versions that failed."""
    failed = []
    for version in arguments or VERSIONS:
        try:
            binary = _get(version)
        except (UnavailableError, OSError, subprocess.CalledProcessError) as error:
            failed.append(version)
            _say(f"Consul {version} can't be built: {error}\n")
            continue
        _say(subprocess.check_output([binary, "version"], text=True))
        tests = [sys.executable, "-m", "pytest", "-q", "-p", "tests.support.consul_only", "packages/registry"]
        tests += [f"--deselect=packages/registry/tests/{test}" for test in DIFFERENCES.get(version, ())]
        if subprocess.run(tests, cwd=ROOT, env={**os.environ, "CONSUL_BIN": str(binary)}, check=False).returncode:
            failed.append(version)
    _say(f"Failed over Consul {', '.join(failed)}.\n" if failed else "Passed over each of them.\n")
    return len(failed)


def _get(version: str) -> Path:
    """The binary of this version, from the cache or built there. Raises: what its callers catch."""
    target = cached(version)
    if not target.exists():
        go = shutil.which("go")
        if go is None:
            raise UnavailableError("there is no `go` on PATH")
        target.parent.mkdir(parents=True, exist_ok=True)
        recipe = RECIPE if version == pinned_version() else _recipe(go, version, target.with_name("recipe"))
        build(go, recipe, target, os.environ)
    return target


def _recipe(go: str, version: str, folder: Path) -> Path:
    """Write what `registry.testing` has for its own version: a module that requires Consul, and nothing else."""
    folder.mkdir(exist_ok=True)
    shutil.copy(RECIPE / "tools.go", folder)
    found = Path(_go(go, folder, "mod", "download", "-json", f"{_MODULE}@v{version}")["Dir"])
    theirs = _go(go, folder, "mod", "edit", "-json", str(found / "go.mod"))
    excluded = "".join(f"exclude {one['Path']} {one['Version']}\n" for one in theirs.get("Exclude") or [])
    (folder / "go.mod").write_text(
        f"module consul-build\n\ngo {theirs['Go']}\n\nrequire {_MODULE} v{version}\n\n{excluded}"
    )
    # Consul's own hashes, so that only its parts, which its own build takes from folders, come without.
    shutil.copyfile(found / "go.sum", folder / "go.sum")
    _go(go, folder, "mod", "tidy")
    return folder


def _go(go: str, folder: Path, *arguments: str) -> Any:
    """What go says as JSON; None when it says nothing."""
    # Not every checksum database has each of Consul's parts.
    environment = {**os.environ, "GONOSUMDB": f"{_MODULE}/*"}
    said = subprocess.run([go, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, check=True).stdout
    return json.loads(said) if said else None


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
