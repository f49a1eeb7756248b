"""uvicorn[standard] runs services on uvloop, which offers less than asyncio's own loop."""

import dataclasses

import pytest
import uvloop

from registry import ServiceDiscoveryClient, StaticResolver
from tests.support.server import Answer, Serve


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_call_works_on_uvloop(serve: Serve, host: str) -> None:
    """An instance is reached at its address, and by a name that has several."""
    instance = dataclasses.replace(serve(lambda _: Answer(200, b"ok")).of("cards"), address=host)

    async def call() -> str:
        async with ServiceDiscoveryClient(StaticResolver({"cards": [instance]}), max_retries=1) as client:
            return (await client.get("cards", "/")).text

    assert uvloop.run(call()) == "ok"
