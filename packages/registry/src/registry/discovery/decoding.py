"""The body of an answer, unpacked bit by bit: never more in memory than allowed, never long without a pause."""

import asyncio
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator

import httpx

from registry.errors import ResponseTooLargeError

__all__ = ["unpacked"]

_PIECE = 65_536
"""Bytes that are unpacked at a time."""
_SLICES = {"br": 16, "zstd": 256}
"""Bytes given at a time to a decoder whose output can't be limited: the most they stand for is some 10 MB."""
_LAYERS = 4


async def unpacked(response: httpx.Response, packed: bytes, limit: int) -> bytes:
    """The content of the answer, as ``response.read()`` gives it; yields to the event loop on the way.

    Raises: httpx.DecodingError for what is not what it says, or is cut off; ResponseTooLargeError above ``limit``.
    """
    content, size = bytearray(), 0
    async for piece in _pausing(_decoded(response, packed)):
        size += len(piece)
        if size > limit:
            raise ResponseTooLargeError("the answer's body, unpacked,", "max_response_size", limit)
        content += piece
    return bytes(content)


async def _pausing(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    for count, piece in enumerate(pieces, start=1):
        if count % 16 == 0:
            await asyncio.sleep(0)
        yield piece


def _decoded(response: httpx.Response, packed: bytes) -> Iterator[bytes]:
    codings = [coding.strip().lower() for coding in response.headers.get_list("content-encoding", split_commas=True)]
    if len(codings) > _LAYERS:
        raise httpx.DecodingError(f"the answer is packed {len(codings)} times over")
    pieces: Iterator[bytes] = (packed[at : at + _PIECE] for at in range(0, len(packed), _PIECE))
    for coding in reversed(codings):
        if coding in {"gzip", "deflate"}:
            pieces = _inflated(pieces, coding)
        elif coding in _SLICES:
            pieces = _foreign(pieces, coding)
    return pieces


def _inflated(pieces: Iterator[bytes], coding: str) -> Iterator[bytes]:
    decoder, begun = zlib.decompressobj(zlib.MAX_WBITS | 16 if coding == "gzip" else zlib.MAX_WBITS), False
    for piece in pieces:
        rest, output = piece, b"more may follow"
        if decoder.eof:
            yield b""  # What follows the end is nothing, and may be long: the event loop gets its turns.
        while (rest or output) and not decoder.eof:
            try:
                output = decoder.decompress(rest, _PIECE)
            except zlib.error as error:
                if coding == "gzip" or begun:
                    raise httpx.DecodingError(str(error)) from error
                # RFC 9110, 8.4.1.2: "Some non-conformant implementations send the "deflate" compressed data without
                # the zlib wrapper."
                decoder, begun = zlib.decompressobj(-zlib.MAX_WBITS), True
                continue
            begun, rest = True, decoder.unconsumed_tail
            yield output
    if begun and not decoder.eof:
        raise httpx.DecodingError(f"the answer's {coding} is cut off")


def _foreign(pieces: Iterator[bytes], coding: str) -> Iterator[bytes]:
    """Brotli and zstandard, where httpx finds their libraries; else it stays as it is."""
    decoding = httpx.Response(200, headers={"Content-Encoding": coding})
    decoder = decoding._get_content_decoder()  # noqa: SLF001  # no public way takes less than a whole body
    size = _SLICES[coding]
    for piece in pieces:
        for at in range(0, len(piece), size):
            yield from _as_pieces(decoder.decode(piece[at : at + size]))
    yield from _as_pieces(decoder.flush())


def _as_pieces(decoded: bytes | Iterator[bytes]) -> Iterable[bytes]:
    """httpx's decoders give bytes, httpx2's an iterator."""
    return [decoded] if isinstance(decoded, bytes) else decoded
