"""The front door: `nox` checks everything, `nox -s demo` shows the system at work."""

import hashlib
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv"
nox.options.error_on_external_run = True
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "typecheck", "docs", "tests", "e2e"]

ROOT = Path(__file__).parent
LOCK = "requirements.lock"
TYPED = ["packages", "services", "demo", "deploy", "tools", "benchmarks", "tests", "conftest.py", "noxfile.py"]


@nox.session
def lint(session: nox.Session) -> None:
    """Check format, style, import contracts, and that requirements.lock still follows the pyprojects."""
    install(session)
    session.run("ruff", "format", "--check")
    session.run("ruff", "check")
    session.run("lint-imports")
    check_lock(session)


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check every annotation, strictly."""
    install(session)
    session.run("mypy", *(session.posargs or TYPED))


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests against a real Consul; arguments go to pytest."""
    install(session)
    if session.posargs:
        session.run("pytest", *session.posargs)
        return
    # Half of their time is waiting, so two at a time; the failover scenes measure, and have the machine to themselves.
    session.run("pytest", "-q", "-n", "2", "--dist", "loadfile", "--ignore=tests/failover")
    session.run("pytest", "-q", "tests/failover", "--ignore=tests/failover/test_mesh_scenes.py")


@nox.session
def quick(session: nox.Session) -> None:
    """Run the units only, in less than a minute: no Consul, no processes; arguments go to pytest."""
    install(session)
    # Half of its time is waiting for time-outs to pass.
    session.run("pytest", "-q", "-n", "2", "-m", "not real", "packages", "services", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Run the tests and count the branches that they take, which must be as many as before; arguments go to pytest."""
    install(session)
    session.run("coverage", "run", "-m", "pytest", *session.posargs)
    # The floor is for all tests: a part of them is only shown.
    session.run("coverage", "report", *(["--fail-under=0"] if session.posargs else []))


@nox.session
def httpx2(session: nox.Session) -> None:
    """Run the package's tests with httpx2 in httpx's place; arguments go to pytest."""
    install(session)
    session.run(
        "pytest",
        "-p",
        "tests.support.httpx2_alias",
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
        *(session.posargs or ["packages"]),
    )


@nox.session
def consul(session: nox.Session) -> None:
    """Run the package's tests that talk to Consul over several versions of it; `-- 1.20.6` chooses."""
    install(session)
    session.run("python", "-m", "tools.consul", *session.posargs)


@nox.session
def e2e(session: nox.Session) -> None:
    """Play the scenes of scaling and failover on containers, in ten minutes; arguments go to pytest."""
    install(session)
    some = any(Path(argument.partition("::")[0]).exists() for argument in session.posargs)
    # Where no engine answers, root on Debian gets one for as long as it takes. After Ctrl-C, all is removed first.
    session.run(
        *("bash", "tools/docker.sh", "run", "pytest", *([] if some else ["tests/e2e"])),
        *("--junitxml=.e2e/junit.xml", *session.posargs),
        external=True,
        interrupt_timeout=60.0,
        terminate_timeout=60.0,
    )


@nox.session(name="e2e-locked")
def e2e_locked(session: nox.Session) -> None:
    """Play the scenes of tokens, TLS and three servers, in ten minutes; arguments go to those on containers."""
    install(session)
    if not session.posargs:
        session.run("pytest", "-q", "tests/failover/test_mesh_scenes.py")  # on processes
    session.run(
        *("bash", "tools/docker.sh", "run", "pytest", "tests/locked", "--junitxml=.e2e/locked.xml"),
        *session.posargs,
        external=True,
        interrupt_timeout=60.0,
        terminate_timeout=60.0,
    )


@nox.session
def k8s(session: nox.Session) -> None:
    """Play scenes on three nodes of Kubernetes, plain or `--locked`; `-- up` leaves them there, `-- down` ends them."""
    install(session)
    if session.posargs[:1] != ["down"]:
        # The engine ends again before the nodes begin.
        session.run("bash", "tools/docker.sh", "run", "python", "-m", "tools.kube.images", external=True)
    if session.posargs[:1] in (["up"], ["down"]):
        command = ["python", "-m", "tools.kube", *session.posargs]
    else:
        command = ["pytest", "tests/k8s", "--junitxml=.e2e/kubernetes.xml", *session.posargs]
    # After Ctrl-C, all is removed first.
    session.run(*command, interrupt_timeout=60.0, terminate_timeout=60.0)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into .site/html, strictly: every link, anchor and public name has to be there."""
    install(session)
    session.run("python", "-m", "tools.docs")


@nox.session
def screenshot(session: nox.Session) -> None:
    """Take README's picture of the topology page anew, in a minute: a real system of which an instance is killed."""
    install(session)
    session.run("python", "-m", "tests.screenshot")


@nox.session(venv_backend="none")
def newcomer(session: nox.Session) -> None:
    """Follow the tutorial as somebody would who has nothing yet, in less than ten minutes."""
    session.run(sys.executable, "-m", "tests.newcomer", external=True)


@nox.session
def demo(session: nox.Session) -> None:
    """Start Consul and the services as local processes; `-- --once` leaves after the tour, `--locked` locks it."""
    install(session)
    # After Ctrl-C the services withdraw from Consul and drain before they end.
    session.run("python", "-m", "demo", *session.posargs, interrupt_timeout=15.0)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure clients and failover anew, into docs/benchmarks, in half an hour; `-- --quick` tries it out."""
    install(session)
    session.run("python", "-m", "benchmarks", *session.posargs)


@nox.session
def capacity(session: nox.Session) -> None:
    """Measure what many instances and services cost, into docs/explanation/scale.md; `-- --quick` tries it out."""
    install(session)
    session.run("python", "-m", "benchmarks.capacity", *session.posargs)


@nox.session
def up(session: nox.Session) -> None:
    """Start the system in containers; `-- --backends 5` scales it, `--observe` and `--locked` change it."""
    install(session)
    session.run("python", "-m", "deploy.compose.up", *session.posargs)


@nox.session(venv_backend="none")
def down(session: nox.Session) -> None:
    """Remove what `up` made; `-- --volumes` removes the stored cards and Consul's data, too."""
    session.run(sys.executable, "-m", "deploy.compose.down", *session.posargs, external=True)


@nox.session
def backup(session: nox.Session) -> None:
    """Write all that the locked system's Consul and keeper hold into a file: `-- FILE`."""
    install(session)
    session.run("python", "-m", "deploy.compose.locked.backup", *session.posargs)


@nox.session
def restore(session: nox.Session) -> None:
    """Start the locked system with empty servers, and give it back what `backup` kept: `-- FILE`."""
    install(session)
    session.run("python", "-m", "deploy.compose.locked.restore", *session.posargs)


@nox.session
def rotate(session: nox.Session) -> None:
    """Change secrets of the locked system while it runs: `-- tokens`, `-- gossip` or `-- ca`."""
    install(session)
    session.run("python", "-m", "deploy.compose.locked.rotate", *session.posargs)


@nox.session
def upgrade(session: nox.Session) -> None:
    """Give the locked system's servers of Consul the image in CONSUL_IMAGE, one after another."""
    install(session)
    session.run("python", "-m", "deploy.compose.locked.upgrade", *session.posargs)


@nox.session
def images(session: nox.Session) -> None:
    """Make the base images from Debian's packages, where no official ones can be pulled; only what is missing."""
    install(session)
    session.run("python", "-m", "deploy.compose.images", *session.posargs)


@nox.session(name="new-service")
def new_service(session: nox.Session) -> None:
    """Make the next service from templates/service and wire it in: `-- billing 8004`."""
    install(session)
    before = members()
    session.run("python", "-m", "tools.new_service", *session.posargs)
    if members() != before:
        compile_lock_anywhere(session, LOCK)


@nox.session
def release(session: nox.Session) -> None:
    """Build the package into dist/ and try it out as a newcomer would; `-- v0.1.0`: only if it may be released so."""
    install(session)
    session.run("python", "-m", "tools.release", *session.posargs)
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    session.run("uv", "build", "--quiet", "packages/registry", "--out-dir", "dist")
    session.run("twine", "check", "--strict", *(str(file) for file in ROOT.glob("dist/registry-*")))
    session.run("pytest", "tests/test_release.py", "tests/release", env={"RELEASE_DIST": str(ROOT / "dist")})


@nox.session(venv_backend="none")
def lock(session: nox.Session) -> None:
    """Bring requirements.lock in line with the pyprojects; `-- --upgrade` takes the newest releases."""
    compile_lock(session, LOCK, *session.posargs)


def members() -> list[str]:
    """The folders of the workspace's members."""
    found = (path for folder in ("packages", "services") for path in ROOT.glob(f"{folder}/*/pyproject.toml"))
    return sorted(path.parent.relative_to(ROOT).as_posix() for path in found)


def install(session: nox.Session) -> None:
    """Install what is locked and the workspace itself, unless this environment has exactly that already."""
    # Tests and demo start hundreds of Pythons: what one has compiled, the next find, even where that is switched off.
    bytecode = str(Path(session.virtualenv.location, "bytecode"))
    session.env.update({"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": bytecode})
    sources = [LOCK, "pyproject.toml", *(f"{member}/pyproject.toml" for member in members())]
    wanted = hashlib.sha256(b"\0".join((ROOT / source).read_bytes() for source in sources)).hexdigest()
    stamp = Path(session.virtualenv.location, "installed.sha256")
    if stamp.exists() and stamp.read_text() == wanted:
        return
    stamp.unlink(missing_ok=True)
    # A sync, not an install: a reused environment must not keep what the lock dropped.
    session.run_install("uv", "pip", "sync", "--require-hashes", LOCK)
    session.install("--no-deps", *(part for member in members() for part in ("-e", member)))
    stamp.write_text(wanted)


def compile_lock(session: nox.Session, output: str, *options: str) -> None:
    """Resolve all members and the dev group into `output`, keeping the versions it names where they fit."""
    session.run(
        *("uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--generate-hashes"),
        *("--no-emit-index-url", "--no-emit-find-links", "--no-emit-package", "registry"),
        *("--custom-compile-command", "python3 -m nox -s lock"),
        *("--all-extras", "--group", "dev", *(f"{member}/pyproject.toml" for member in members())),
        *("--output-file", output, *options),
        external=True,
        # The environment of whoever runs this must not leak an index or a constraint into the lock.
        env={"UV_CONSTRAINT": None, "UV_OVERRIDE": None, "UV_EXCLUDE_NEWER": None},
    )


def compile_lock_anywhere(session: nox.Session, output: str) -> None:
    """Resolve from the network, else from what uv's cache holds."""
    try:
        compile_lock(session, output)
    except nox.command.CommandFailed:
        session.warn("Resolving failed; trying once more with what uv's cache holds, without the network.")
        compile_lock(session, output, "--offline")


def check_lock(session: nox.Session) -> None:
    """Compile again from the present lock: a difference means that a pyproject has moved on without it."""
    present = (ROOT / LOCK).read_text()
    again = Path(session.create_tmp(), LOCK)
    again.write_text(present)
    compile_lock_anywhere(session, str(again))
    if again.read_text() != present:
        session.error(f"{LOCK} is out of date: run `python3 -m nox -s lock` and commit it.")
