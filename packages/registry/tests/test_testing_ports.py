"""Ports for tests that run beside each other."""

import subprocess
import sys

import pytest

from registry.testing.ports import free_ports

pytestmark = pytest.mark.real


def another_may_have(port: int) -> bool:
    """Whether another process, which ends at once, is given the port."""
    ask = f"from registry.testing import ports; print(ports._reserve({port}))"
    return subprocess.check_output([sys.executable, "-c", ask], text=True) == "True\n"


def test_a_port_is_nobody_elses_while_its_process_lives() -> None:
    """Nobody listens there, as while an agent is down; another process still isn't given it, and is once this ends."""
    [port] = free_ports(1)
    assert not another_may_have(port)
    reserve = "from registry.testing.ports import free_ports; print(free_ports(1)[0])"
    theirs = int(subprocess.check_output([sys.executable, "-c", reserve], text=True))
    assert another_may_have(theirs)


def test_the_ports_are_different() -> None:
    """All at once, and beside what another process is given at the same time."""
    with subprocess.Popen(
        [sys.executable, "-c", "from registry.testing.ports import free_ports; print(free_ports(300)); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        theirs = {int(port) for port in process.stdout.readline().strip("[]\n").split(",")}
        ours = free_ports(300)
        process.communicate("\n")
    assert len(theirs) == len(set(ours)) == 300
    assert theirs.isdisjoint(ours)
