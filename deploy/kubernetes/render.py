"""What an overlay is made of, as the API server would get it: `python -m deploy.kubernetes.render plain`."""

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
    """The YAML of all objects, as `kubectl apply -k` makes it too: by one version of kustomize, which is built once.

    Raises: UnavailableError, subprocess.CalledProcessError, whose ``stderr`` says what is wrong with the files.
    """
    program = find_built("kustomize", HERE / "kustomize", _MODULE)
    return subprocess.run([program, "build", folder], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    try:
        sys.stdout.write(render(HERE / sys.argv[1]))
    except UnavailableError as error:
        sys.exit(str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(error.stderr)
