"""An issuer's public keys: kept, and read anew when they get old or a token names one that is not among them."""

import asyncio
import json
import logging
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import httpx
import jwt

__all__ = ["Keys", "KeysUnavailableError", "Read", "from_address", "from_file"]

_log = logging.getLogger("orchestrator")
Read: TypeAlias = Callable[[], Awaitable[bytes]]
"""Reads the issuer's JWK set (RFC 7517). Raises: OSError, ValueError or httpx.HTTPError."""

# Asymmetric ones only: with a secret shared by all, whoever checks a token could make one.
_ALGORITHMS = {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
_FRESH = 300.0
"""Seconds after which a key that the issuer has withdrawn is asked about."""
_USABLE = 3_600.0
"""Seconds that keys count while the issuer does not answer."""
_PAUSE = 10.0
"""Seconds between two readings, however many tokens name unknown keys."""
_READ_SECONDS = 3.0
_LARGEST = 2**18


class KeysUnavailableError(Exception):
    """Whether a token is good can't be said now."""

    def __init__(self) -> None:
        super().__init__("The issuer's keys can't be had, so no token can be checked: try again in a moment")


class Keys:
    """The keys of one issuer, by their ids."""

    def __init__(self, read: Read, clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._clock = clock
        self._keys: dict[str, jwt.PyJWK] = {}
        self._read_at = self._tried_at = -float("inf")
        self._failed = True
        self._reading = asyncio.Lock()

    async def find(self, kid: str) -> jwt.PyJWK | None:
        """The key of this id; None: the issuer has none. Reads the set when that is due, at most every ten seconds.

        Raises: KeysUnavailableError, when it has not been readable for an hour, or the id may be a new one.
        """
        known = kid in self._keys and self._age() <= _USABLE
        # Who has a known key need not wait while somebody else asks for news.
        if not (known and (self._age() <= _FRESH or self._reading.locked())):
            await self._refresh()
        found = self._keys.get(kid)
        if self._age() > _USABLE or (found is None and self._failed):
            raise KeysUnavailableError
        return found

    def _age(self) -> float:
        return self._clock() - self._read_at

    async def _refresh(self) -> None:
        async with self._reading:
            if self._clock() - self._tried_at < _PAUSE:
                return
            self._tried_at, self._failed = self._clock(), True
            try:
                async with asyncio.timeout(_READ_SECONDS):
                    self._keys = _usable(await self._read())
            except (OSError, ValueError, httpx.HTTPError) as error:
                _log.warning("the issuer's keys can't be had", extra={"error": str(error) or repr(error)})
            else:
                self._read_at, self._failed = self._clock(), False


def _usable(document: bytes) -> dict[str, jwt.PyJWK]:
    """The keys that can check a signature. Raises: ValueError, when there is none, or one that is nobody's business."""
    try:
        each = [jwk for jwk in json.loads(document)["keys"] if isinstance(jwk, dict)]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError("that is no JWK set") from None
    if any("d" in jwk for jwk in each):
        raise ValueError("the set holds a private key: publish the public ones only, and make new ones")
    usable = {jwk["kid"]: key for jwk in each if isinstance(jwk.get("kid"), str) and (key := _key(jwk))}
    if not usable:
        raise ValueError("the set has no key with an id (`kid`) that can check a signature")
    return usable


def _key(jwk: dict[str, Any]) -> jwt.PyJWK | None:
    if jwk.get("use", "sig") != "sig" or "verify" not in jwk.get("key_ops", ["verify"]):
        return None
    try:
        key = jwt.PyJWK(jwk)
    except Exception:  # whatever the library stumbles over there is no key of use
        return None
    return key if key.algorithm_name in _ALGORITHMS else None


def from_file(path: Path) -> Read:
    """Reads the set from a file."""

    async def read() -> bytes:
        return await anyio.Path(path).read_bytes()

    return read


def from_address(url: str) -> Read:
    """Reads the set from an address: without redirects, which could lead anywhere, and without much of it."""
    trust = ssl.create_default_context() if url.startswith("https") else False

    async def read() -> bytes:
        async with httpx.AsyncClient(verify=trust) as client, client.stream("GET", url) as response:
            if response.status_code != 200:
                raise ValueError(f"the answer has status {response.status_code}")
            document = b""
            async for part in response.aiter_bytes():
                document += part
                if len(document) > _LARGEST:
                    raise ValueError("the answer is too large")
            return document

    return read
