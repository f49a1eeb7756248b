"""An httpx transport that treats the URL's host as a service name: resolve, pick, send, fail over."""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

import httpx

from registry.discovery.attempt import Attempt
from registry.discovery.balancing import Policy, named_pick
from registry.discovery.blame import Failure
from registry.discovery.call import Call, Outcome, Terms
from registry.discovery.endpoint import Endpoint
from registry.discovery.explanation import Explanation
from registry.discovery.options import ConnectionOptions, EjectionPolicy
from registry.discovery.peers import Peers
from registry.discovery.pool import Pool
from registry.discovery.resolver import Resolver
from registry.discovery.retry import RetryPolicy
from registry.discovery.roster import Roster
from registry.discovery.sender import H11Sender, HttpxSender, Sender
from registry.discovery.upstream import Upstream
from registry.errors import InvalidInputError, RegistryError
from registry.telemetry import Observer, Observers
from registry.validation import check_known_service, check_service, check_zone

__all__ = ["DiscoveryTransport"]


class DiscoveryTransport(httpx.AsyncBaseTransport):
    """Sends each request to an instance of the service that the URL names as its host, and to another if that fails.

    For any httpx client: ``httpx.AsyncClient(transport=DiscoveryTransport(resolver), base_url="http://backend-api")``.
    The ``Host`` header keeps the service name. Request extensions: ``tag`` (only instances with this tag),
    ``idempotent`` (takes precedence over method and headers), ``hedge`` (send a second attempt if the first is slow).
    The request itself is not changed, so it may be sent again.

    Raises: ServiceNotFoundError, NoHealthyInstanceError, RegistryUnavailableError; InvalidInputError if the host is not
    a valid service name; after the last attempt its httpx.TransportError, with one note per attempt; any error that
    the source of the request's body raises. A 5xx response to the last attempt is returned, with the notes in
    ``response.extensions["attempts"]``.
    """

    def __init__(
        self,
        resolver: Resolver,
        *,
        retry: RetryPolicy | None = None,
        deadline: float | None = None,
        policy: Policy = "p2c",
        ejection: EjectionPolicy | None = None,
        connections: ConnectionOptions | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        observer: Observer | None = None,
        zone: str | None = None,
    ) -> None:
        """``deadline``: time limit in seconds for all attempts of a call together, until the response headers arrive.

        ``policy``: ``"p2c"``, ``"random"``, ``"round_robin"`` or a function. ``connections``: options of the built-in
        connections to instances. ``transport``: an httpx transport to use instead of those. ``observer``: is told of
        calls, attempts, and what happens to instances (``registry.telemetry``). ``zone``: where this process runs.
        """
        self.observers = Observers(observer)
        self._resolver = resolver
        self._retry = retry or RetryPolicy()
        self._deadline = math.inf if deadline is None else deadline
        self._policy: Policy = policy
        self._ejection = ejection or EjectionPolicy()
        self._zone: str | None = None
        self.use_zone(zone)
        self._upstreams: dict[tuple[str, str | None], Upstream] = {}
        self._connections, self._inner = connections or ConnectionOptions(), transport
        self._sender = self._new_sender()
        named_pick(policy)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        terms = Terms(tag=request.extensions.get("tag"), deadline=time.time() + self._deadline)
        return await self.send(request, terms)

    async def send(self, request: httpx.Request, terms: Terms) -> httpx.Response:
        """What ``handle_async_request`` does, on terms that a request can't carry."""
        if request.url.port is not None:
            raise InvalidInputError(f"{str(request.url)!r} names a port: leave it out, the registry knows it")
        host = request.url.raw_host.decode("ascii")
        upstream = self._upstream(
            terms.service or host, terms.tag, check_known_service if terms.service else check_service
        )
        upstream.budget.deposit()
        call = Call(request, upstream, terms)
        try:
            response = await self._until_answered(call)
        except BaseException as error:
            call.end(error)
            raise
        call.end(response)
        return response

    async def _until_answered(self, call: Call) -> httpx.Response:
        if call.left() <= 0:
            raise httpx.ConnectTimeout("the deadline has passed: nothing was sent", request=call.request)
        while True:
            endpoint = await self._next_endpoint(call)
            if endpoint is None:
                return call.give_up()
            await call.discard()
            # Who tries out an instance that hung must not hang with it.
            send = self._hedged if call.hedge or (call.safe and endpoint.doubtful) else self._attempt
            call.outcome, failure = await send(call, Attempt(call, endpoint))
            if failure is None and isinstance(call.outcome, httpx.Response):
                return call.outcome
            if failure is None or not self._goes_on(call, failure):
                return call.give_up()

    def use_peers(self, peers: Peers | None) -> None:
        """Calls instances of the mesh by it, unless ``connections`` names others; before the first call."""
        if self._connections.peers is None:
            self._connections = replace(self._connections, peers=peers)
            self._sender = self._new_sender()

    def use_zone(self, zone: str | None) -> None:
        """Prefers instances of this zone, unless it was made with a ``zone``; before the first call."""
        if self._zone is None and zone is not None:
            self._zone = check_zone(zone)

    def _new_sender(self) -> Sender:
        return H11Sender(self._connections) if self._inner is None else HttpxSender(self._inner, self._connections)

    def explain(self, service: str, tag: str | None = None) -> Explanation:
        """The state of each instance in this process: why it is picked or not. Reads memory only, never blocks."""
        return self._upstream(service, tag).explain()

    def explain_all(self) -> tuple[Explanation, ...]:
        """The same of every (service, tag) that was called and is still known."""
        return tuple(upstream.explain() for upstream in self._upstreams.values())

    async def _next_endpoint(self, call: Call) -> Endpoint | None:
        """Whom to ask next, after a back-off if all were asked or it is too early; None: the last outcome has to do."""
        if not call.too_early:
            endpoint = await call.upstream.pick(call.tried, safe=call.safe)
            if endpoint is not None or call.outcome is None:
                return endpoint
        delay = self._retry.delay(call.attempt, call.retry_after())
        left = call.left()
        if call.upstream.pool.failing_fast_for or delay >= (self._retry.max_wait if left == math.inf else left):
            return None
        try:
            await asyncio.sleep(delay)
        except asyncio.CancelledError:
            await call.discard()
            raise
        call.tried.clear()
        try:
            return await call.upstream.pick(call.tried, safe=call.safe)
        except RegistryError:
            return None  # There is nobody left to ask, but the last outcome says more.

    def _goes_on(self, call: Call, failure: Failure) -> bool:
        call.seen = call.seen or not failure.without_effect
        call.too_early = failure is Failure.TOO_EARLY
        return (
            call.attempt < self._retry.max_retries
            and self._retry.allows(failure, idempotent=call.idempotent, replayable=call.replayable)
            and (failure.without_effect or not call.retried_before)
            and call.left() > ((call.retry_after() or 0.0) if call.too_early else 0.0)
            and call.upstream.may_retry(call.failed)
        )

    async def _attempt(self, call: Call, attempt: Attempt) -> tuple[Outcome, Failure | None]:
        """Sends once. Raises: what the source of the request's body raises."""
        with attempt:
            attempt.outcome = await self._sender.send(
                call.request, attempt.endpoint.instance, attempt.headers, call.attempt_limit(), read=call.terms.read
            )
        assert attempt.outcome is not None
        return attempt.outcome, attempt.failure

    async def _hedged(self, call: Call, attempt: Attempt) -> tuple[Outcome, Failure | None]:
        """Sends once more, to another instance, when the answer takes longer than most; the first success wins."""
        started, endpoint, upstream = time.monotonic(), attempt.endpoint, call.upstream
        attempts = [asyncio.ensure_future(self._attempt(call, attempt))]
        returned = None
        try:
            done, running = await asyncio.wait(attempts, timeout=upstream.p95())
            if not done and call.attempt < self._retry.max_retries:
                second = await upstream.pick(call.tried, safe=True)
                if second is not None and upstream.budget.withdraw():
                    call.seen = True
                    attempts.append(asyncio.ensure_future(self._attempt(call, Attempt(call, second, hedge=True))))
                    running.add(attempts[-1])
            while not done or (running and all(task.result()[1] for task in done)):
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            returned = min(done, key=lambda task: task.result()[1] is not None)
            if returned is not attempts[0]:
                # Were only the others counted, what is slow would be ever less, and every call be hedged in the end.
                upstream.latencies.append(time.monotonic() - started)
                if endpoint.doubtful and not attempts[0].done():
                    # Silent again where another answered: a failure, or it would be tried out at every turn.
                    silent = time.monotonic() - started
                    upstream.pool.failed(endpoint, Failure.SENT, silent, "timeout", f"silent for {silent:.3f} s")
            return returned.result()
        finally:
            if len(attempts) > 1:
                upstream.hedged(won=returned is attempts[1])
            losers = [task for task in attempts if task is not returned]
            for task in losers:
                task.cancel()
            for lost in await asyncio.gather(*losers, return_exceptions=True):
                if isinstance(lost, tuple) and isinstance(lost[0], httpx.Response):
                    await lost[0].aclose()

    def _upstream(self, service: str, tag: str | None, check: Callable[[str], str] = check_known_service) -> Upstream:
        service = service.lower()
        upstream = self._upstreams.get((service, tag))
        if upstream is None:
            check(service)
            roster = Roster(self._ejection, self._connections.max_instances)
            pool = Pool(service, named_pick(self._policy), time.monotonic, self.observers, self._zone, roster)
            upstream = Upstream(self._resolver, pool, tag, self._retry, self.observers)
            self._upstreams = {key: known for key, known in self._upstreams.items() if known.pool.knows_any}
            self._upstreams[service, tag] = upstream
        return upstream

    async def aclose(self) -> None:
        await self._sender.aclose()
        await self._resolver.aclose()

    def handle_request(self, request: httpx.Request) -> NoReturn:
        """Says what to do instead: ``httpx.Client`` calls it."""
        raise InvalidInputError(
            "DiscoveryTransport is for httpx.AsyncClient: give httpx.Client a SyncDiscoveryTransport"
        )

    def __enter__(self) -> NoReturn:
        self.handle_request(httpx.Request("GET", "http://service"))

    def __exit__(self, *_: object) -> None: ...

    def close(self) -> None:
        """Does nothing: ``httpx.Client`` calls it."""
