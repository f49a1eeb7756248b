"""The order in which backup, restore and upgrade do things, and when they refuse: told by a stack that only notes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest

from deploy.compose import stack as stacks
from deploy.compose.locked.backup import save
from deploy.compose.locked.restore import restore
from deploy.compose.locked.roll import roll
from deploy.compose.stack import Container, Stack, StackError

PEERS = """\
Node      ID  Address            State     Voter
consul-1  a   10.0.0.11:8300     follower  true
consul-2  b   10.0.0.12:8300     leader    true
consul-3  c   10.0.0.13:8300     follower  true
"""


@dataclass
class Notes(Stack):
    """Does nothing, and notes what it was asked to do."""

    peers: str = PEERS
    state: str = "running"
    failing: str = ""
    done: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.command = ["compose"]

    def compose(self, *arguments: str) -> None:
        self.done.append(" ".join(arguments))

    def ask(self, *arguments: str) -> str:
        self.done.append(" ".join(arguments[-2:]))
        return self.peers

    def job(self, name: str, *, stdin: IO[bytes] | None = None, stdout: IO[bytes] | None = None) -> None:
        self.done.append(f"job {name}")
        if name == self.failing:
            raise StackError(name)
        if stdout:
            stdout.write(b"archive")

    def containers(self) -> list[Container]:
        names = ("consul-1", "consul-2", "consul-3", "consul")
        return [Container(name, name, name, "1", self.state, "healthy", "") for name in names]

    def volumes(self) -> list[str]:
        return []


def test_the_leader_is_replaced_last() -> None:
    """Followers first; the leader hands over before its turn; after each, three healthy servers must vote."""
    stack = Notes()
    roll(stack, lambda _: None)
    assert stack.done == [
        *("job whole", "raft list-peers"),
        *("up -d --no-deps consul-1", "job whole"),
        *("up -d --no-deps consul-3", "job whole"),
        *("raft transfer-leader", "up -d --no-deps consul-2", "job whole"),
        "up -d --no-deps consul",
    ]


def test_a_roll_stops_where_something_is_wrong() -> None:
    """Nothing is replaced while not all servers vote, or when nobody leads."""
    for stack in (Notes(failing="whole"), Notes(peers="")):
        with pytest.raises(StackError):
            roll(stack, lambda _: None)
        assert not [each for each in stack.done if each.startswith("up")]


def test_a_backup_replaces_no_file(tmp_path: Path) -> None:
    """It is for its owner alone, takes the place of no file, and leaves none behind that is not whole."""
    file = tmp_path / "backup"
    save(Notes(), file)
    assert (file.read_bytes(), file.stat().st_mode & 0o777) == (b"archive", 0o600)
    with pytest.raises(FileExistsError):
        save(Notes(), file)
    with pytest.raises(StackError):
        save(Notes(failing="save"), tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["backup"]


def test_a_running_system_is_not_restored(tmp_path: Path) -> None:
    """It refuses before it touches anything; else secrets come before the servers, and the snapshot after them."""
    file = tmp_path / "backup"
    file.write_bytes(b"archive")
    running = Notes()
    with pytest.raises(StackError, match="nox -s down"):
        restore(running, file)
    assert running.done == []
    stopped = Notes(state="exited")
    restore(stopped, file)
    assert stopped.done == [
        *("down --remove-orphans", "build keeper", "job restore-vault"),
        *("up -d consul", "job restore-consul", "restart consul", "up -d"),
    ]


@pytest.mark.parametrize(
    ("state", "code", "policy", "expected"),
    [
        ("exited", 0, "no", "done"),
        ("exited", 0, "", "done"),
        ("exited", 1, "no", "exited"),
        ("exited", 0, "unless-stopped", "exited"),
        ("running", 0, "no", "running"),
    ],
)
def test_a_job_that_ended_well_is_done(state: str, code: int, policy: str, expected: str) -> None:
    """What ends and is not started again is no failure, unless it failed."""
    found: dict[str, Any] = {
        "Id": "x",
        "Name": "/keeper_1",
        "Config": {"Labels": {"com.docker.compose.service": "keeper", "com.docker.compose.container-number": "1"}},
        "NetworkSettings": {"Networks": {}},
        "HostConfig": {"RestartPolicy": {"Name": policy}},
        "State": {"Status": state, "ExitCode": code},
    }
    assert stacks._container(found).state == expected
