"""`python -m tools.kube.images`: the images of the system, as for Compose, and those that nodes themselves need.

Docker's engine makes them, and is not needed any more once they are in containerd's store.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from deploy.compose.images import choose_images
from deploy.compose.stack import Stack, StackError, check_engine, overlaid
from registry.testing.agent import ConsulNotFoundError
from registry.testing.progress import UnavailableError
from tools.kube.place import PLACE, KubeError, end, remove, start, wait_until
from tools.kube.programs import Programs, find_programs
from tools.services import SERVICES

__all__ = ["SEED", "chosen", "make_images"]

SEED = PLACE / "images"
"""containerd's store of them, of which every node gets a copy."""
_MADE = PLACE / "images.txt"
_ARCHIVE = PLACE / "images.tar"
_NAMES = {"CONSUL_IMAGE": "hashicorp/consul", "POSTGRES_IMAGE": "postgres"}
"""Variable of Compose → what deploy/kubernetes calls it."""
_OWN = {
    "pause": 'FROM {python}\nUSER 65535:65535\nENTRYPOINT ["sleep", "infinity"]\n',
    "coredns": 'FROM scratch\nCOPY coredns /coredns\nENTRYPOINT ["/coredns"]\n',
}
_CONFIG = """\
version = 2
root = "{root}"
state = "{state}"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{socket}"
"""


def make_images(programs: Programs) -> None:
    """Returns when SEED has all of them as they are now. Blocks: some seconds when nothing has changed.

    Raises: KubeError, StackError, ConsulNotFoundError.
    """
    check_engine()
    images = choose_images(print)
    Stack({"COMPOSE_PROJECT_NAME": "registry-kube", **overlaid("locked"), **images}).compose("build")
    for name, recipe in _OWN.items():
        _build(name, recipe.format(python=images["PYTHON_IMAGE"]), programs["coredns"])
    names = [f"registry/{service.folder}:latest" for service in SERVICES]
    names += [images[variable] for variable in _NAMES] + [f"registry-local/{name}:latest" for name in _OWN]
    names.append("registry/keeper:latest")
    ids = _run("docker", "image", "inspect", "--format", "{{.Id}}", *names).split()
    made = "".join(f"{name} {each}\n" for name, each in zip(names, ids, strict=True))
    if SEED.exists() and _MADE.exists() and _MADE.read_text() == made:
        return
    PLACE.mkdir(parents=True, exist_ok=True)
    _MADE.unlink(missing_ok=True)
    remove(SEED)
    try:
        _run("docker", "save", "-o", str(_ARCHIVE), *names)
        _import(programs)
    finally:
        _ARCHIVE.unlink(missing_ok=True)
    _MADE.write_text(made)


def chosen() -> Mapping[str, str]:
    """What deploy/kubernetes calls an image → what it is called in SEED. Raises: KubeError."""
    if not _MADE.exists():
        raise KubeError("There are no images for the nodes yet: bash tools/docker.sh run python -m tools.kube.images")
    made = [line.split()[0] for line in _MADE.read_text().splitlines()]
    return dict(zip(_NAMES.values(), made[len(SERVICES) :], strict=False))


def _build(name: str, recipe: str, coredns: str) -> None:
    with tempfile.TemporaryDirectory(prefix="registry-kube-") as context:
        Path(context, "Dockerfile").write_text(recipe)
        shutil.copy2(coredns, context)
        _run("docker", "build", "--quiet", "--tag", f"registry-local/{name}:latest", context)


def _import(programs: Programs) -> None:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="registry-kube-") as folder:
        socket = f"{folder}/sock"
        config = Path(folder, "config.toml")
        config.write_text(_CONFIG.format(root=SEED, state=f"{folder}/state", socket=socket))
        start("images", [programs.which("containerd"), "--config", str(config)], programs.environment)
        try:
            wait_until(Path(socket).exists, 30.0, "containerd answers")
            command = [programs.which("ctr"), "-a", socket, "-n", "k8s.io", "images", "import"]
            _run(*command, "--snapshotter", "overlayfs", str(_ARCHIVE))
        finally:
            end("images")
    sys.stderr.write(f"The images are in {SEED}, imported in {time.monotonic() - begun:.0f} s.\n")


def _run(*command: str) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise KubeError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    try:
        make_images(find_programs())
    except (KubeError, StackError, ConsulNotFoundError, UnavailableError) as error:
        sys.exit(str(error))
