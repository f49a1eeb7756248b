"""Kept-alive connections that the instance has closed: a POST must not be lost on one."""

import socket

from registry import ServiceDiscoveryClient, StaticResolver
from tests.support.server import Serve


async def test_a_post_never_takes_a_connection_that_the_event_loop_does_not_know_to_be_closed(serve: Serve) -> None:
    """A close that arrived but was not yet noticed costs a new connection, not the POST."""
    server = serve()
    async with ServiceDiscoveryClient(StaticResolver({"cards": [server.of("cards")]})) as client:
        await client.post("cards", "/cards", json={})
        (connection,) = server.connections
        # Without a turn of the event loop between this and the next request.
        connection.shutdown(socket.SHUT_RDWR)
        assert (await client.post("cards", "/cards", json={})).status_code == 200
    assert len(server.requests) == 2
