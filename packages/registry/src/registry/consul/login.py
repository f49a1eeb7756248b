"""A token that is got by logging in with the identity that the platform gave this process.

Source: https://developer.hashicorp.com/consul/api-docs/acl#login-to-auth-method
"""

import logging
import os
import random
import re
import threading
import time
from contextlib import suppress
from datetime import datetime
from typing import Any
from weakref import WeakSet

import httpx
from consul.exceptions import ConsulException

from registry.consul.opening import base_url, server_name, sync_client
from registry.consul.refusals import brief, check_origin, consul_errors
from registry.consul.tokens import TokenFile, TokenSource
from registry.errors import RegistryError, RegistryUnavailableError
from registry.settings import ConsulSettings

__all__ = ["LOGOUT_TIMEOUT", "Login", "token_source"]

logger = logging.getLogger("registry")

RENEW = 0.6, 0.8
"""After which share of a token's life, from and to, the next login is due."""
RETRY = 2.0
"""Seconds until a renewal that failed is tried again, while the old token lives."""
SPREAD = 2.0
"""Seconds that a new token may take to be known by every server."""
LOGOUT_TIMEOUT = 1.0
"""Seconds that a dead Consul may delay the end of a process, once more."""
# Consul answers these with a 500, like an outage of its own.
_BAD_BEARER = re.compile("jwt|jws|token|claim|signature", re.IGNORECASE)


class Login(TokenSource):
    """One login, shared by all connections of this process with the same settings. Get it from ``token_source``.

    It is made when the first request needs it, and again when a part of the token's life is over or Consul no longer
    knows the token. The old one is left to expire: questions are still parked with it, and the agent has it until the
    instance was registered anew. When the last connection is closed, the token is logged out, unless an agent needs it
    for an instance that stays registered.
    """

    blocks = True

    def __init__(self, settings: ConsulSettings) -> None:
        super().__init__(settings)
        self.users: WeakSet[Any] = WeakSet()
        self.forget()

    def forget(self) -> None:
        """After a fork: the token is the parent's."""
        self._lock = threading.Lock()
        self._token: str | None = None
        self._made = self._due = self._end = 0.0
        self._failure: tuple[float, RegistryError] | None = None
        self._held: set[str] = set()

    def current(self) -> str:
        token = self._token
        if token is not None and time.monotonic() < self._due:
            return token
        try:
            return self._log_in(instead_of=token)
        except RegistryError as error:
            if token is None or time.monotonic() >= self._end:
                raise
            self._due = time.monotonic() + RETRY
            logger.warning("the login can't be renewed yet; the token still works, and this is tried again: %s", error)
            return token

    def renewed(self, refused: str | None, *, unknown: bool) -> str | None:
        if not unknown:  # the next one would have the same rights
            return None
        if refused == self._token and time.monotonic() - self._made < SPREAD:
            return refused
        return self._log_in(instead_of=refused)

    def hold(self, service_id: str) -> None:
        self._held.add(service_id)

    def drop(self, service_id: str) -> None:
        self._held.discard(service_id)

    def leave(self, user: object) -> None:
        with _logins_lock:
            self.users.discard(user)
            if self.users:
                return
            _logins.pop(self.settings, None)
        token, self._token = self._token, None
        if token is None or self._held:
            return
        with suppress(RegistryError), consul_errors(self.settings):
            self._post("logout", {"X-Consul-Token": token}, timeout=LOGOUT_TIMEOUT / 2)  # to connect, and to read

    def _log_in(self, instead_of: str | None) -> str:
        """A new token, unless another thread got one meanwhile. Raises: RegistryError."""
        begun = time.monotonic()
        with self._lock:
            if self._token is not None and self._token != instead_of:
                return self._token
            if self._failure is not None and self._failure[0] > begun:
                error = self._failure[1]
                raise type(error)(*error.args) from error
            try:
                self._token = self._made_of(self._ask())
            except RegistryError as error:
                self._failure = time.monotonic(), error
                raise
            return self._token

    def _made_of(self, answer: httpx.Response) -> str:
        """The token of Consul's answer, and when it must be followed by another."""
        now, life = time.monotonic(), float("inf")
        try:
            made = answer.json()
            token: str = made["SecretID"]
            if made.get("ExpirationTime"):
                # The difference, as Consul's clock may not be ours.
                ends, begins = (datetime.fromisoformat(made[name]) for name in ("ExpirationTime", "CreateTime"))
                life = (ends - begins).total_seconds()
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RegistryUnavailableError(
                f"Consul at {self.settings.url} sent a broken answer to a login: {type(error).__name__}"
            ) from None
        self._made, self._due, self._end = now, now + life * random.uniform(*RENEW), now + life
        return token

    def _ask(self) -> httpx.Response:
        bearer, method = self.settings.read_bearer_token(), self.settings.auth_method
        with consul_errors(self.settings):
            answer = self._post("login", {}, json={"AuthMethod": method, "BearerToken": bearer})
            text = brief(answer.text.replace(bearer, "…"))
            if answer.is_server_error and not _BAD_BEARER.search(text):
                raise ConsulException(f"{answer.status_code} {text}")
        if answer.is_success:
            return answer
        if answer.status_code == httpx.codes.UNAUTHORIZED:
            advice = "switch on its access rules, or unset CONSUL_AUTH_METHOD"
        elif "not found" in text:
            advice = "create this auth method, or mend CONSUL_AUTH_METHOD"
        elif answer.status_code == httpx.codes.FORBIDDEN:
            advice = "no binding rule of this auth method gives anything to whom the bearer token names: add one"
        else:
            advice = f"is {self.settings.bearer_token_file} fresh, and from the issuer that the auth method trusts?"
        raise RegistryError(f"Consul at {self.settings.url} refused the login with {method!r}: {text}; {advice}")

    def _post(self, verb: str, headers: dict[str, str], **options: Any) -> httpx.Response:
        with sync_client(self.settings) as client:
            answer = client.post(
                f"{base_url(self.settings)}/v1/acl/{verb}",
                headers=headers,
                extensions=server_name(self.settings),
                **options,
            )
        check_origin(answer)
        return answer


_logins: dict[ConsulSettings, Login] = {}
_logins_lock = threading.Lock()


def token_source(settings: ConsulSettings, user: object) -> TokenSource:
    """Where a connection gets its tokens from; with a login, all of this process with these settings have one.

    ``user``: the connection, which calls ``leave`` when it is closed.
    """
    if settings.auth_method is None:
        from_file = settings.token is None and settings.token_file is not None
        return TokenFile(settings) if from_file else TokenSource(settings)
    with _logins_lock:
        login = _logins.setdefault(settings, Login(settings))
        login.users.add(user)
    return login


def _after_fork() -> None:
    global _logins_lock
    _logins_lock = threading.Lock()
    for login in _logins.values():
        login.forget()


os.register_at_fork(after_in_child=_after_fork)
