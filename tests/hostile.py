"""Bounded attacks on an edge, and the callers that must not notice them."""

import asyncio
import json
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from tools.services import ROOT

HEAD = b"POST /api/publish HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"


@dataclass
class Attack:
    """What became of the connections of an attack: known when it is over."""

    opened: int = 0
    cut: dict[str, int] = field(default_factory=dict)
    """By the first line of the answer; empty for one that was refused or closed without any."""


@asynccontextmanager
async def slow_bodies(port: int, sources: Sequence[str], each: int) -> AsyncIterator[Attack]:
    """While the context lasts, each source holds so many connections that send a byte a second, and opens another one
    for each that is cut. In a process of its own: what it costs must not look like what the edge suffers."""
    command = [sys.executable, "-m", "tests.hostile", str(port), str(each), *sources]
    process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    attack = Attack()
    try:
        yield attack
    finally:
        said, _ = await process.communicate(b"")  # the end of its input ends it
        attack.opened, attack.cut = json.loads(said)


async def _attack(port: int, sources: Sequence[str], each: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    opened, cut = 0, Counter[str]()

    async def hold(source: str) -> None:
        nonlocal opened
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
                opened += 1
                answer = asyncio.create_task(reader.read(500))
                try:
                    writer.write(HEAD)
                    while not answer.done():
                        writer.write(b" ")
                        await asyncio.wait([answer], timeout=1)
                    cut[_first_line(answer)] += 1
                finally:
                    answer.cancel()
                    writer.transport.abort()
            except OSError:
                cut[""] += 1
            await asyncio.sleep(1)

    attackers = [asyncio.create_task(hold(source)) for source in sources for _ in range(each)]
    await asyncio.to_thread(sys.stdin.read)
    for task in attackers:
        task.cancel()
    await asyncio.gather(*attackers, return_exceptions=True)
    sys.stdout.write(json.dumps([opened, cut]))


def _first_line(answer: asyncio.Task[bytes]) -> str:
    try:
        return answer.result().partition(b"\r\n")[0].decode()
    except ConnectionError:
        return ""


async def failures(url: str, source: str, seconds: float) -> tuple[int, list[str]]:
    """How many GETs, each on a connection of its own, a caller there has made, and what failed of them."""
    calls, failed = 0, []
    end = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < end:
        calls += 1
        transport = httpx.AsyncHTTPTransport(local_address=source)
        try:
            async with httpx.AsyncClient(transport=transport, trust_env=False, timeout=4) as client:
                (await client.get(url)).raise_for_status()
        except httpx.HTTPError as error:
            failed.append(repr(error))
        await asyncio.sleep(0.05)
    return calls, failed


if __name__ == "__main__":
    asyncio.run(_attack(int(sys.argv[1]), sys.argv[3:], int(sys.argv[2])))
