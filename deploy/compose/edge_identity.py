"""The edge's certificate of the mesh: signed by a Consul server, renewed in time, and given to HAProxy while it runs.

It runs beside HAProxy, in the image of a service, and shares the folder ``EDGE_MESH`` with it: ``edge.pem`` (the
certificate and its key), ``ca.pem`` (the authorities of the mesh) and HAProxy's runtime socket. Where Consul is, and
where certificates come from, says the environment, as for a service.
"""

import asyncio
import logging
import os
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path

from registry.mesh.identity import MeshIdentity, choose_source
from registry.mesh.source import IdentitySource, Leaf, Roots

__all__ = ["keep"]

NAME = "edge"
"""What the edge is called in the mesh: intentions name it so."""
CERTIFICATE, AUTHORITIES, SOCKET = "edge.pem", "ca.pem", "haproxy.sock"
PAUSE = 1.0
"""Seconds until HAProxy is asked again, which may be starting."""

logger = logging.getLogger("edge")


class Noted:
    """A source, and what it told last: once MeshIdentity has accepted it."""

    def __init__(self, source: IdentitySource) -> None:
        self._source = source
        self._leaf: Leaf | None = None
        self._roots: Roots | None = None
        self.changed = asyncio.Event()

    async def leaves(self, service: str) -> AsyncGenerator[Leaf, None]:
        """As the source has them."""
        async with aclosing(self._source.leaves(service)) as told:
            async for leaf in told:
                yield leaf
                self._leaf = leaf
                self.changed.set()

    async def roots(self) -> AsyncGenerator[Roots, None]:
        """As the source has them."""
        async with aclosing(self._source.roots()) as told:
            async for roots in told:
                yield roots
                self._roots = roots
                self.changed.set()

    async def aclose(self) -> None:
        """Closes the source."""
        await self._source.aclose()

    def files(self) -> Mapping[str, str]:
        """Name → content; nothing as long as something is missing."""
        if self._leaf is None or self._roots is None:
            return {}
        roots, leaf = self._roots.certificates, self._leaf
        return {AUTHORITIES: _lines(*roots), CERTIFICATE: _lines(leaf.certificate, leaf.key)}


class HaproxyError(Exception):
    """HAProxy did not take what it was given; the message has its words, and no key."""


async def keep(folder: Path, source: IdentitySource | None = None) -> None:
    """Keeps the files fresh, and HAProxy with them, until it is cancelled. ``source``: by default the environment's."""
    noted = Noted(source or choose_source())
    async with MeshIdentity(NAME, noted):
        while True:
            await noted.changed.wait()
            noted.changed.clear()
            if files := noted.files():
                # First the files: a HAProxy that starts meanwhile has the newest.
                for name, content in files.items():
                    _write(folder / name, content)
                await _hand_over(folder, files[CERTIFICATE], noted.changed)


async def _hand_over(folder: Path, certificate: str, changed: asyncio.Event) -> None:
    """Returns when HAProxy has it, or when there is a newer one.

    It gets no new authority: HAProxy 3.0.11 dies of that, after a certificate (haproxy/haproxy#3165). It need not: the
    authority before has signed for the new one, and who shows a certificate shows that, too.
    """
    path, said = folder / CERTIFICATE, ""
    while not changed.is_set():
        try:
            # An empty line ends what is given.
            await _ask(folder, f"set ssl cert {path} <<\n{certificate}\n", r"transaction (created|updated)")
            await _ask(folder, f"commit ssl cert {path}\n", "success!")
        except (OSError, HaproxyError) as error:
            if str(error) != said:
                logger.info("HAProxy did not take the new certificate; this is tried again: %s", error)
            said = str(error)
            await asyncio.sleep(PAUSE)
        else:
            logger.info("HAProxy uses the new certificate from its next connection on")
            return


async def _ask(folder: Path, command: str, good: str) -> None:
    """Source: https://docs.haproxy.org/3.0/management.html#9.3."""
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_unix_connection(folder / SOCKET)
        try:
            writer.write(command.encode())
            answer = (await reader.read()).decode(errors="replace").strip()
        finally:
            writer.close()
    if not re.search(good, answer, re.IGNORECASE):
        raise HaproxyError(f"{command.partition('<<')[0].strip()}: {answer[:500]}")


def _lines(*texts: str) -> str:
    """One after another, without an empty line."""
    return "".join(f"{line}\n" for text in texts for line in text.splitlines() if line.strip())


def _write(path: Path, content: str) -> None:
    """In place of the one that is there, in one step; readable by this user alone."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "w") as file:
        file.write(content)
    new.replace(path)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    asyncio.run(keep(Path(os.environ["EDGE_MESH"])))
