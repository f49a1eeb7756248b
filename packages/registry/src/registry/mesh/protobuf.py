"""So much of protobuf as two messages of Consul's need: strings, by their number, within messages.

Source: https://protobuf.dev/programming-guides/encoding/
"""

__all__ = ["chunks", "encode"]

_VARINT, _FIXED64, _CHUNK, _FIXED32 = 0, 1, 2, 5


def encode(number: int, value: str) -> bytes:
    """A message with that one string."""
    content = value.encode()
    return _varint(number << 3 | _CHUNK) + _varint(len(content)) + content


def chunks(message: bytes, number: int) -> list[bytes]:
    """All strings and messages that stand by that number, in order. Raises: ValueError, if this is no message."""
    found, at = [], 0
    try:
        while at < len(message):
            key, at = _read_varint(message, at)
            kind = key & 7
            if kind == _CHUNK:
                length, at = _read_varint(message, at)
                if at + length > len(message):
                    raise IndexError
                if key >> 3 == number:
                    found.append(message[at : at + length])
                at += length
            elif kind == _VARINT:
                _, at = _read_varint(message, at)
            elif kind in {_FIXED64, _FIXED32}:
                at += 8 if kind == _FIXED64 else 4
            else:
                raise ValueError(f"a field of kind {kind} at {at} in a message of {len(message)} bytes")
    except IndexError:
        raise ValueError(f"a message of {len(message)} bytes breaks off") from None
    return found


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        shift, at = shift + 7, at + 1
        if byte < 128:
            return value, at
