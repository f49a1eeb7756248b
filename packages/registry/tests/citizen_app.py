"""A good citizen written without the package, for test_conformance.py: raw ASGI, and Consul's HTTP API by hand.

It promises everything that the package does. The variable MUTANT names what it does wrong.
"""

import asyncio
import contextlib
import json
import os
import signal
import time
import types
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MUTANT = os.environ.get("MUTANT", "")
CONSUL = f"http://{os.environ['CONSUL_HTTP_ADDR']}/v1/agent/service"
NAME, PORT = os.environ["SERVICE_NAME"], int(os.environ["SERVICE_PORT"])
ADDRESS = "127.0.0.1"
REGISTERED_PORT = int(os.environ.get("REGISTERED_PORT", PORT))
ID = {"id is the name": NAME, "id is shared": f"{NAME}-1"}.get(MUTANT, f"{NAME}-{ADDRESS}-{PORT}")
SICK = Path(os.environ["DIRECTORY"], "sick")


def put(path: str, body: object = None) -> None:
    request = urllib.request.Request(f"{CONSUL}/{path}", json.dumps(body).encode(), method="PUT")
    with contextlib.suppress(urllib.error.HTTPError):  # deregistering what is not there
        urllib.request.urlopen(request, timeout=5).close()


def register() -> None:
    path = {"check asks /ping": "/ping", "check names nobody": "/health"}.get(MUTANT, f"/health?instance={ID}")
    check = {"HTTP": f"http://127.0.0.1:{REGISTERED_PORT}{path}", "Interval": "1s", "Timeout": "1s"}
    if MUTANT == "check by TTL":
        check = {"TTL": "60s"}
    entry = {"ID": ID, "Name": NAME, "Address": ADDRESS, "Port": REGISTERED_PORT}
    if MUTANT != "registers no check":
        entry["Check"] = check | {"Status": "passing"}
    put("register", entry)


def known() -> bool:
    try:
        urllib.request.urlopen(f"{CONSUL}/{ID}", timeout=5).close()
    except urllib.error.HTTPError:
        return False
    return True


async def stay_registered() -> None:
    while True:
        if not await asyncio.to_thread(known):
            await asyncio.to_thread(register)
            if MUTANT == "does not come back":
                return
        await asyncio.sleep(0.1)


async def run(receive: Receive, send: Send) -> None:
    """The ASGI lifespan: registered from here (a good one would first see its port answer) until SIGTERM."""
    await receive()
    present = asyncio.create_task(stay_registered()) if MUTANT != "does not register" else None
    server, loop = signal.getsignal(signal.SIGTERM), asyncio.get_running_loop()
    assert callable(server)

    async def leave(number: int) -> None:
        if present:
            present.cancel()
        if MUTANT not in {"does not deregister", "deregisters too late"}:
            await asyncio.to_thread(put, f"deregister/{ID}")
        await asyncio.sleep(0.0 if MUTANT in {"does not drain", "deregisters too late"} else 0.5)
        if MUTANT != "does not end":
            server(number, None)

    def terminate(number: int, _: types.FrameType | None) -> None:
        loop.call_soon_threadsafe(lambda: leaving.append(loop.create_task(leave(number))))

    leaving: list[asyncio.Task[None]] = []
    signal.signal(signal.SIGTERM, terminate)
    await send({"type": "lifespan.startup.complete"})
    await receive()
    if MUTANT == "deregisters too late":
        await asyncio.sleep(0.3)
        await asyncio.to_thread(put, f"deregister/{ID}")
    await send({"type": "lifespan.shutdown.complete"})


def health(asked: str | None) -> tuple[int, object]:
    if asked not in (None, ID) and MUTANT != "answers for anybody":
        return 404, {"detail": f"this is {ID}"}
    sick = SICK.exists() or MUTANT in {"healthy while sick", "sick without a reason"}
    shown = sick and MUTANT != "sick without a reason"
    states = {"database": {"status": "unhealthy" if shown else "healthy"}}
    if MUTANT == "names no components":
        return 200, {"status": "ok"}
    status = 503 if sick and MUTANT != "healthy while sick" else 200
    return status, {"status": "healthy" if status == 200 else "unhealthy", "components": states}


def answer(scope: Scope) -> tuple[int, object]:
    stamp = next((value.decode() for name, value in scope["headers"] if name == b"x-request-deadline"), "")
    if MUTANT == "takes any deadline for late" and stamp:
        return 504, None
    with contextlib.suppress(ValueError):
        if float(stamp) < time.time() and MUTANT != "ignores the deadline":
            return 504, {"detail": "too late"}
    if scope["path"] == "/health":
        return health(parse_qs(scope["query_string"].decode()).get("instance", [None])[0])
    return (200, None) if scope["path"] in {"/", "/ping"} else (404, None)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await run(receive, send)
        return
    status, body = answer(scope)
    headers = [(b"content-type", b"application/json"), (b"x-service-instance", ID.encode())]
    if MUTANT == "does not sign" or (MUTANT == "does not sign errors" and status == 404):
        headers.pop()
    elif MUTANT == "signs with another id":
        headers[-1] = (b"x-service-instance", b"somebody")
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})
