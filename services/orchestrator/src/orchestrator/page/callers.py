"""The callers' side of the page: every instance is asked for its state once a second, while somebody looks.

Asked directly, at the address that Consul lists, and only if its metadata say that it answers. An instance that hangs
holds up no other, and what it answers is bounded in size, time and content.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeAlias

import httpx
from pydantic import ValidationError

from orchestrator.page.state import Event, Spot, State, Upstream
from orchestrator.registry import Instance
from registry import ConnectionOptions
from registry.discovery.peers import Peers
from registry.discovery.sender import H11Sender
from registry.state import STATE_PATH

__all__ = ["Caller", "Callers", "Rates", "Told", "Usage"]

TIMEOUT = 0.9
MAX_BYTES = 2**23
_INSTANCE = "orchestrator.instance"
MAX_A_SECOND = 100
"""Questions: of more instances, each is asked in its turn."""
WINDOW = 10.0
"""Seconds over which calls per second and shares of picks are taken."""

Key: TypeAlias = tuple[str, str, int]
Usage: TypeAlias = tuple[str, str | None]
"""A service that is called, and with which tag."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What one caller did in the last seconds; None: it was not asked often enough to say."""

    seconds: float
    calls: float
    retries: float
    picks: Mapping[Spot, int]
    """By the instance's id and address."""


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    calls: int
    retries: int
    picks: Mapping[Spot, int]


@dataclass(frozen=True, slots=True)
class Told:
    """What one instance told last; never changes."""

    instance: Instance
    state: State | None
    """Its last answer; None: there was none yet."""
    age: float | None
    """Seconds since then."""
    error: str | None
    """Why it did not tell last; None: it did."""
    silent: bool
    """Whether nothing came from it at all."""
    rates: Mapping[Usage, Rates]


class Caller:
    """One instance that tells what it sees, and has told before."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.state: State | None = None
        self.error: str | None = None
        self.silent = False
        self._news: list[Event] = []
        self.after = 0
        """The number of the last event that is known."""
        self._heard = 0.0
        self._samples: dict[Usage, deque[_Sample]] = {}

    def take_news(self) -> Iterator[tuple[str, Event]]:
        """Events since the last time, each with who saw it."""
        news, self._news = self._news, []
        return ((self.instance.id, event) for event in news)

    def freeze(self, now: float) -> Told:
        """As it stands."""
        rates = {usage: rates for usage in self._samples if (rates := self._rates(usage))}
        return Told(
            self.instance, self.state, now - self._heard if self.state else None, self.error, self.silent, rates
        )

    def _rates(self, usage: Usage) -> Rates | None:
        samples = self._samples[usage]
        if len(samples) < 2:
            return None
        first, last = samples[0], samples[-1]
        seconds = last.at - first.at
        picks = {name: count - first.picks.get(name, 0) for name, count in last.picks.items()}
        return Rates(
            seconds=seconds,
            calls=(last.calls - first.calls) / seconds,
            retries=(last.retries - first.retries) / seconds,
            picks={name: count for name, count in picks.items() if count > 0},
        )

    def told(self, state: State, at: float) -> bool:
        """It answered. Returns whether more is to be asked: another process answers under its name."""
        if self.state is not None and self.state.instance.started != state.instance.started:
            asked_after, self.after = self.after, 0
            self._samples.clear()
            if asked_after:
                return True
        self.state, self._heard, self.error, self.silent = state, at, None, False
        self._news += [event for event in state.events if event.number > self.after]
        self.after = max([self.after, *(event.number for event in state.events)])
        used = {(upstream.service, upstream.tag) for upstream in state.upstreams}
        self._samples = {usage: samples for usage, samples in self._samples.items() if usage in used}
        for upstream in state.upstreams:
            self._sample(upstream, at)
        return False

    def _sample(self, upstream: Upstream, at: float) -> None:
        samples = self._samples.setdefault((upstream.service, upstream.tag), deque())
        sample = _Sample(
            at,
            sum(upstream.calls.values()),
            sum(upstream.retries.values()),
            {endpoint.spot: endpoint.picks for endpoint in upstream.endpoints},
        )
        if samples and sample.calls < samples[-1].calls:  # it forgot the service meanwhile, and starts anew
            samples.clear()
        samples.append(sample)
        while len(samples) > 2 and at - samples[0].at > WINDOW:
            samples.popleft()


class _Direct(httpx.AsyncBaseTransport):
    """To the very instance that a request names in its extensions, over mutual TLS where it is of the mesh."""

    def __init__(self, options: ConnectionOptions) -> None:
        self._sender = H11Sender(options)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self._sender.send(request, request.extensions[_INSTANCE], {}, None, read=False)

    async def aclose(self) -> None:
        await self._sender.aclose()


class Callers:
    """Asks, within ``async with``; ``changed`` is called when one that was late has answered.

    ``peers``: by which instances of the mesh are asked.
    """

    def __init__(self, changed: Callable[[], None], peers: Peers | None = None) -> None:
        self._changed = changed
        self._known: dict[Key, Caller] = {}
        self._pending: dict[Key, asyncio.Task[None]] = {}
        self._turn: dict[Key, None] = {}
        """Whom to ask next, in this order."""
        self._client = httpx.AsyncClient(
            timeout=TIMEOUT,
            transport=_Direct(ConnectionOptions(max_connections=2 * MAX_A_SECOND, peers=peers)),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in tuple(self._pending.values()):
            task.cancel()
        if self._pending:
            await asyncio.wait(tuple(self._pending.values()))
        await self._client.aclose()

    def all(self) -> tuple[Caller, ...]:
        """Sorted by id."""
        return tuple(self._known[key] for key in sorted(self._known))

    def follow(self, instances: Iterable[Instance]) -> None:
        """Who is to be asked from now on; what others told is forgotten."""
        present = {each.key: each for each in instances if each.meta.get("state_path") == STATE_PATH}
        self._known = {key: caller for key, caller in self._known.items() if key in present}
        for key, instance in present.items():
            self._known.setdefault(key, Caller(instance)).instance = instance
        self._turn = dict.fromkeys([*(key for key in self._turn if key in present), *present])

    async def ask(self, patience: float) -> None:
        """One round: asks all whose turn it is, and waits for their answers, but at most so many seconds."""
        for key in tuple(self._turn)[:MAX_A_SECOND]:
            del self._turn[key]
            self._turn[key] = None
            if key not in self._pending:
                self._pending[key] = asyncio.create_task(self._ask(key, self._known[key]), name=f"page: {key[0]}")
        if self._pending:
            _, late = await asyncio.wait(tuple(self._pending.values()), timeout=patience)
            for task in late:
                task.add_done_callback(lambda _: self._changed())

    async def _ask(self, key: Key, caller: Caller) -> None:
        try:
            async with asyncio.timeout(TIMEOUT):
                while caller.told(await self._read(caller), time.monotonic()):
                    pass
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValidationError, TimeoutError) as error:
            caller.error = _in_words(error)
            caller.silent = isinstance(error, httpx.TransportError | TimeoutError)
        finally:
            del self._pending[key]

    async def _read(self, caller: Caller) -> State:
        instance = caller.instance
        url = f"{instance.scheme}://{instance.netloc}{STATE_PATH}"
        question = self._client.stream("GET", url, params={"after": caller.after}, extensions={_INSTANCE: instance})
        async with question as answer:
            answer.raise_for_status()
            body = bytearray()
            async for part in answer.aiter_bytes():
                body += part
                if len(body) > MAX_BYTES:
                    raise OSError(f"its answer is larger than {MAX_BYTES >> 20} MiB")
        return State.model_validate_json(bytes(body))


def _in_words(error: Exception) -> str:
    match error:
        case httpx.HTTPStatusError():
            return f"answers {error.response.status_code}"
        case TimeoutError() | httpx.TimeoutException():
            return f"does not answer within {TIMEOUT:g} s"
        case httpx.ConnectError():
            return "refuses connections"
        case ValidationError():
            return "gives an answer that could not be understood"
        case _:
            return str(error) or type(error).__name__
