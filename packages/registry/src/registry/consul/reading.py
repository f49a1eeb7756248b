"""Reads an answer about a service's instances while it comes in, in steps that hold the event loop for a moment each.

A service of 10,000 instances is 15 MB, sent anew at every change: to decode that in one go takes a fifth of a second.
"""

import re
from collections.abc import Mapping
from hashlib import blake2b

import msgspec

from registry.consul.entries import Known, broken_entry, read_entry
from registry.consul.health import Listing

__all__ = ["Reader", "parse_listing"]

_OPENING = re.compile(rb'\s*\[\s*(\{\s*"[^"\\]*"\s*:\s*\{)')
_LONGEST_OPENING = 4_096
_RAWS = msgspec.json.Decoder(list[msgspec.Raw])


class Reader:
    """One answer, fed piece by piece. Entries that are byte for byte among the ``known`` are not built again.

    It is cut where an entry begins as the first one did, with ``{"Node":{`` say. No string of JSON can hold that, for
    its quotes; and where it is within an entry, what was cut off is no JSON: then the rest is decoded in one go.
    """

    def __init__(self, known: Mapping[bytes, Known] | None = None, *, mesh: bool = False) -> None:
        self._before = known or {}
        self._mesh = mesh
        self._mark: bytes | None = None
        """How an entry begins; None: not known yet."""
        self._rest = b""
        """What came after the last beginning."""
        self._uncut: list[bytes] | None = None
        """What can't be cut into entries; None: it can."""
        self._entries: list[Known] = []
        self.known: dict[bytes, Known] = {}
        """Digest of an entry → what it says."""

    def feed(self, piece: bytes) -> None:
        """The next bytes of the answer."""
        if self._uncut is not None:
            self._uncut.append(piece)
            return
        self._rest += piece
        if self._mark is None:
            opening = _OPENING.match(self._rest)
            if opening is None:
                if len(self._rest) > _LONGEST_OPENING:
                    self._uncut = [self._rest]
                return
            self._mark, self._rest = opening[1], self._rest[opening.end() :]
        *parts, self._rest = self._rest.split(self._mark)
        for number, part in enumerate(parts):
            if not self._take(part, b","):
                self._uncut = [b"[", self._mark.join((b"", *parts[number:], self._rest))]
                return

    def listing(self) -> Listing:
        """What it says, now that all of it is there.

        Raises: TypeError, when this is no list, or not one entry looks like Consul's.
        """
        if self._mark is None:
            self._uncut = self._uncut or [self._rest]
        elif self._uncut is None and not self._take(self._rest, b"]"):
            self._uncut = [b"[", self._mark, self._rest]
        if self._uncut is not None:
            whole = b"".join(self._uncut)
            try:
                raws = _RAWS.decode(whole)
            except msgspec.DecodeError as error:
                raise TypeError(f"not a list: {whole[:100].decode(errors='replace')} ({error})") from error
            for raw in raws:
                self._read(bytes(raw))
        return Listing.of(self._entries)

    def _take(self, part: bytes, end: bytes) -> bool:
        """Reads what follows the mark, up to this end; whether it is an entry."""
        raw = part.rstrip()
        if not raw.endswith(end):
            return False
        raw = raw[:-1]
        digest = blake2b(raw, digest_size=16).digest()
        known = self._before.get(digest)
        if known is None:
            assert self._mark is not None
            try:
                known = read_entry(self._mark + raw, mesh=self._mesh)
            except (msgspec.DecodeError, UnicodeDecodeError):
                return False
        self.known[digest] = known
        self._entries.append(known)
        return True

    def _read(self, raw: bytes) -> None:
        try:
            self._entries.append(read_entry(raw, mesh=self._mesh))
        except (msgspec.DecodeError, UnicodeDecodeError):
            self._entries.append(broken_entry(raw))


def parse_listing(body: bytes, *, mesh: bool = False) -> Listing:
    """A whole answer. ``mesh`` and errors: as ``Reader`` has them."""
    reader = Reader(mesh=mesh)
    reader.feed(body)
    return reader.listing()
