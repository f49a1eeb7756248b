"""One request and its answer in HTTP/1.1's words: h11 decides, but for the shapes that need no decision.

h11 is what httpx itself speaks through, so that what is sent, what is read and what is refused are the same.
"""

from collections.abc import AsyncIterable, AsyncIterator, Mapping

import h11
import httpx

from registry.discovery.options import ConnectionOptions
from registry.discovery.plain import Answer, names, plain_answer, plain_request
from registry.errors import ResponseTooLargeError

__all__ = ["Exchange"]


class Exchange:
    """One request on its way and what has come of the answer; framing is decided before a connection is needed.

    Raises: httpx.LocalProtocolError for a head that is no HTTP, or a body that does not fit its Content-Length.
    """

    __slots__ = (
        "_answer",
        "_ended",
        "_extra",
        "_options",
        "_parser",
        "_received",
        "_request",
        "_whole",
        "body",
        "first",
        "timeouts",
    )

    def __init__(
        self, request: httpx.Request, extra: Mapping[str, str], options: ConnectionOptions, *, whole: bool
    ) -> None:
        """``whole``: the answer's head is of no use without its body."""
        self._whole = whole
        self.timeouts: Mapping[str, float | None] = request.extensions.get("timeout", {})
        self.body: AsyncIterable[bytes] | None = None
        """What is to be sent after ``first``, if it is not all."""
        self._request = request
        self._extra = extra
        self._options = options
        self._answer: Answer | None = None
        self._parser: h11.Connection | None = None
        self._received = b""
        self._ended = False
        try:
            self.first = plain_request(request, extra) or self._begin()
        except (h11.LocalProtocolError, UnicodeError) as error:
            raise httpx.LocalProtocolError(str(error), request=request) from error

    async def pieces(self) -> AsyncIterator[bytes]:
        """The rest of the request, framed and counted. Raises: httpx.LocalProtocolError; what its source raises."""
        assert self.body is not None
        assert self._parser is not None
        async for piece in self.body:
            if piece:
                yield self._framed_piece(h11.Data(data=piece))
        yield self._framed_piece(h11.EndOfMessage())

    def receive(self, data: bytes) -> None:
        """Bytes have come."""
        self._received += data

    def end(self) -> None:
        """No more will come."""
        self._ended = True

    @property
    def unread(self) -> int:
        """Bytes that have come and were not looked at."""
        return len(self._received)

    def head(self) -> Answer | None:
        """The answer's head; None: not yet. Raises: httpx.TransportError."""
        if self._parser is None:
            answer = plain_answer(self._received) if self._received else True
            if isinstance(answer, Answer):
                self._answer, self._received = answer, b""
                return self._checked(answer)
            if answer and not self._ended and (self._whole or not self._received):
                return None
        while (event := self._event()) is not None:
            if isinstance(event, h11.Response):
                return self._checked(
                    Answer(event.status_code, event.reason, event.headers.raw_items(), event.http_version)
                )
            if isinstance(event, h11.InformationalResponse) and event.status_code == 101:
                raise httpx.UnsupportedProtocol(
                    "the instance switched protocols (101), which this client does not speak: for a WebSocket, take an"
                    " address from ServiceRegistry.get_service_url and connect to it with a WebSocket client"
                )
        return None

    def data(self) -> bytes | None:
        """The next piece of the answer's body, undecoded: empty at its end; None: not yet. Raises: as ``head``."""
        if self._answer is not None:
            body, self._answer = self._answer.body or b"", self._answer._replace(body=None)
            return body
        event = self._event()
        if event is None:
            return None
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    @property
    def over(self) -> bool:
        """Whether both sides have said all, and neither wants the connection closed."""
        if self._ended or self._received:
            return False
        parser = self._parser
        if parser is None:
            return self._answer is not None
        return parser.our_state is h11.DONE and parser.their_state is h11.DONE and not parser.trailing_data[0]

    def _begin(self) -> bytes:
        """What h11 sends at once: the head, and the body if it is in memory."""
        request = self._request
        self._parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=self._options.max_header_size)
        whole = isinstance(request.stream, httpx.ByteStream)
        replaced = names(self._extra)
        headers = [pair for pair in _framed(request, whole) if pair[0].lower() not in replaced]
        headers += ((name.encode("ascii"), value.encode("ascii")) for name, value in self._extra.items())
        head = h11.Request(method=request.method.encode("ascii"), target=request.url.raw_path, headers=headers)
        first = self._parser.send(head) or b""
        if isinstance(request.stream, httpx.ByteStream):
            if body := b"".join(request.stream):
                first += self._parser.send(h11.Data(data=body)) or b""
            return first + (self._parser.send(h11.EndOfMessage()) or b"")
        assert isinstance(request.stream, AsyncIterable)
        self.body = request.stream
        return first

    def _framed_piece(self, event: h11.Data | h11.EndOfMessage) -> bytes:
        assert self._parser is not None
        try:
            return self._parser.send(event) or b""
        except h11.LocalProtocolError as error:
            raise httpx.LocalProtocolError(str(error)) from error

    def _event(self) -> h11.Event | type[h11.PAUSED] | None:
        if self._parser is None:
            self._begin()
        parser = self._parser
        assert parser is not None
        if self._received:
            parser.receive_data(self._received)
            self._received = b""
        try:
            event = parser.next_event()
            if event is h11.NEED_DATA and self._ended:
                if parser.their_state is h11.SEND_RESPONSE and not parser.trailing_data[0]:
                    raise httpx.RemoteProtocolError("Server disconnected without sending a response.")
                parser.receive_data(b"")
                event = parser.next_event()
        except h11.RemoteProtocolError as error:
            if error.error_status_hint == 431:
                raise self._too_large() from error
            raise httpx.RemoteProtocolError(str(error)) from error
        return None if event is h11.NEED_DATA else event  # type: ignore[return-value]

    def _checked(self, answer: Answer) -> Answer:
        headers, options = answer.headers, self._options
        if len(headers) > options.max_headers:
            raise ResponseTooLargeError(f"the answer has {len(headers)} headers", "max_headers", options.max_headers)
        if sum(len(name) + len(value) + 4 for name, value in headers) > options.max_header_size:
            raise self._too_large()
        return answer

    def _too_large(self) -> ResponseTooLargeError:
        limit = self._options.max_header_size
        return ResponseTooLargeError(f"the answer's head has more than {limit} bytes", "max_header_size", limit)


def _framed(request: httpx.Request, whole: bool) -> list[tuple[bytes, bytes]]:
    """The headers, without what a caller says of a framing that is ours: bodies are not both counted and chunked.

    RFC 9112, 6.2: "A sender MUST NOT send a Content-Length header field in any message that contains a
    Transfer-Encoding header field." A server that believes the other one reads a second request out of the body.
    """
    headers = request.headers.raw
    if request.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return headers
    unwanted = b"transfer-encoding" if whole else b"content-length"
    framed = [pair for pair in headers if pair[0].lower() != unwanted]
    if whole and request.method in {"POST", "PUT", "PATCH"} and "Content-Length" not in request.headers:
        framed.append((b"Content-Length", b"0"))
    return framed
