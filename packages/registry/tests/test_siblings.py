"""The last process of an instance knows that it is the last: real files, real locks, real processes."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.presence.siblings import Siblings

JOINED = """
import asyncio, time
from registry.presence.siblings import Siblings
siblings = Siblings()
asyncio.run(siblings.join("cards-1"))
print("joined", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory of the test's own, for its processes too."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def sibling() -> Iterator[subprocess.Popen[str]]:
    """Another process that serves cards-1."""
    with subprocess.Popen([sys.executable, "-c", JOINED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "joined\n"
        yield process
        process.kill()


async def joined(instance_id: str = "cards-1") -> Siblings:
    """One more process of an instance; locks of one process exclude each other like those of several."""
    siblings = Siblings()
    await asyncio.wait_for(siblings.join(instance_id), 5)
    return siblings


async def test_the_last_to_leave_knows_it_and_leaves_no_file(folder: Path) -> None:
    """Of three, two see that others serve on, and the third one that nobody does; another instance is nobody's."""
    one, two, three, stranger = await joined(), await joined(), await joined(), await joined("cards-2")
    assert [one.leave(), two.leave(), three.leave(), three.taken_out] == [False, False, True, False]
    three.close()
    assert (one.leave(), one.taken_out) == (True, True)
    one.close()
    two.close()
    assert stranger.leave()
    stranger.close()
    assert os.listdir(folder) == []  # noqa: PTH208  # pathlib's counts as blocking here


async def test_a_newcomer_is_not_overtaken() -> None:
    """Who joins while the last one is taking the instance out waits for that; the one that left before stays out."""
    one, two = await joined(), await joined()
    assert not one.leave()
    assert two.leave()
    newcomer = asyncio.create_task(joined())
    await asyncio.sleep(0.1)
    assert not newcomer.done()
    two.close()
    three = await newcomer
    assert (one.leave(), one.taken_out) == (True, True)
    one.close()
    assert (three.leave(), three.taken_out) == (True, False)
    three.close()


@pytest.mark.real
async def test_a_killed_process_holds_nobody_up(sibling: subprocess.Popen[str]) -> None:
    """While another process lives it counts; once it is killed, it does not."""
    one = await joined()
    assert not one.leave()
    sibling.send_signal(signal.SIGKILL)
    sibling.wait()
    assert one.leave()
    one.close()


@pytest.mark.parametrize("spoil", ["open to others", "a link", "no folder"])
async def test_a_lock_that_others_could_hold_is_not_trusted(
    folder: Path, spoil: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There, and where no file can be written, each process takes itself for the last; it is told, nothing fails."""
    caplog.set_level("INFO", "registry")
    first = await joined()
    (lock,) = [entry.path for entry in os.scandir(folder)]
    first.close()
    if spoil == "open to others":
        os.chmod(lock, 0o666)  # noqa: PTH101  # pathlib's counts as blocking here
    elif spoil == "a link":
        os.replace(lock, f"{lock}.target")  # noqa: PTH105
        os.symlink(f"{lock}.target", lock)  # noqa: PTH211
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(folder / "missing"))
    one, two = await joined(), await joined()
    assert (one.leave(), two.leave(), one.taken_out) == (True, True, False)
    assert ["no lock below" in record.message for record in caplog.records] == [True, True]
