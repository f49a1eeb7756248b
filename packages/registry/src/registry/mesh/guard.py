"""Who is let in: decided for each request, before the app sees it."""

import logging
from collections.abc import Callable
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry.logs import set_fields
from registry.mesh.identity import MeshIdentity
from registry.mesh.intentions import Intentions
from registry.problems import problem

__all__ = ["CALLER", "Guard", "only_judged"]

logger = logging.getLogger("registry")

CALLER = "registry.caller"
"""The key under which a scope names the calling service; None: it is let in without a name. Absent: not judged."""
POLICY_VIOLATION = 1008
"""Closes a websocket. Source: RFC 6455, 7.4.1."""

_caller: ContextVar[str | None] = ContextVar("caller", default=None)


class Guard:
    """Lets a request in if its caller proved to be a service of the mesh that an intention allows; else it gets 403.

    ``GET`` of ``health_path`` is for everybody: Consul's agent has no certificate of the mesh, and no intention allows
    the own registrar. ``instance_id`` names this instance, so that a refusal is signed like any other response.
    """

    def __init__(
        self, identity: MeshIdentity, intentions: Intentions, health_path: str, instance_id: Callable[[], str | None]
    ) -> None:
        self.identity = identity
        self._intentions = intentions
        self._health_path = health_path.partition("?")[0]
        self._instance_id = instance_id
        set_fields("caller", lambda: {"caller": _caller.get()})

    def around(self, app: ASGIApp, peer: str | None, flaw: str | None = None) -> ASGIApp:
        """The app for one connection. ``peer``: the SPIFFE id that was verified; ``flaw``: why there is none."""
        caller = self.identity.service_of(peer)
        if caller is None:
            flaw = flaw or (f"{peer} is no service of this mesh" if peer else "no client certificate of the mesh")

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] not in {"http", "websocket"}:
                await app(scope, receive, send)
            elif self._is_health_check(scope):
                scope[CALLER] = None
                await app(scope, receive, send)
            elif refusal := self._refusal(caller, flaw):
                await self._refuse(refusal, scope, receive, send)
            else:
                scope[CALLER] = caller
                scope.setdefault("state", {})["caller"] = caller
                before = _caller.set(caller)
                try:
                    if scope["type"] == "websocket":
                        receive, send = self._judged(caller, receive, send)
                    await app(scope, receive, send)
                finally:
                    _caller.reset(before)

        return serve

    def _refusal(self, caller: str | None, flaw: str | None) -> str | None:
        if caller is None:
            return flaw
        if self._intentions.allows(caller):
            return None
        if not self._intentions.ready.is_set():
            return f"whether {caller} may call {self.identity.service} is not known yet"
        return f"no intention allows {caller} to call {self.identity.service}"

    def _is_health_check(self, scope: Scope) -> bool:
        if scope["type"] != "http" or scope["method"] != "GET":
            return False
        return str(scope["path"]).removeprefix(scope.get("root_path", "")) == self._health_path

    async def _refuse(self, refusal: str, scope: Scope, receive: Receive, send: Send) -> None:
        logger.info("refused: %s", refusal, extra={"path": scope["path"]})
        await refuse(refusal, scope, receive, send, self._instance_id())

    def _judged(self, caller: str | None, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """An open websocket's: each message is judged anew, as each request on an open connection is."""
        closed = False

        async def close() -> None:
            nonlocal closed
            if not closed:
                closed = True
                await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": "no intention allows this"})

        async def judged_receive() -> Message:
            message = await receive()
            if message["type"] != "websocket.receive" or self._refusal(caller, None) is None:
                return message
            await close()
            return {"type": "websocket.disconnect", "code": POLICY_VIOLATION}

        async def judged_send(message: Message) -> None:
            if message["type"] == "websocket.send" and self._refusal(caller, None) is not None:
                await close()
            if not closed:
                await send(message)

        return judged_receive, judged_send


async def refuse(refusal: str, scope: Scope, receive: Receive, send: Send, instance_id: str | None = None) -> None:
    """Answers 403, as a websocket before it is accepted does, too."""
    if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": refusal})
        return
    signature = {"X-Service-Instance": instance_id} if instance_id else {}
    await problem(403, refusal, signature)(scope, receive, send)


def only_judged(app: ASGIApp) -> ASGIApp:
    """Lets in only what a guard has judged: whatever server runs the app, and whatever it does, nothing comes by."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in {"http", "websocket"} and CALLER not in scope:
            await refuse("this service is served by mutual TLS only, and this did not come by it", scope, receive, send)
        else:
            await app(scope, receive, send)

    return serve
