"""One server of Consul after another gets the image that Compose would start now: followers first, the leader last."""

import time
from collections.abc import Callable

from deploy.compose.stack import Stack, StackError
from deploy.keeper.grants import SERVERS

__all__ = ["leader_of", "roll", "wait_until_healthy"]

_SECONDS = 90.0
_PAUSE = 0.5


def roll(stack: Stack, say: Callable[[str], object]) -> None:
    """Returns when every server and the agent run on it; what does already, stays. Blocks. Raises: StackError."""
    stack.job("whole")
    leader = leader_of(stack)
    for server in (*(each for each in SERVERS if each != leader), leader):
        if server == leader:
            say(f"{leader} leads: another one takes over")
            stack.ask("exec", "-T", leader, "consul", "operator", "raft", "transfer-leader")
        say(f"{server}: replaced, waiting until {len(SERVERS)} healthy servers vote")
        _replace(stack, server)
        stack.job("whole")
    say("the agent where the services are")
    _replace(stack, "consul")


def leader_of(stack: Stack) -> str:
    """The server that leads. Raises: StackError."""
    peers = stack.ask("exec", "-T", SERVERS[0], "consul", "operator", "raft", "list-peers")
    leaders = [line.split()[0] for line in peers.splitlines() if "leader" in line.split()]
    if len(leaders) != 1:
        raise StackError(f"Consul names no leader:\n{peers}")
    return leaders[0]


def wait_until_healthy(stack: Stack, service: str) -> None:
    """Returns when the engine's check finds it healthy. Raises: StackError."""
    deadline = time.monotonic() + _SECONDS
    while not all(each.health == "healthy" for each in stack.containers() if each.service == service):
        if time.monotonic() > deadline:
            raise StackError(f"{service} is not healthy after {_SECONDS:.0f} s: the roll stops here. Look at its log.")
        time.sleep(_PAUSE)


def _replace(stack: Stack, service: str) -> None:
    stack.compose("up", "-d", "--no-deps", service)
    wait_until_healthy(stack, service)
