"""What httpx's client does for the facade: authentication, hooks, and what a redirect asks for. It keeps no cookies."""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx

from registry.discovery.call import Terms
from registry.discovery.transport import DiscoveryTransport
from registry.errors import InvalidInputError

__all__ = ["Way"]

_TERMS, _ANSWER = "registry.terms", "registry.answer"
"""Extensions of requests that the facade has made itself; no user's request has them."""
_MOST = 20
"""Redirects in a row, as httpx has it."""


class Way:
    """One way of calling, with or without httpx's client around it: the terms of a call hold on both."""

    def __init__(self, transport: DiscoveryTransport, http: httpx.AsyncClient, default: Callable[[], Terms]) -> None:
        self._transport = transport
        self._http = http
        # The facade is shared by all of an app's requests: a cookie set for one user must not go out with the next's.
        self._client = httpx.AsyncClient(
            transport=_Within(self._send, default), cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[]))
        )

    async def send(self, request: httpx.Request, terms: Terms, auth: Any, follow: bool | None) -> httpx.Response:
        """The answer, after all redirects. ``follow``: to other services too; None: only within the service."""
        answer = await self._once(request, terms, auth)
        history: list[httpx.Response] = []
        while follow is not False and answer.has_redirect_location:
            following = await self._next(request, answer)
            if following is None:
                break
            if len(history) == _MOST:
                raise httpx.TooManyRedirects("Exceeded maximum allowed redirects.", request=request)
            history.append(answer)
            if following.url.host != request.url.host:
                _check_leaving(request.url, following.url, follow)
                terms = replace(terms, service=None, tag=None)
            # Who speaks plain HTTP in the mesh is told otherwise by a header like X-Forwarded-Proto only.
            following.url = following.url.copy_with(scheme=request.url.scheme)
            request, answer = following, await self._once(following, terms, None)
            answer.history = list(history)
        return answer

    async def _once(self, request: httpx.Request, terms: Terms, auth: Any) -> httpx.Response:
        http, hooks = self._http, self._http.event_hooks
        if auth is httpx.USE_CLIENT_DEFAULT:
            auth = http.auth
        if auth is None and not hooks["request"] and not hooks["response"]:
            return await self._send(request, terms)
        self._client.event_hooks = hooks
        request.extensions[_TERMS] = terms
        return await self._client.send(request, auth=auth, follow_redirects=False)

    async def _send(self, request: httpx.Request, terms: Terms) -> httpx.Response:
        started = time.perf_counter()
        response = await self._transport.send(request, terms)
        response.elapsed = timedelta(seconds=time.perf_counter() - started)
        return response

    async def _next(self, request: httpx.Request, answer: httpx.Response) -> httpx.Request | None:
        """What httpx would send next; None: the Location is none, and the answer an answer like any other."""
        if answer.next_request is None:
            request.extensions[_ANSWER] = answer
            self._client.event_hooks = {}
            try:
                await self._client.send(request, auth=None, follow_redirects=False)
            except httpx.RemoteProtocolError:
                return None
        return answer.next_request

    async def aclose(self) -> None:
        """Closes nothing but itself: connections are the transport's."""
        await self._client.aclose()


class _Within(httpx.AsyncBaseTransport):
    """Stands under the facade's httpx client, in the transport's place."""

    def __init__(self, send: Callable[[httpx.Request, Terms], Any], default: Callable[[], Terms]) -> None:
        self._send = send
        self._default = default

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer: httpx.Response | None = request.extensions.pop(_ANSWER, None)
        if answer is None:
            # What an auth flow sends on its own, for a token say, comes without terms.
            answer = await self._send(request, request.extensions.get(_TERMS) or self._default())
        return answer


def _check_leaving(service: httpx.URL, target: httpx.URL, follow: bool | None) -> None:
    if not follow:
        raise InvalidInputError(
            f"'{service.host}' redirects to {str(target)!r}, which is not the same service: pass follow_redirects=True"
            " to go there if it is a registered one, or follow_redirects=False to see the answer"
        )
