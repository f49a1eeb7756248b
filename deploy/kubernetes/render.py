"""What an overlay is made of, as the API server would get it: `python -m deploy.kubernetes.render plain`."""

import shutil
import subprocess
import sys
from pathlib import Path

from registry.testing.progress import UnavailableError
from tools.built import find_built

__all__ = ["HERE", "OVERLAYS", "render"]

HERE = Path(__file__).parent
OVERLAYS = ("plain", "locked")
_MODULE = "sigs.k8s.io/kustomize/kustomize/v5"


def render(folder: Path) -> str:
    """The YAML of all objects, by kubectl or kustomize from PATH, else by a kustomize that is built once.

    Raises: UnavailableError, subprocess.CalledProcessError, whose ``stderr`` says what is wrong with the files.
    """
    command = [*_kustomize(), str(folder)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _kustomize() -> list[str]:
    if kubectl := shutil.which("kubectl"):
        return [kubectl, "kustomize"]
    program = shutil.which("kustomize") or find_built("kustomize", HERE / "kustomize", _MODULE)
    return [str(program), "build"]


if __name__ == "__main__":
    try:
        sys.stdout.write(render(HERE / sys.argv[1]))
    except UnavailableError as error:
        sys.exit(str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(error.stderr)
