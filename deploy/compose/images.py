"""`nox -s images`: the base images from Debian's packages, where none can be pulled; only what is missing."""

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.compose.collectors import COLLECTORS, RECIPES, find_collector
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes what is missing and says how to use it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="nox -s images --", description=__doc__)
    parser.add_argument("--observe", action="store_true", help="Prometheus and Jaeger too, which takes long")
    options = parser.parse_args(arguments)
    try:
        check_engine()
        make_missing_images(_names(LOCAL_IMAGES, options.observe))
    except (StackError, ConsulNotFoundError) as error:
        _say(str(error))
        return 1
    _say(
        "`nox -s up` takes these images where no others can be had. For docker-compose at the root:\n"
        f"  set -a; . {LOCAL_IMAGES.relative_to(ROOT)}; set +a"
    )
    return 0


def choose_images(say: Callable[[str], Any], *, observe: bool = False) -> dict[str, str]:
    """The image variables to give Compose: the shell's, else the official ones, else (made if need be) the local ones.

    ``observe``: with those of docker-compose.observe.yml. Raises: StackError, ConsulNotFoundError.
    """
    local = _names(LOCAL_IMAGES, observe)
    official = {name: image for name, image in read_env(ROOT / ".env").items() if name in local}
    chosen = {name: os.environ[name] for name in local if os.environ.get(name)}
    official |= chosen
    if chosen == official or has_images(official):
        return official
    # Local ones that are there were made because nothing could be pulled: asking again would cost a time-out.
    if has_images(_names(LOCAL_IMAGES, observe=False)) or not can_have_official_images(official):
        say("The official images can't be had here: taking those made from Debian's packages.")
        make_missing_images(local)
        return local | chosen
    return official


def make_missing_images(names: Mapping[str, str]) -> None:
    """Returns when these images of local-images.env exist and follow their recipes. Blocks for minutes.

    Raises: StackError, ConsulNotFoundError.
    """
    recipes = {variable: _recipe(_RECIPE, *_recipes_of(variable)) for variable in names}
    missing = {variable for variable, image in names.items() if image_label(image, _LABEL) != recipes[variable]}
    if "PYTHON_IMAGE" in missing:
        with _step(names["PYTHON_IMAGE"]):
            _import_python(names["PYTHON_IMAGE"], recipes["PYTHON_IMAGE"])
    # Consul's is the last stage of the recipe.
    for variable in sorted(missing - {"PYTHON_IMAGE"}, key="CONSUL_IMAGE".__eq__):
        # Before the clock starts: finding a program may mean building it, and that shows progress of its own.
        name = variable.removesuffix("_IMAGE").lower()
        program = find_collector(name) if _collector(variable) else find_consul() if name == "consul" else None
        with _step(names[variable]):
            _build(name, names[variable], names["PYTHON_IMAGE"], recipes[variable], program)
    _say(f"The images are there: {', '.join(names.values())}")


def _names(file: Path, observe: bool) -> dict[str, str]:
    return {variable: image for variable, image in read_env(file).items() if observe or not _collector(variable)}


def _collector(variable: str) -> bool:
    return variable.removesuffix("_IMAGE").lower() in COLLECTORS


def _recipes_of(variable: str) -> tuple[Path, ...]:
    return (RECIPES, RECIPES / variable.removesuffix("_IMAGE").lower()) if _collector(variable) else ()


def _recipe(*folders: Path) -> str:
    """Changes with everything that an image is made of, so that no stale one is taken for present."""
    parts = [path.read_bytes() for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
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


def _build(name: str, image: str, python: str, recipe: str, program: Path | None) -> None:
    """``program``: the binary that goes in; of collectors, it is all that they differ by."""
    collector = name in COLLECTORS
    with tempfile.TemporaryDirectory(prefix="registry-image-") as context:
        shutil.copytree(RECIPES if collector else _RECIPE, context, ignore=_folders, dirs_exist_ok=True)
        if program is not None:
            shutil.copy2(program, Path(context, name))
            Path(context, name).chmod(0o755)
        command = ["docker", "build", "--quiet", "--tag", image, "--label", f"{_LABEL}={recipe}"]
        command += ["--build-arg", f"NAME={name}"] if collector else ["--target", name]
        # The network of this machine: whatever reaches Debian's packages here reaches them there.
        command += ["--network", "host", "--build-arg", f"PYTHON_IMAGE={python}", context]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StackError(f"Building {image} failed:\n{(done.stdout + done.stderr)[-3000:]}")


def _folders(parent: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(parent, name).is_dir()]


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
