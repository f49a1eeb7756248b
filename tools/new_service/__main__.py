"""`nox -s new-service -- billing 8004`: the next service, from templates/service, wired in everywhere."""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.new_service.request import Request, RequestError, check, check_folder
from tools.services import ROOT


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the service; returns the exit code. What can't be made is refused before anything is written."""
    parser = argparse.ArgumentParser(prog="nox -s new-service --", description=__doc__)
    parser.add_argument("name", help="what it is called by, without -api: billing")
    parser.add_argument("port", help="where it listens, and where the edge publishes it: 8004")
    parser.add_argument(
        "--calls", default="backend-api", help="the service that its example calls (default: backend-api)"
    )
    parser.add_argument("--auth", action="store_true", help="its routes ask callers for a token, where AUTH_* is set")
    parser.add_argument("--standalone", metavar="FOLDER", type=Path, help="make a repository of its own there")
    options = parser.parse_args(arguments)
    try:
        request = check(options.name, options.port, options.calls, options.auth)
        if options.standalone:
            check_folder(options.standalone)
    except RequestError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if options.standalone:
        _make_repository(request, options.standalone)
    else:
        _add(request)
    return 0


def _add(request: Request) -> None:
    # Not at the top: a request that is refused need not wait for copier.
    from tools.new_service.render import add_lock, answers, format_code, render
    from tools.new_service.wiring import wire

    folder = ROOT / "services" / request.package
    with tempfile.TemporaryDirectory() as name:
        rendered = Path(name)
        render("service", rendered / "service", answers(request))
        if request.auth:
            add_lock(rendered / "service", request.package)
        render("wiring", rendered / "wiring", answers(request))
        edited = wire({path.name: path.read_text() for path in (rendered / "wiring").iterdir()})
        before = {path: path.read_text() for path in edited}
        try:
            shutil.copytree(rendered / "service", folder)
            for path, text in edited.items():
                path.write_text(text)
            format_code(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            for path, text in before.items():
                path.write_text(text)
            raise
    sys.stdout.write(
        f"services/{request.package} is {request.name}-api on port {request.port}, and wired in.\n"
        f"Its tests: python3 -m nox -s tests -- services/{request.package}\n"
        "All of it: python3 -m nox -s demo -- --once\n"
    )


def _make_repository(request: Request, folder: Path) -> None:
    from tools.new_service.render import add_lock, answers, format_code, render

    try:
        render("service", folder, answers(request, standalone=True))
        render("standalone", folder, answers(request))
        if request.auth:
            add_lock(folder, request.package)
        shutil.copy(ROOT / "deploy/compose/healthcheck.py", folder)
        # The versions that this repository was tested with, where the service needs the same packages.
        shutil.copy(ROOT / "requirements.lock", folder)
        subprocess.run([sys.executable, "-m", "nox", "-s", "vendor", "--", str(ROOT)], cwd=folder, check=True)
        format_code(folder)
        if shutil.which("git"):
            subprocess.run(["git", "init", "--quiet", "--initial-branch=main"], cwd=folder, check=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sys.stdout.write(f"{folder} is {request.name}-api on port {request.port}. Its tests, there: python3 -m nox\n")


if __name__ == "__main__":
    sys.exit(main())
