"""A blocking query repeated for ever: what Consul says, and what it says once that has changed.

Source: https://developer.hashicorp.com/consul/api-docs/features/blocking
"""

import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from consul.base import Response
from consul.callback import CB

from registry.consul.connection import AsyncConsul, Params, consul_errors
from registry.consul.watch import WAIT, TokenBucket, next_index
from registry.errors import RegistryUnavailableError

__all__ = ["Answer", "changes"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What Consul said; ``content`` is its JSON, an object."""

    content: Mapping[str, Any]
    headers: Mapping[str, str]
    index: int


async def changes(
    consul: AsyncConsul, path: str, params: Params = None, *, consistent: bool = False
) -> AsyncGenerator[Answer, None]:
    """The answer at once, then again whenever it changed or ``WAIT`` is over; goes on until it is closed.

    ``consistent``: the first is the leader's. A restarted server answers with half of what it knows while it replays
    its log.

    Raises: RegistryUnavailableError, RegistryError. Ask anew after a pause: what was known is then told again.
    """
    index, rate = 0, TokenBucket(per_second=20, burst=20)  # even in a storm of changes, each is heard within 50 ms
    while True:
        await rate.pause()
        parked = [("index", str(index)), ("wait", f"{WAIT}s")] if index else [("consistent", "1")] * consistent
        with consul_errors(consul.settings):
            answer: Answer = await consul.http.get(_read, path, [*(params or ()), *parked])
        yield answer
        index = next_index(index, answer.index)


def _read(response: Response) -> Answer:
    index, content = CB.json(index=True, allow_404=False)(response)
    if not isinstance(content, dict):
        raise RegistryUnavailableError(f"Consul sent a broken answer: {json.dumps(content)[:100]}")
    return Answer(content, response.headers, int(index))
