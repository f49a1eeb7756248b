"""An httpx transport that takes the URL's host for a service name: resolve, pick, send, fail over."""

import asyncio
import logging
from typing import Any

import httpx

from registry.balancing import Pick, random_pick
from registry.errors import RegistryError
from registry.model import Instance, Snapshot
from registry.resolver import Resolver
from registry.retry import RetryBudget, RetryPolicy, classify, is_idempotent, retry_after
from registry.validation import check_service

__all__ = ["DiscoveryTransport"]

logger = logging.getLogger("registry")

Outcome = httpx.Response | httpx.TransportError


class DiscoveryTransport(httpx.AsyncBaseTransport):
    """Sends each request to an instance of the service that stands as its host, and to the next one if that fails.

    For any httpx client: ``httpx.AsyncClient(transport=DiscoveryTransport(resolver), base_url="http://backend-api")``.
    The ``Host`` header keeps the service name. Request extensions: ``tag`` (only instances with this tag) and
    ``idempotent`` (overrides what method and headers say).

    Raises: ServiceNotFoundError, NoHealthyInstanceError, RegistryUnavailableError; InvalidInputError for a host that
    is no service name; after the last attempt its own httpx.TransportError, with one note per attempt. A 5xx answer
    to the last attempt is returned as it is.
    """

    def __init__(
        self,
        resolver: Resolver,
        *,
        retry: RetryPolicy | None = None,
        deadline: float | None = None,
        pick: Pick = random_pick,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """``deadline``: seconds that a call may take over all attempts. ``transport``: what talks to the instance."""
        self._resolver = resolver
        self._retry = retry or RetryPolicy()
        self._deadline = deadline
        self._pick = pick
        self._budgets: dict[str, RetryBudget] = {}
        self._inner = transport or httpx.AsyncHTTPTransport(
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=30.0)
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        service = check_service(request.url.host)
        call = _Call(request)
        try:
            async with asyncio.timeout(self._deadline):
                outcome = await self._attempts(service, call)
        except TimeoutError:
            outcome = httpx.ReadTimeout(f"no answer from '{service}' within {self._deadline} s", request=request)
        if isinstance(outcome, httpx.Response):
            outcome.extensions["attempts"] = call.notes
            return outcome
        for note in call.notes:
            outcome.add_note(note)
        raise outcome

    async def _attempts(self, service: str, call: "_Call") -> Outcome:
        budget = self._budgets.setdefault(service, RetryBudget())
        budget.deposit()
        for attempt in range(1, self._retry.max_retries + 1):
            instance = self._pick(await self._snapshot(service, call), call.tried)
            if instance is None:
                await asyncio.sleep(self._retry.delay(attempt - 1, call.retry_after))
                call.tried.clear()
                instance = self._pick(await self._snapshot(service, call), call.tried)
                assert instance is not None, "a resolver never answers with an empty snapshot"
            call.tried.append(instance)
            outcome = await self._send(call.addressed_to(instance))
            failure = classify(outcome)
            if failure is None:
                return outcome
            call.note(attempt, instance, outcome)
            allowed = self._retry.allows(failure, idempotent=call.idempotent, replayable=call.replayable)
            if not allowed or attempt == self._retry.max_retries or not budget.withdraw():
                return outcome
            if isinstance(outcome, httpx.Response):
                call.retry_after = retry_after(outcome)
                await outcome.aclose()
        raise AssertionError("max_retries is at least 1")

    async def _send(self, request: httpx.Request) -> Outcome:
        try:
            return await self._inner.handle_async_request(request)
        except httpx.TransportError as error:
            return error

    async def _snapshot(self, service: str, call: "_Call") -> Snapshot:
        try:
            snapshot = self._resolver.resolve(service, call.tag)
            if snapshot is None:
                await self._resolver.ready(service, call.tag)
                snapshot = self._resolver.resolve(service, call.tag)
            assert snapshot, "ready() returned before there was an answer"
            return snapshot
        except RegistryError as error:
            # A caller that loops on "nobody there" must not starve the event loop that would bring better news.
            await asyncio.sleep(0)
            for note in call.notes:
                error.add_note(note)
            raise

    async def aclose(self) -> None:
        await self._inner.aclose()
        await self._resolver.aclose()


class _Call:
    """One call: the request as the caller gave it, and what its attempts have shown."""

    def __init__(self, request: httpx.Request) -> None:
        self.request = request
        self.tag: str | None = request.extensions.get("tag")
        self.idempotent = is_idempotent(request)
        self.replayable = isinstance(request.stream, httpx.ByteStream)
        self.tried: list[Instance] = []
        self.notes: list[str] = []
        self.retry_after: float | None = None

    def addressed_to(self, instance: Instance) -> httpx.Request:
        """A copy for one attempt. The headers, so also the logical Host, stay the caller's."""
        return httpx.Request(
            self.request.method,
            self.request.url.copy_with(host=instance.address, port=instance.port),
            headers=self.request.headers,
            stream=self.request.stream,
            extensions=self.request.extensions,
        )

    def note(self, attempt: int, instance: Instance, outcome: Outcome) -> None:
        what: Any = outcome.status_code if isinstance(outcome, httpx.Response) else repr(outcome)
        self.notes.append(f"attempt {attempt} on {instance.id} ({instance.netloc}): {what}")
        logger.debug("attempt failed", extra={"attempt": attempt, "instance": instance.id, "outcome": str(what)})
