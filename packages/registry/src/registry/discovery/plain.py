"""The shapes that nearly all requests and answers have, at a quarter of what h11 needs for them.

What is recognised here, h11 would write and read in the same way; all else is left to h11. test_plain holds both to it.
"""

import re
from collections.abc import Container, Mapping
from functools import lru_cache
from typing import NamedTuple

import h11
import httpx

__all__ = ["Answer", "names", "plain_answer", "plain_request"]

_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE"})
_VALUE = re.compile(rb"[!-~](?:[ -~]*[!-~])?")
_TARGET = re.compile(rb"[\x21-\x7e]+")
_HEAD = re.compile(
    rb"HTTP/1\.1 ([2-9][0-9]{2}) ([\x20-\x7e]*)\r\n"
    rb"((?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e]*\r\n)+)\r\n"
)
_FRAMING = frozenset({b"host", b"content-length", b"transfer-encoding", b"connection", b"upgrade"})
_NOT_PLAIN = frozenset({b"transfer-encoding", b"connection", b"upgrade"})
_WITHOUT_BODY = frozenset({b"204", b"304"})
_MOST = 65_536
_DIGITS = 20


class Answer(NamedTuple):
    """An answer's head, and its body if that came with it."""

    status: int
    reason: bytes
    headers: list[tuple[bytes, bytes]]
    version: bytes = b"1.1"
    body: bytes | None = None


def plain_request(request: httpx.Request, extra: Mapping[str, str]) -> bytes | None:
    """All bytes of a request whose body is in memory and fits its length; None: let h11 see to it.

    Raises: h11.LocalProtocolError for a header that is none.
    """
    headers, stream, target = request.headers.raw, request.stream, request.url.raw_path
    if request.method not in _METHODS or not isinstance(stream, httpx.ByteStream) or not _TARGET.fullmatch(target):
        return None
    if not headers or headers[0][0] not in {b"Host", b"host"}:
        return None
    body, length, replaced = b"".join(stream), None, names(extra)
    lines = [request.method.encode("ascii") + b" " + target + b" HTTP/1.1\r\n", _host(headers[0])]
    for pair in headers[1:]:
        line, name = _line(pair)
        if name in replaced:
            continue
        lines.append(line)
        if name == b"content-length" and length is None and pair[1] == b"%d" % len(body):
            length = len(body)
        elif name in _FRAMING and (name != b"connection" or pair[1] != b"keep-alive"):
            return None
    if body and length is None:
        return None
    lines += [_own_line(name, value.encode("ascii")) for name, value in extra.items()]
    return b"".join([*lines, b"\r\n", body])


@lru_cache(maxsize=256)
def _host(pair: tuple[bytes, bytes]) -> bytes:
    h11.Request(method=b"GET", target=b"/", headers=[pair])
    return b"%s: %s\r\n" % pair


@lru_cache(maxsize=2048)
def _line(pair: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """The header as it is sent, and its name in lower case."""
    name = pair[0].lower()
    if name not in _FRAMING:
        h11.Request(method=b"GET", target=b"/", headers=[(b"Host", b"any"), pair])
    return b"%s: %s\r\n" % pair, name


def _own_line(name: str, value: bytes) -> bytes:
    """A header whose value is another for each attempt; h11, which takes 15 µs, only sees what is not plainly right."""
    if _VALUE.fullmatch(value):
        return b"%s%s\r\n" % (_own_name(name), value)
    return _line((name.encode("ascii"), value))[0]


@lru_cache(maxsize=64)
def _own_name(name: str) -> bytes:
    return _line((name.encode("ascii"), b""))[0][:-2]


def names(extra: Mapping[str, str]) -> Container[bytes]:
    """In lower case: what an attempt says itself goes out in place of the caller's own."""
    return [_name(name) for name in extra]


@lru_cache(maxsize=64)
def _name(name: str) -> bytes:
    return name.lower().encode("ascii")


def plain_answer(received: bytes) -> Answer | bool:
    """An answer of a known length that is here whole. True: it may become one; False: let h11 read it."""
    head = _HEAD.match(received)
    if head is None:
        return False
    status, reason, lines = head.groups()
    headers, length = [], None
    for line in lines.split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        pair = name, value.strip(b" \t")
        headers.append(pair)
        name = name.lower()
        if name == b"content-length" and length is None and pair[1].isdigit() and len(pair[1]) <= _DIGITS:
            length = int(pair[1])
        elif name == b"content-length" or name in _NOT_PLAIN:
            return False
    if length is None or length > _MOST or status in _WITHOUT_BODY:
        return False
    body = received[head.end() :]
    if len(body) < length:
        return True
    return Answer(int(status), reason, headers, body=body) if len(body) == length else False
