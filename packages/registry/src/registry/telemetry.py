"""What can be seen of calls, instances, watches and presence: an observer, and what it is told.

Nothing observes by default, and nothing is then built for it. An observer is given to ``lifespan``, to a client or
transport, or to a resolver; its methods run on the event loop, within the call: they must not block.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from registry.model import Instance

__all__ = [
    "AttemptOutcome",
    "CallOutcome",
    "Event",
    "EventKind",
    "Journal",
    "ObservedAttempt",
    "ObservedCall",
    "Observer",
    "Observers",
    "PickReason",
]

logger = logging.getLogger("registry")

CallOutcome: TypeAlias = Literal["ok", "status", "no_instance", "failing_fast", "deadline", "cancelled", "error"]
"""``status``: an answer of 400 or above. ``error``: what the last attempt raised, or the source of the body."""
AttemptOutcome: TypeAlias = Literal[
    "ok", "status", "shed", "refused", "connect_timeout", "timeout", "broken", "not_sent", "cancelled", "error"
]
"""``status``: an answer that counts as a failure, by default a 5xx. ``shed``: one that says it executed nothing.

``cancelled``: by the caller, or a hedge that lost. ``not_sent``: for a reason that does not speak against the instance.
``error``: anything else, as what the source of the body raised.
"""
PickReason: TypeAlias = Literal[
    "p2c_cost",
    "p2c_turn",
    "policy",
    "only",
    "probe",
    "half_open",
    "trusted",
    "last_resort",
    "zone_few",
    "zone_slow",
    "zone_sample",
]
"""Why an instance was picked: the cheaper of two; the one further behind its share of two that cost about the same;
by another policy; there is only one; to see whether an ejected one is back; likewise, when every one fails; since it
has not failed lately, for a call that can't be repeated; the registry no longer lists it, and nobody else is left;
although it is in another zone: as the own one has too few, or is slow; to know how long answers take elsewhere."""
EventKind: TypeAlias = Literal[
    "joined",
    "left",
    "ejected",
    "reinstated",
    "probed",
    "failing_fast",
    "recovered",
    "watch_lost",
    "watch_back",
    "watch_changed",
    "registered",
    "withdrawn",
    "in_doubt",
]
"""Of an instance: joined to withdrawn callers' lists; of a service: failing fast and recovered; of its watch; of us."""


class _Answer(Protocol):
    status_code: int


class _Observed:
    """What ends: how, after how long, with which status or error; each is None until then."""

    __slots__ = ("error", "outcome", "seconds", "status")

    seconds: float | None
    status: int | None
    error: BaseException | None

    def end(self, outcome: Any, seconds: float, result: _Answer | BaseException) -> None:
        """It has ended so."""
        self.outcome, self.seconds = outcome, seconds
        if isinstance(result, BaseException):
            self.error = result
        else:
            self.status = result.status_code


class ObservedCall(_Observed):
    """One call, from its beginning on; a redirect within the service is a call of its own."""

    __slots__ = ("_url", "attempts", "method", "service", "started")

    def __init__(self, service: str, method: str, url: str | Callable[[], str]) -> None:
        self.service = service
        self.method = method
        self._url = url
        self.started = time.monotonic()
        self.attempts = 0
        self.outcome: CallOutcome | None = None
        self.status: int | None = None
        """Of the answer; None also if there was none."""
        self.error: BaseException | None = None
        self.seconds: float | None = None
        """Until the answer's head, or its end if the facade reads it."""

    @property
    def url(self) -> str:
        """Without query and credentials; made when it is asked for: that takes longer than all else here."""
        return self._url if isinstance(self._url, str) else self._url()


class ObservedAttempt(_Observed):
    """One attempt of a call; ``headers`` are sent in place of the caller's own of the same name."""

    __slots__ = ("call", "headers", "hedge", "instance", "number", "reason")

    def __init__(
        self,
        call: ObservedCall,
        number: int,
        instance: Instance,
        reason: PickReason,
        headers: dict[str, str],
        *,
        hedge: bool = False,
    ) -> None:
        call.attempts = number
        self.call = call
        self.number = number
        """1-based: one above the number of resends so far."""
        self.instance = instance
        self.reason = reason
        self.headers = headers
        self.hedge = hedge
        """Whether it was sent because the one before took long."""
        self.outcome: AttemptOutcome | None = None
        self.status: int | None = None
        self.error: BaseException | None = None
        self.seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to an instance, a service or its watch, as this process sees it."""

    kind: EventKind
    service: str
    instance: str | None = None
    reason: str = ""
    """One of a few words: an AttemptOutcome of what ejected it; how it left, as in LeftOut; why it was registered."""
    detail: str = ""
    """For people to read."""
    seconds: float | None = None
    """For how long."""
    at: float = field(default_factory=time.time)
    """Unix time."""


class Observer:
    """What is told; override what you need. Keep what belongs to a call under the object itself, as in a dict.

    Each begun is followed by its ended, in the same task. What a method raises is logged, and harms no call.
    """

    def call_begun(self, call: ObservedCall) -> None:
        """Nothing was sent yet."""

    def call_ended(self, call: ObservedCall) -> None:
        """Its outcome is known."""

    def attempt_begun(self, attempt: ObservedAttempt) -> None:
        """An instance was picked; ``attempt.headers`` may be added to."""

    def attempt_ended(self, attempt: ObservedAttempt) -> None:
        """Its outcome is known."""

    def happened(self, event: Event) -> None:
        """Not often: only when something changes."""


class Observers(Observer):
    """Several as one: tells each what it has a method for."""

    def __init__(self, *several: Observer | None) -> None:
        self.each: list[Observer] = []
        self.of_calls = self.of_events = False
        """Whether anybody wants to hear of calls and attempts; of events."""
        hears = ("call_begun", "call_ended", "attempt_begun", "attempt_ended", "happened")
        self._methods: dict[str, list[Callable[[Any], None]]] = {method: [] for method in hears}
        for method, methods in self._methods.items():
            setattr(self, method, _teller(methods))  # With no lookup left to do: it is part of every call.
        for one in several:
            self.add(one)

    def add(self, observer: Observer | None) -> None:
        """Tells this one, too, from now on; once, however often it is added."""
        for one in observer.each if isinstance(observer, Observers) else [observer]:
            if one is None or one in self.each:
                continue
            self.each.append(one)
            for method, methods in self._methods.items():
                if getattr(type(one), method, None) is not getattr(Observer, method):
                    methods.append(getattr(one, method))
        *of_calls, self.of_events = map(bool, self._methods.values())
        self.of_calls = any(of_calls)


class Journal(Observer):
    """The last events, numbered from 1 on; without probes, which would leave room for nothing else."""

    def __init__(self, size: int = 200) -> None:
        self._events: deque[tuple[int, Event]] = deque(maxlen=size)
        self._number = 0

    def happened(self, event: Event) -> None:
        if event.kind != "probed":
            self._number += 1
            self._events.append((self._number, event))

    def __iter__(self) -> Iterator[tuple[int, Event]]:
        return iter(tuple(self._events))


def _teller(methods: Sequence[Callable[[Any], None]]) -> Callable[[Any], None]:
    def tell(news: object) -> None:
        for method in methods:
            try:
                method(news)
            except Exception:
                logger.exception("an observer failed, and was ignored")

    return tell
