"""Checks of everything that ends up in a URL or in Consul, made before anything is sent.

A service name becomes a host and a path becomes the rest of a URL: whoever controls one of them must not be able to
choose another host.
"""

import ipaddress
import math
import re
from collections.abc import Mapping
from typing import TypeGuard
from urllib.parse import unquote

from registry.errors import InvalidInputError

__all__ = [
    "MAX_META",
    "check_address",
    "check_datacenter",
    "check_duration",
    "check_headers",
    "check_id",
    "check_known_service",
    "check_meta",
    "check_path",
    "check_port",
    "check_rates",
    "check_service",
    "check_tag",
    "check_zone",
    "is_zone",
]

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.IGNORECASE | re.ASCII)
# What resolvers take: RFC 1123's names, with the underscores of Compose and Swarm, and the root's dot at the end.
_HOST_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"(?=.{{1,254}}\Z){_HOST_LABEL}(\.{_HOST_LABEL})*\.?", re.IGNORECASE | re.ASCII)
_HEADER = re.compile(r"[!#$%&'*+.^_`|~A-Za-z0-9-]{1,128}", re.ASCII)
_TOKEN = re.compile(r"[A-Za-z0-9._:+=@-]{1,253}", re.ASCII)
_META_KEY = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
_DURATION = re.compile(r"(\d{1,9}(\.\d{1,9})?(ms|s|m|h))+", re.ASCII)
_ZONE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", re.ASCII)
_DATACENTER = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_NUMBER = re.compile(r"\d{1,9}(\.\d{1,9})?", re.ASCII)
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
_MAX_PATH = 20_000
MAX_META = 64
"""Pairs of metadata that Consul takes for one instance."""
_UNSAFE_IN_PATH = re.compile(r"[\x00-\x20\x7f\\#]")


def check_service(name: str) -> str:
    """The name, if it is an RFC 1123 label: letters, digits and inner hyphens, at most 63.

    Raises: InvalidInputError.
    Source: https://www.rfc-editor.org/rfc/rfc1123#section-2.1
    """
    # HTTP clients decode names that begin with "xn--", and fail on those that are no IDNA.
    if not isinstance(name, str) or not _LABEL.fullmatch(name) or name.lower().startswith("xn--"):
        raise InvalidInputError(
            f"{name!r} is not a service name: use letters, digits and inner hyphens, at most 63, such as 'backend-api'"
        )
    return name


def check_known_service(name: str) -> str:
    """The name, if Consul could have a service by it: whatever others call theirs, from 1 to 512 printable characters.

    For reading; a name of one's own is held to ``check_service``. It may hold dots, slashes, spaces, ``?``, ``#`` and
    ``%``, so put it into a path as ``quote(name, safe="")``, where it then is one segment that leads nowhere else, and
    never into a URL's host. Consul ignores case: compare names in lower case.

    Raises: InvalidInputError.
    """
    if not isinstance(name, str) or not 1 <= len(name) <= 512 or not name.isprintable():
        raise InvalidInputError(f"{str(name)[:50]!r} is not a service name: use 1 to 512 printable characters")
    # Proxies, and clients, resolve these: some decode a path before they do.
    if not {".", ".."}.isdisjoint(name.split("/")):
        raise InvalidInputError(f"{name[:50]!r} is not a service name: it holds a '.' or '..' segment")
    return name


def check_id(service_id: str) -> str:
    """The id, if it is safe in a URL: letters, digits and ``. _ : + = @ -``, at most 253. Raises: InvalidInputError."""
    if not isinstance(service_id, str) or not _TOKEN.fullmatch(service_id) or service_id in {".", ".."}:
        raise InvalidInputError(
            f"{service_id!r} is not a service id: use letters, digits and . _ : + = @ -, at most 253 of them"
        )
    return service_id


def check_tag(tag: str) -> str:
    """The tag, if it is printable text, at most 4,096 characters; other tools read commas and spaces in it.

    Raises: InvalidInputError.
    """
    if not isinstance(tag, str) or not 1 <= len(tag) <= 4096 or not tag.isprintable():
        raise InvalidInputError(f"{tag!r} is not a tag: use printable text, at most 4,096 characters")
    return tag


def check_meta(meta: dict[str, str]) -> dict[str, str]:
    """The metadata, if Consul takes it: 64 pairs, keys of 128 characters, values of 512. Raises: InvalidInputError.

    Source: https://developer.hashicorp.com/consul/api-docs/agent/service#meta
    """
    if len(meta) > MAX_META:
        raise InvalidInputError(f"metadata has {len(meta)} pairs: Consul takes at most {MAX_META}")
    for key, value in meta.items():
        if not isinstance(key, str) or not _META_KEY.fullmatch(key):
            raise InvalidInputError(f"metadata key {key!r}: use letters, digits, - and _, at most 128 of them")
        if key.lower().startswith("consul-"):
            raise InvalidInputError(f"metadata key {key!r}: Consul keeps the prefix 'consul-' for itself")
        if not isinstance(value, str) or not _is_text(value) or len(value.encode()) > 512:
            raise InvalidInputError(f"metadata value of {key!r}: pass a string of at most 512 bytes")
    return meta


def is_zone(zone: object) -> TypeGuard[str]:
    """Whether it can name a zone: what Kubernetes takes as the value of a label.

    Source: https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#syntax-and-character-set
    """
    return isinstance(zone, str) and _ZONE.fullmatch(zone) is not None


def check_zone(zone: str) -> str:
    """The name of a zone. Raises: InvalidInputError."""
    if not is_zone(zone):
        raise InvalidInputError(f"{zone!r} is not a zone: use letters, digits, '-', '_' and '.', at most 63 of them")
    return zone


def check_datacenter(name: str) -> str:
    """The name of a datacenter, in lower case as Consul has it. Raises: InvalidInputError."""
    if not isinstance(name, str) or not _DATACENTER.fullmatch(name):
        raise InvalidInputError(f"{name!r} is not a datacenter: use letters, digits, '-' and '_', such as 'dc1'")
    return name.lower()


def check_headers(headers: dict[str, str]) -> dict[str, str]:
    """The headers, if HTTP takes them; the message shows no value. Raises: InvalidInputError.

    Source: https://www.rfc-editor.org/rfc/rfc9110#section-5.5
    """
    for name, value in headers.items():
        if not isinstance(name, str) or not _HEADER.fullmatch(name):
            raise InvalidInputError(f"{name!r} is not the name of a header, such as 'Authorization'")
        if not isinstance(value, str) or not value.isascii() or not value.isprintable() or value != value.strip():
            raise InvalidInputError(f"the header {name!r} holds line breaks or other characters that no header has")
    return headers


def check_port(port: int) -> int:
    """The port, if it is an int from 1 to 65535. Raises: InvalidInputError."""
    if not isinstance(port, int) or isinstance(port, bool) or not 1 <= port <= 65535:
        raise InvalidInputError(f"{port!r} is not a port: pass a whole number from 1 to 65535")
    return port


def check_rates(rates: object) -> dict[str, float]:
    """Service → how many a second: a mapping, or text such as ``orchestrator-api=100,research-api=0.5``.

    Raises: InvalidInputError, unless every name is a service name and every rate a number above 0.
    """
    pairs = rates.items() if isinstance(rates, Mapping) else [_pair(part) for part in str(rates).split(",") if part]
    found = {}
    for name, rate in pairs:
        number = float(rate) if isinstance(rate, (int, float)) or _NUMBER.fullmatch(str(rate)) else 0.0
        if not 0 < number < math.inf:
            raise InvalidInputError(f"{rate!r} is not a rate for {name!r}: pass a number above 0, requests per second")
        found[check_service(name)] = number
    return found


def _pair(text: str) -> tuple[str, str]:
    name, _, rate = text.partition("=")
    return name.strip(), rate.strip()


def check_address(address: str) -> str:
    """The address, if other machines could connect to it: an IP address or a host name. Raises: InvalidInputError."""
    try:
        # Only from text: to ipaddress a number is an address too. And without a scope, which may hold any character.
        parsed = ipaddress.ip_address(address if isinstance(address, str) and "%" not in address else "")
    except ValueError:
        # RFC 1123, 2.1: "the highest-level component label will be alphabetic", or '127.1' and '0' would be hosts.
        if (
            not isinstance(address, str)
            or not _HOST.fullmatch(address)
            or address.rstrip(".").rpartition(".")[2].isdigit()
        ):
            raise InvalidInputError(
                f"{address!r} is not an address: pass an IP address or a host name, without scheme, port or path"
            ) from None
    else:
        if parsed.is_unspecified:
            raise InvalidInputError(
                f"{address!r} is where a server listens, not where it is reached: pass an address callers can use"
            )
    return address


def check_path(path: str) -> str:
    """The path, if it can't lead away from the service: one leading ``/``, maybe a query. Raises: InvalidInputError."""
    if not isinstance(path, str) or not path.startswith("/") or path.startswith("//"):
        raise InvalidInputError(f"{path!r} is not a path: start it with exactly one '/'; the service name is the host")
    if _UNSAFE_IN_PATH.search(path):
        raise InvalidInputError(f"{path!r} holds a space, control character, backslash or '#': percent-encode it")
    if not _is_text(path) or len(path.encode()) > _MAX_PATH:
        raise InvalidInputError(f"{path[:50]!r}… is not a path: use valid Unicode, at most {_MAX_PATH} bytes")
    # Decoded, because what answers there may decode before it resolves the segments.
    if ".." in unquote(path.partition("?")[0]).split("/"):
        raise InvalidInputError(f"{path!r} holds a '..' segment: write the path it leads to")
    return path


def check_duration(value: str) -> str:
    """The duration, if Consul reads it: ``"10s"``, ``"1m30s"``, ``"500ms"``, from 1 ms to a year.

    Raises: InvalidInputError.
    Source: https://pkg.go.dev/time#ParseDuration
    """
    if not isinstance(value, str) or not _DURATION.fullmatch(value) or not 0.001 <= _seconds(value) <= 365 * 86_400:
        raise InvalidInputError(f"{value!r} is not a duration: pass a number and a unit, such as '10s' or '1m30s'")
    return value


def check_seconds(name: str, seconds: float) -> float:
    """The number, if it is one of seconds. Raises: InvalidInputError."""
    if not 0 < seconds < math.inf:
        raise InvalidInputError(f"{name}={seconds!r}: pass a number of seconds above 0")
    return seconds


def _seconds(duration: str) -> float:
    return sum(float(number) * _SECONDS[unit] for number, unit in re.findall(r"([\d.]+)([a-z]+)", duration))


def _is_text(value: str) -> bool:
    """Whether it can be encoded: half a surrogate pair can't."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
