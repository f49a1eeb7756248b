"""What a call of the facade sends: the request that httpx's client would build, checked beforehand."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import httpx

from registry.errors import InvalidInputError
from registry.validation import check_known_service, check_path, check_service

__all__ = ["Headers", "Requests", "timeouts_of"]

Headers: TypeAlias = (
    httpx.Headers
    | Mapping[str, str]
    | Mapping[bytes, bytes]
    | Sequence[tuple[str, str]]
    | Sequence[tuple[bytes, bytes]]
)

_WITHOUT_BODY = frozenset({"GET", "HEAD", "OPTIONS", "DELETE"})
_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "PATCH"})
_METHOD = re.compile(r"[A-Z]{1,32}", re.ASCII)
# RFC 9110, 5.6.2: token = 1*tchar
_HEADER_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_UNSAFE_IN_VALUE = re.compile(rb"[\r\n\0]")
_MAX_CONNECT = 2.0


class Requests:
    """Builds requests with the headers and parameters that an httpx client has now; sends nothing."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._defaults: dict[str, httpx.Headers] = {}
        self._defaults_of: list[tuple[bytes, bytes]] = []

    def build(
        self,
        method: str,
        service: str,
        path: str,
        *,
        headers: Headers | None,
        params: Any,
        cookies: Any,
        extensions: dict[str, Any],
        body: Mapping[str, Any],
    ) -> tuple[httpx.Request, str | None]:
        """The request, and the service's name where that is one of others' making and no host.

        Raises: InvalidInputError.
        """
        url, other = _target(service, path)
        method = method if method in _METHODS else _check_method(method)
        if default_params := self._http.params:
            params = default_params.merge(params)
        if params is not None:
            url = url.copy_merge_params(params)
        headers = self._headers(url, headers)
        if any(part is not None for part in body.values()):
            if isinstance(body["data"], (str, bytes)):
                body = {**body, "content": body["data"], "data": None}
            return httpx.Request(method, url, headers=headers, cookies=cookies, extensions=extensions, **body), other
        if method not in _WITHOUT_BODY:
            return httpx.Request(method, url, headers=headers, cookies=cookies, extensions=extensions), other
        empty = httpx.ByteStream(b"")  # what httpx comes to, in a quarter of the time
        request = httpx.Request(method, url, headers=headers, cookies=cookies, extensions=extensions, stream=empty)
        request.read()
        return request, other

    def _headers(self, url: httpx.URL, headers: Headers | None) -> httpx.Headers:
        """What httpx's client would send: its own headers, those of the call in place of what they name."""
        if (now := self._http.headers.raw) != self._defaults_of:
            self._defaults, self._defaults_of = {}, now
        defaults = self._defaults.get(url.host)
        if defaults is None:
            defaults = self._defaults[url.host] = httpx.Headers([(b"Host", url.netloc), *now])
        if headers is None:
            return defaults
        merged = httpx.Headers(defaults)
        given = httpx.Headers(headers)
        for name, value in given.raw:
            if not _HEADER_NAME.fullmatch(name):
                raise InvalidInputError(f"{name!r} is no header name: use letters, digits and hyphens")
            if _UNSAFE_IN_VALUE.search(value):
                raise InvalidInputError(f"header {name!r} holds a line break or NUL: remove it")
        merged.update(given)
        return merged


@lru_cache(maxsize=1024)
def _target(service: str, path: str) -> tuple[httpx.URL, str | None]:
    check_path(path)
    try:
        return httpx.URL(f"http://{check_service(service)}{path}"), None
    except InvalidInputError:
        name = check_known_service(service).lower()
    host = re.sub("[^a-z0-9]+", "-", name)[:60].strip("-")
    return httpx.URL(f"http://s-{host or 'x'}{path}"), name


def _check_method(method: str) -> str:
    if not _METHOD.fullmatch(method.upper()):
        raise InvalidInputError(f"{method!r} is not an HTTP method: pass GET, POST, PUT, PATCH, DELETE or another")
    return method.upper()


def timeouts_of(seconds: float) -> httpx.Timeout:
    """The limits of an attempt that may take so long: connecting takes two seconds of it at most."""
    return httpx.Timeout(seconds, connect=min(seconds, _MAX_CONNECT))
