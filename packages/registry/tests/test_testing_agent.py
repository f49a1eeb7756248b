"""The agent that tests and the demo run on: what it can suffer, that nothing stays."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest

from registry.testing.agent import ConsulStartError, running_agent
from registry.testing.fixtures import ConsulAgent


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


def test_taken_port_is_a_clear_error() -> None:
    """A fixed port that another program holds is named in the error, before any binary is looked for."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(ConsulStartError, match=f"Port {port} is taken by another program"),
            running_agent(http_port=port, binary=Path("/nonexistent")),
        ):
            pass


@pytest.mark.real
def test_failed_start_shows_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When Consul ends while starting, the error holds the end of its log, and its directory is gone."""
    broken = executable(tmp_path / "broken-consul", "raise SystemExit('my configuration is odd')")
    monkeypatch.setattr(tempfile, "tempdir", str(directory := tmp_path / "temporary"))
    directory.mkdir()
    with (
        pytest.raises(ConsulStartError, match="my configuration is odd"),
        running_agent(binary=broken),
    ):
        pass
    assert list(directory.iterdir()) == []


def test_shared_agent_leads_and_has_a_page(consul_agent: ConsulAgent) -> None:
    """The agent of the session fixture is up, leads, and serves its user interface where env() says."""
    address = consul_agent.env()["CONSUL_HTTP_ADDR"]
    assert httpx.get(f"http://{address}/v1/status/leader").json().startswith("127.0.0.1:")
    assert httpx.get(f"{consul_agent.url}/ui/").is_success


def test_agent_suffers_what_it_is_told_to(private_consul_agent: ConsulAgent) -> None:
    """Pause hangs, resume answers; crash and restart keep the data; a restart without data has lost it."""
    key = f"{private_consul_agent.url}/v1/kv/proof"
    assert httpx.put(key, content=b"kept").is_success

    private_consul_agent.pause()
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(key, timeout=0.3)
    private_consul_agent.resume()
    assert httpx.get(f"{key}?raw").content == b"kept"

    private_consul_agent.kill()
    with pytest.raises(RuntimeError, match="not running"):
        _ = private_consul_agent.pid
    with pytest.raises(httpx.ConnectError):
        httpx.get(key)
    private_consul_agent.start()
    assert httpx.get(f"{key}?raw").content == b"kept"

    private_consul_agent.restart(keep_data=True)
    assert httpx.get(f"{key}?raw").content == b"kept"
    private_consul_agent.restart(keep_data=False)
    assert httpx.get(key).status_code == 404


def test_acl_denies_by_default(consul_binary: Path) -> None:
    """With acl, the anonymous may not write, the agent's token may; it reaches children and no repr."""
    with running_agent(acl=True, binary=consul_binary) as agent:
        key = f"{agent.url}/v1/kv/proof"
        assert httpx.put(key, content=b"").status_code == 403
        token = agent.env()["CONSUL_HTTP_TOKEN"]
        assert httpx.put(key, content=b"", headers={"X-Consul-Token": token}).is_success
        assert token not in repr(agent)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_nothing_stays_when_the_parent_is_ended(consul_binary: Path, tmp_path: Path, ending: signal.Signals) -> None:
    """After Ctrl-C or a kill -9 of its parent, the agent, its guard and its data are gone."""
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import pathlib, signal, sys\n"
            "from registry.testing.agent import running_agent\n"
            "with running_agent(binary=pathlib.Path(sys.argv[1])) as agent:\n"
            "    print(agent.pid, flush=True)\n"
            "    signal.pause()\n",
            str(consul_binary),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        start_new_session=True,
    )

    def is_left() -> list[str]:
        commands = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
        return [command for command in commands if str(tmp_path) in command]

    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        assert len(is_left()) == 2
        # The whole group, as the terminal does it for Ctrl-C.
        os.killpg(parent.pid, ending)
    wait_until(lambda: not is_left() and not list(tmp_path.iterdir()))
