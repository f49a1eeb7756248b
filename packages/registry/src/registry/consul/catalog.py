"""The names of all services: a blocking query that Consul answers when a service or an instance came or went.

Source: https://developer.hashicorp.com/consul/api-docs/catalog#list-services
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, TypeAlias

from consul.callback import CB

from registry.consul.connection import AsyncConsul, UnprovenEmptyError, consul_errors
from registry.consul.watch import WAIT, TokenBucket, next_index
from registry.errors import RegistryUnavailableError

__all__ = ["Names", "watch_names"]

Names: TypeAlias = Mapping[str, Sequence[str]]
"""Each service with the tags of its instances."""


async def watch_names(consul: AsyncConsul) -> AsyncIterator[Names]:
    """All names, at once and then after each answer, changed or not; goes on until it is closed.

    Raises: RegistryUnavailableError, RegistryError. Ask anew after a pause: what was known is then told again.
    """
    index, rate = 0, TokenBucket(per_second=5, burst=20)
    while True:
        await rate.pause()
        params = [("index", str(index)), ("wait", f"{WAIT}s")] if index else []
        with consul_errors(consul.settings):
            try:
                raw_index, names = await consul.http.get(CB.json(index=True), "/v1/catalog/services", params)
            except UnprovenEmptyError as unproven:
                raw_index, names = unproven.index, {}
        yield _checked(names, consul)
        index = next_index(index, int(raw_index))


def _checked(names: Any, consul: AsyncConsul) -> Names:
    if not isinstance(names, dict):
        raise RegistryUnavailableError(f"Consul at {consul.settings.url} sent a broken answer: {str(names)[:100]}")
    return {name: tuple(map(str, tags or ())) for name, tags in names.items()}
