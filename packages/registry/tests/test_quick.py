import os
import subprocess
import sys

import pytest


def test_an_unmarked_test_starts_no_process() -> None:
    """What `nox -s quick` runs stays quick: whoever starts a process there is told which mark is missing."""
    with pytest.raises(RuntimeError, match=r"test_an_unmarked_test_starts_no_process starts a process: .*mark\.real"):
        subprocess.run([sys.executable, "-c", ""], check=True)
    with pytest.raises(RuntimeError, match="starts a process"):
        os.fork()


@pytest.mark.real
def test_a_marked_one_does() -> None:
    """The marker takes effect."""
    subprocess.run([sys.executable, "-c", ""], check=True)
