"""An httpx transport that takes the URL's host for a service name: resolve, pick, send, fail over."""

import asyncio
import logging
import math
import time
from contextlib import suppress

import httpx

from registry import context
from registry.balancing import Endpoint, Pick, named_pick
from registry.errors import InvalidInputError
from registry.pool import Pool
from registry.resolver import Resolver
from registry.retry import Failure, RetryPolicy, classify, is_idempotent, retry_after
from registry.sender import AiohttpSender, HttpxSender, Sender
from registry.upstream import Explanation, Upstream

__all__ = ["DiscoveryTransport"]

logger = logging.getLogger("registry")

Outcome = httpx.Response | httpx.TransportError


class DiscoveryTransport(httpx.AsyncBaseTransport):
    """Sends each request to an instance of the service that stands as its host, and to the next one if that fails.

    For any httpx client: ``httpx.AsyncClient(transport=DiscoveryTransport(resolver), base_url="http://backend-api")``.
    The ``Host`` header keeps the service name. Request extensions: ``tag`` (only instances with this tag),
    ``idempotent`` (overrides what method and headers say), ``hedge`` (send a second attempt when the first is slow).

    Raises: ServiceNotFoundError, NoHealthyInstanceError, RegistryUnavailableError; InvalidInputError for a host that
    is no service name; after the last attempt its own httpx.TransportError, with one note per attempt. A 5xx answer
    to the last attempt is returned as it is, with the notes in ``response.extensions["attempts"]``.
    """

    def __init__(
        self,
        resolver: Resolver,
        *,
        retry: RetryPolicy | None = None,
        deadline: float | None = None,
        policy: str | Pick = "p2c",
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """``deadline``: seconds that a call may take over all attempts, until the answer's headers are there.

        ``policy``: ``"p2c"``, ``"random"``, ``"round_robin"`` or a function. ``transport``: what talks to an instance.
        """
        self._resolver = resolver
        self._retry = retry or RetryPolicy()
        self._deadline = deadline
        self._policy = policy
        self._upstreams: dict[tuple[str, str | None], Upstream] = {}
        self._sender: Sender = AiohttpSender() if transport is None else HttpxSender(transport)
        named_pick(policy)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answered: httpx.Response | None = request.extensions.pop("answered", None)
        return await self.send(request) if answered is None else answered

    async def send(self, request: httpx.Request, *, read: bool = False, limit: float | None = None) -> httpx.Response:
        """What ``handle_async_request`` does; ``read``: with the whole body as part of the attempt.

        ``limit``: seconds for one attempt.
        """
        if request.url.port is not None:
            raise InvalidInputError(f"{str(request.url)!r} names a port: leave it out, the registry knows it")
        upstream = self._upstream(request.url.raw_host.decode("ascii"), request.extensions.get("tag"))
        upstream.budget.deposit()
        call = _Call(request, upstream, read, limit, self._deadline)
        while True:
            endpoint = await self._next_endpoint(call)
            if endpoint is None:
                return call.give_up()
            call.attempt += 1
            attempt = self._hedged if call.hedge else self._attempt
            call.outcome, failure = await attempt(call, endpoint)
            if failure is None and isinstance(call.outcome, httpx.Response):
                return call.outcome
            if failure is None or not self._goes_on(call, failure):
                return call.give_up()
            if isinstance(call.outcome, httpx.Response):
                call.retry_after = retry_after(call.outcome)
                await call.outcome.aclose()

    def explain(self, service: str, tag: str | None = None) -> Explanation:
        """Why an instance of the service would be chosen or not, as this process sees it now. Memory only."""
        return self._upstream(service, tag).explain()

    async def _next_endpoint(self, call: "_Call") -> Endpoint | None:
        """Whom to ask next, after a back-off once all were asked; None: the last outcome has to do."""
        endpoint = await call.upstream.pick(call.tried, safe=call.safe)
        if endpoint is not None or call.outcome is None:
            return endpoint
        delay = self._retry.delay(call.attempt, call.retry_after)
        if call.upstream.pool.failing_fast_for or delay >= call.left():
            return None
        await asyncio.sleep(delay)
        call.tried.clear()
        return await call.upstream.pick(call.tried, safe=call.safe)

    def _goes_on(self, call: "_Call", failure: Failure) -> bool:
        return (
            call.attempt < self._retry.max_retries
            and self._retry.allows(failure, idempotent=call.idempotent, replayable=call.replayable)
            # Called on behalf of a retry: whoever retried there does so again, and must not be multiplied here.
            and (failure is Failure.NOT_SENT or not context.is_retry.get())
            and call.left() > 0
            and call.upstream.budget.withdraw()
        )

    async def _attempt(self, call: "_Call", endpoint: Endpoint) -> tuple[Outcome, Failure | None]:
        """Sends once, and tells the pool how it went."""
        pool, started, key = call.upstream.pool, time.monotonic(), object()
        call.tried.append(endpoint)
        endpoint.started[key] = started
        outcome: Outcome
        try:
            outcome = await self._sender.send(
                call.request, endpoint.instance, call.headers(), call.attempt_limit(), read=call.read
            )
        except httpx.TransportError as error:
            outcome = error
        except asyncio.CancelledError:
            endpoint.observe(time.monotonic() - started, time.monotonic())
            raise
        finally:
            del endpoint.started[key]
        seconds = time.monotonic() - started
        failure = classify(outcome)
        if failure is None:
            pool.succeeded(endpoint, seconds)
            call.upstream.latencies.append(seconds)
        elif failure is not Failure.REFUSED:
            pool.failed(endpoint, failure, seconds)
        if failure is not None:
            call.note(endpoint, outcome)
        return outcome, failure

    async def _hedged(self, call: "_Call", endpoint: Endpoint) -> tuple[Outcome, Failure | None]:
        """Sends once more, to another instance, when the answer takes longer than most; the first success wins."""
        running = {asyncio.ensure_future(self._attempt(call, endpoint))}
        try:
            done, running = await asyncio.wait(running, timeout=call.upstream.p95())
            if not done and call.upstream.budget.withdraw():
                second = await call.upstream.pick(call.tried, safe=True)
                if second is not None:
                    running.add(asyncio.ensure_future(self._attempt(call, second)))
            while True:
                for task in done:
                    outcome, failure = task.result()
                    if failure is None or not running:
                        return outcome, failure
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in running:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    outcome, _ = await task
                    if isinstance(outcome, httpx.Response):
                        await outcome.aclose()

    def _upstream(self, service: str, tag: str | None) -> Upstream:
        upstream = self._upstreams.get((service, tag))
        if upstream is None:
            upstream = Upstream(self._resolver, Pool(service, named_pick(self._policy)), tag)
            self._upstreams = {key: known for key, known in self._upstreams.items() if known.pool.knows_any}
            self._upstreams[service, tag] = upstream
        return upstream

    async def aclose(self) -> None:
        await self._sender.aclose()
        await self._resolver.aclose()


class _Call:
    """One call: the request as the caller gave it, its limits, and what its attempts have shown."""

    __slots__ = (
        "_deadline",
        "_limit",
        "attempt",
        "hedge",
        "idempotent",
        "notes",
        "outcome",
        "read",
        "replayable",
        "request",
        "retry_after",
        "safe",
        "tried",
        "upstream",
    )

    def __init__(
        self, request: httpx.Request, upstream: Upstream, read: bool, limit: float | None, deadline: float | None
    ) -> None:
        self.request = request
        self.upstream = upstream
        self.read = read
        self.attempt = 0
        self.idempotent = is_idempotent(request)
        self.replayable = isinstance(request.stream, httpx.ByteStream)
        self.safe = self.idempotent and self.replayable
        self.hedge = self.safe and request.extensions.get("hedge", False)
        self.tried: list[Endpoint] = []
        self.notes: list[str] = []
        self.outcome: Outcome | None = None
        self.retry_after: float | None = None
        self._limit = limit
        self._deadline = time.time() + deadline if deadline is not None else math.inf
        inherited = context.deadline.get()
        if inherited is not None:
            self._deadline = min(self._deadline, inherited)

    def left(self) -> float:
        """Seconds until the deadline; infinite without one."""
        return self._deadline - time.time()

    def attempt_limit(self) -> float | None:
        """Seconds that the next attempt may take; None: as long as it likes."""
        limit = min(self.left(), math.inf if self._limit is None else self._limit)
        return None if limit == math.inf else max(limit, 0.001)

    def headers(self) -> dict[str, str]:
        """What the next attempt says beside the caller's own headers."""
        headers = {} if self._deadline == math.inf else {context.DEADLINE_HEADER: f"{self._deadline:.3f}"}
        if self.attempt > 1:
            headers[context.RETRY_HEADER] = str(self.attempt)
        return headers

    def note(self, endpoint: Endpoint, outcome: Outcome) -> None:
        """Remembers a failed attempt, for the error."""
        what = f"HTTP {outcome.status_code}" if isinstance(outcome, httpx.Response) else repr(outcome)
        instance = endpoint.instance
        self.notes.append(f"attempt {self.attempt} on {instance.id} ({instance.netloc}): {what}")
        logger.debug("attempt failed", extra={"attempt": self.attempt, "instance": instance.id, "outcome": what})

    def give_up(self) -> httpx.Response:
        """The last outcome as the call's: the answer returned, or the error raised with its notes."""
        if isinstance(self.outcome, httpx.Response):
            self.outcome.extensions["attempts"] = self.notes
            return self.outcome
        assert self.outcome is not None
        for note in self.notes:
            self.outcome.add_note(note)
        raise self.outcome
