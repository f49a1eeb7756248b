"""`nox -s images`: the four base images from Debian's packages, where none can be pulled; only what is missing."""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.compose.stack import (
    HERE,
    LOCAL_IMAGES,
    StackError,
    can_have_official_images,
    check_engine,
    has_images,
    image_label,
    read_env,
)
from registry.testing.agent import ConsulNotFoundError, find_consul
from tools.services import ROOT

__all__ = ["choose_images", "make_missing_images"]

_RECIPE = HERE / "local"
_SUITE = "trixie"
_PACKAGES = "python3,python3-venv,ca-certificates"
_LEFT_OUT = ("man", "doc", "locale", "info")
_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
_LABEL = "registry.recipe"


def main() -> int:
    """Makes what is missing and says how to use it; returns the exit code."""
    try:
        check_engine()
        make_missing_images()
    except (StackError, ConsulNotFoundError) as error:
        _say(str(error))
        return 1
    _say(
        "`nox -s up` takes these images where no others can be had. For docker-compose at the root:\n"
        f"  set -a; . {LOCAL_IMAGES.relative_to(ROOT)}; set +a"
    )
    return 0


def choose_images(say: Callable[[str], Any]) -> dict[str, str]:
    """The image variables to give Compose: the shell's, else the official ones, else (made if need be) the local ones.

    Raises: StackError, ConsulNotFoundError.
    """
    local = read_env(LOCAL_IMAGES)
    official = {name: image for name, image in read_env(ROOT / ".env").items() if name in local}
    chosen = {name: os.environ[name] for name in local if os.environ.get(name)}
    official |= chosen
    if chosen == official or has_images(official):
        return official
    # Local ones that are there were made because nothing could be pulled: asking again would cost a time-out.
    if has_images(local) or not can_have_official_images(official):
        say("The official images can't be had here: taking those made from Debian's packages.")
        make_missing_images()
        return local | chosen
    return official


def make_missing_images() -> None:
    """Returns when the four images of local-images.env exist and follow their recipe. Blocks for up to some minutes.

    Raises: StackError, ConsulNotFoundError.
    """
    names = read_env(LOCAL_IMAGES)
    recipe = _recipe()
    missing = [variable for variable, image in names.items() if image_label(image, _LABEL) != recipe]
    if "PYTHON_IMAGE" in missing:
        with _step(names["PYTHON_IMAGE"]):
            _import_python(names["PYTHON_IMAGE"], recipe)
    # Consul's is the last stage of the recipe.
    for variable in sorted(set(missing) - {"PYTHON_IMAGE"}, key="CONSUL_IMAGE".__eq__):
        # Before the clock starts: finding Consul may mean building it, and that shows progress of its own.
        consul = find_consul() if variable == "CONSUL_IMAGE" else None
        with _step(names[variable]):
            _build(variable.removesuffix("_IMAGE").lower(), names, names[variable], recipe, consul)
    _say(f"The images are there: {', '.join(names.values())}")


def _recipe() -> str:
    """Changes with everything that an image is made of, so that no stale one is taken for present."""
    parts = [path.read_bytes() for path in sorted(_RECIPE.iterdir())]
    words = f"{_SUITE} {_PACKAGES} {_LEFT_OUT} {_BUNDLE}".encode()
    return hashlib.sha256(b"\0".join([words, *parts])).hexdigest()[:16]


def _import_python(image: str, recipe: str) -> None:
    mmdebstrap = _mmdebstrap()
    excludes = [f"--dpkgopt=path-exclude=/usr/share/{folder}/*" for folder in _LEFT_OUT]
    # This machine's CA bundle goes in: in a closed network, only it knows who signed what is fetched from inside.
    bundle = os.environ.get("SSL_CERT_FILE") or _BUNDLE
    trust = f'--customize-hook=cp {shlex.quote(bundle)} "$1{_BUNDLE}"'
    variables = ["SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE"] if Path(bundle).is_file() else []
    # Unsafe: a file system that nobody keeps after a crash need not be synced file by file.
    command = [mmdebstrap, "--quiet", "--variant=minbase", f"--include={_PACKAGES}", "--dpkgopt=force-unsafe-io"]
    command += excludes
    command += [trust] if variables else []
    # No mirror argument: the suite's own default.
    making = [*command, _SUITE, "-"]
    changes = [f"--change=ENV {variable}={_BUNDLE}" for variable in variables]
    taking = ["docker", "import", *changes, f"--change=LABEL {_LABEL}={recipe}", "-", image]
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(making, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL) as source:
            taken = subprocess.run(taking, stdin=source.stdout, capture_output=True, text=True, check=False)
        if source.returncode != 0:
            subprocess.run(["docker", "image", "rm", image], capture_output=True, check=False)
            errors.seek(0)
            raise StackError(f"mmdebstrap failed:\n{errors.read().decode(errors='replace')[-2000:]}")
    if taken.returncode != 0:
        raise StackError(f"docker import failed: {taken.stderr.strip()}")


def _mmdebstrap() -> str:
    if found := shutil.which("mmdebstrap"):
        return found
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "mmdebstrap", "debian-archive-keyring"]
    if not (hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get")):
        raise StackError(
            "No image can be pulled here, and making them needs mmdebstrap: on Debian or Ubuntu, "
            "`sudo apt-get install mmdebstrap debian-archive-keyring`, then try again."
        )
    _say("Installing mmdebstrap.")
    for command in (["apt-get", "update", "-qq"], install):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise StackError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return shutil.which("mmdebstrap") or "mmdebstrap"


def _build(target: str, names: dict[str, str], image: str, recipe: str, consul: Path | None) -> None:
    with tempfile.TemporaryDirectory(prefix="registry-image-") as context:
        shutil.copytree(_RECIPE, context, dirs_exist_ok=True)
        if consul is not None:
            shutil.copy2(consul, Path(context, "consul"))
            Path(context, "consul").chmod(0o755)
        command = ["docker", "build", "--quiet", "--target", target, "--tag", image, "--label", f"{_LABEL}={recipe}"]
        # The network of this machine: whatever reaches Debian's packages here reaches them there.
        command += ["--network", "host", "--build-arg", f"PYTHON_IMAGE={names['PYTHON_IMAGE']}", context]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StackError(f"Building {image} failed:\n{(done.stdout + done.stderr)[-3000:]}")


@contextmanager
def _step(image: str) -> Iterator[None]:
    begun = time.monotonic()
    _say(f"Making {image} …", end="")
    try:
        yield
    except BaseException:
        _say(" failed.")
        raise
    _say(f" done in {time.monotonic() - begun:.0f} s.")


def _say(text: str, end: str = "\n") -> None:
    sys.stderr.write(text + end)
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
