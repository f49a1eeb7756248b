"""Who asks: the bearer token of a request, checked against its issuer's public keys. Off until ``AUTH_*`` says how.

It knows nothing of this service, so another one can have a copy: `nox -s new-service -- billing 8004 --auth` makes one.
"""

import json
import logging
import re
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import quote, urlsplit

import jwt
from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from orchestrator.keys import Keys, KeysUnavailableError, from_address, from_file
from registry import InvalidInputError
from registry.logs import set_fields

__all__ = ["SUBJECT_HEADER", "AuthSettings", "Door", "RefusedError", "Subject", "authenticate", "lock"]

SUBJECT_HEADER = "X-Subject"
"""Tells other services who asked; the edge removes it from what comes from outside."""
_log = logging.getLogger("orchestrator")
_LONGEST_TOKEN = 8_192
_LONGEST_NAME = 1_000
_LEEWAY = 10.0
"""Seconds that the clocks of issuer and service may differ."""
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
# "credentials = auth-scheme [ 1*SP ( token68 / #auth-param ) ]", and the scheme ignores case (RFC 9110, 11.4 and 11.1);
# a signed token has three parts, none of them empty (RFC 7515, 7.1).
_BEARER = re.compile(r"bearer +([\w-]+\.[\w-]+\.[\w-]+)", re.ASCII | re.IGNORECASE)
# RFC 8725, 3.11: kinds of tokens must not be mistaken for each other. These are access tokens (RFC 9068, 4), and those
# that do not say what they are.
_TYPES = {"jwt", "at+jwt", "application/at+jwt"}
_REASONS: tuple[tuple[type[jwt.PyJWTError], str], ...] = (
    (jwt.ExpiredSignatureError, "it has expired"),
    (jwt.ImmatureSignatureError, "it is not valid yet"),
    (jwt.InvalidAudienceError, "it is for another audience"),
    (jwt.InvalidIssuerError, "it is from another issuer"),
    (jwt.MissingRequiredClaimError, "it lacks one of exp, iss, aud and sub"),
    (jwt.InvalidSignatureError, "its signature is wrong"),
    (jwt.InvalidAlgorithmError, "its algorithm is not that of its key"),
)

_subject: ContextVar[str | None] = ContextVar("subject", default=None)


class AuthSettings(BaseSettings):
    """Where tokens come from and whom they are for, read from ``AUTH_*``; nothing set: nobody is asked for a token.

    Raises: pydantic.ValidationError or InvalidInputError (both are ValueError), when a part is missing or of no use.
    """

    model_config = SettingsConfigDict(env_prefix="AUTH_", env_ignore_empty=True, frozen=True)

    jwks_url: str | None = None
    """Address of the issuer's public keys, a JWK set (RFC 7517)."""
    jwks_file: Path | None = None
    """A file of the same instead; it may be replaced at any time."""
    issuer: str | None = None
    """What a token must have as ``iss``."""
    audience: str | None = None
    """What a token must have in its ``aud``: the name by which the issuer knows this service."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        keys = [self.jwks_url, self.jwks_file]
        if not any([*keys, self.issuer, self.audience]):
            return self
        if keys.count(None) != 1 or not self.issuer or not self.audience:
            raise InvalidInputError(
                "to ask callers for a token, set AUTH_ISSUER, AUTH_AUDIENCE, and either AUTH_JWKS_URL or "
                "AUTH_JWKS_FILE; to ask nobody, set none of them"
            )
        url = urlsplit(self.jwks_url or "")
        if self.jwks_url and not (url.hostname and (url.scheme == "https" or url.hostname in _LOOPBACK)):
            raise InvalidInputError("AUTH_JWKS_URL: keys come by https, or else anybody in between makes his own")
        return self

    def door(self) -> "Door | None":
        """What asks for tokens; None: nobody is asked. Reads and sends nothing yet."""
        if not self.issuer or not self.audience:
            return None
        read = from_file(self.jwks_file) if self.jwks_file else from_address(self.jwks_url or "")
        return Door(Keys(read), self.issuer, self.audience)


class RefusedError(Exception):
    """The caller is not let in; the message says why, and holds nothing of what the caller sent."""

    def __init__(self, words: str, *, sent: bool = True) -> None:
        super().__init__(f"The token is not valid: {words}" if sent else words)
        self.sent = sent
        """Whether there was a token."""


class Door:
    """Lets in whoever has a token of this issuer for this audience."""

    def __init__(self, keys: Keys, issuer: str, audience: str) -> None:
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._jwt = jwt.PyJWT({"require": ["exp", "iss", "aud", "sub"], "enforce_minimum_key_length": True})

    async def admit(self, authorization: list[str]) -> str:
        """Who it is, from the headers ``Authorization``: the token's ``sub``, percent-encoded, so that it can stand in
        a header and in one line of a log.

        Raises: RefusedError. KeysUnavailableError, when nobody can say now.
        """
        token = _read(authorization)
        try:
            header = jwt.get_unverified_header(token)
            key = await self._keys.find(_key_id(header))
            if key is None:
                raise RefusedError("it names no key of its issuer")
            claims = self._jwt.decode(
                token,
                key,
                [key.algorithm_name],  # never what the token says
                issuer=self._issuer,
                audience=self._audience,
                leeway=_LEEWAY,
            )
            for part in token.split(".")[:2]:
                json.loads(jwt.utils.base64url_decode(part), object_pairs_hook=_no_name_twice)
            return _name(claims["sub"])
        except jwt.PyJWTError as error:
            words = (words for kind, words in _REASONS if isinstance(error, kind))
            raise RefusedError(
                next(words, "it is no signed token, or a part of it is not what it should be")
            ) from error


def _read(authorization: list[str]) -> str:
    if not authorization:
        raise RefusedError("Send a token, as `Authorization: Bearer <token>`", sent=False)
    found = _BEARER.fullmatch(authorization[0])
    # Two headers: who reads the first and who reads the last would let in two different callers.
    if len(authorization) > 1 or len(authorization[0]) > _LONGEST_TOKEN or not found:
        raise RefusedError("send one header `Authorization: Bearer <token>`, with a signed token of at most 8 kB")
    return found[1]


def _key_id(header: dict[str, Any]) -> str:
    if str(header.get("typ", "JWT")).lower() not in _TYPES:
        raise RefusedError("it is a token of another kind")
    if not isinstance(kid := header.get("kid"), str):
        raise RefusedError("it names no key of its issuer")
    return kid


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # "The Claim Names within a JWT Claims Set MUST be unique" (RFC 7519, 4): others may read the other one.
    if len(pairs) != len(dict(pairs)):
        raise RefusedError("it says something twice")
    return dict(pairs)


def _name(subject: str) -> str:
    try:
        name = quote(subject, safe="!#$&'()*+,/:;=?@|")
    except UnicodeEncodeError:
        raise RefusedError("its subject is no text") from None
    if not 0 < len(name) <= _LONGEST_NAME:
        raise RefusedError("its subject is empty, or too long")
    return name


async def authenticate(request: Request) -> str | None:
    """Who asks; None: nobody is asked for a token. What is logged from here on has it as ``subject``.

    Raises: HTTPException: 401, or 503 while the issuer's keys can't be had.
    """
    door: Door | None = request.app.state.door
    if door is None:
        return None
    try:
        name = await door.admit(request.headers.getlist("Authorization"))
    except RefusedError as error:
        _log.info("a caller was refused", extra={"reason": str(error)})
        # RFC 6750, 3.1: who sent no token is told of no error.
        why = f', error="invalid_token", error_description="{error}"' if error.sent else ""
        challenge = f'Bearer realm="{request.app.title}"{why}'
        raise HTTPException(401, str(error), {"WWW-Authenticate": challenge}) from error
    except KeysUnavailableError as error:
        raise HTTPException(503, str(error), {"Retry-After": "10"}) from error
    _subject.set(name)
    return name


Subject = Annotated[str | None, Depends(authenticate)]
"""An endpoint's parameter type: who asks for it."""


def lock(app: FastAPI) -> None:
    """Makes ``authenticate`` ask for what ``AUTH_*`` says. Raises: ValueError, when they are of no use."""
    app.state.door = AuthSettings().door()
    set_fields("auth", lambda: {"subject": _subject.get()})
