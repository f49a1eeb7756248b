"""A good citizen written without the package, for test_conformance.py: raw ASGI, and Consul's HTTP API by hand.

It promises everything that the package does. The variable MUTANT names what it does wrong, separated by commas.
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

MUTANT = set(os.environ.get("MUTANT", "").split(", "))
CONSUL = f"http://{os.environ['CONSUL_HTTP_ADDR']}/v1/agent/service"
NAME, PORT = os.environ["SERVICE_NAME"], int(os.environ["SERVICE_PORT"])
ADDRESS = "127.0.0.1"
REGISTERED_PORT = int(os.environ.get("REGISTERED_PORT", PORT))
ID = f"{NAME}-{ADDRESS}-{PORT}"
if "id is the name" in MUTANT:
    ID = NAME
elif "id is shared" in MUTANT:
    ID = f"{NAME}-1"
SICK = Path(os.environ["DIRECTORY"], "sick")


def put(path: str, body: object = None) -> None:
    request = urllib.request.Request(f"{CONSUL}/{path}", json.dumps(body).encode(), method="PUT")
    with contextlib.suppress(urllib.error.HTTPError):  # deregistering what is not there
        urllib.request.urlopen(request, timeout=5).close()


def register() -> None:
    path = "/health" if "check names nobody" in MUTANT else f"/health?instance={ID}"
    path = "/ping" if "check asks /ping" in MUTANT else path
    host = "localhost" if "check asks another address" in MUTANT else ADDRESS
    check = {"HTTP": f"http://{host}:{REGISTERED_PORT}{path}", "Interval": "1s", "Timeout": "1s"}
    if "check by TTL" in MUTANT:
        check = {"TTL": "60s"}
    entry = {"ID": ID, "Name": NAME, "Address": ADDRESS, "Port": REGISTERED_PORT}
    if "registers no check" not in MUTANT:
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
            if "does not come back" in MUTANT:
                return
        await asyncio.sleep(0.1)


async def run(receive: Receive, send: Send) -> None:
    """The ASGI lifespan: registered from here (a good one would first see its port answer) until SIGTERM."""
    await receive()
    present = asyncio.create_task(stay_registered()) if "does not register" not in MUTANT else None
    server, loop = signal.getsignal(signal.SIGTERM), asyncio.get_running_loop()
    assert callable(server)

    async def leave(number: int) -> None:
        if present:
            present.cancel()
        if not MUTANT & {"does not deregister", "deregisters too late"}:
            await asyncio.to_thread(put, f"deregister/{ID}")
        await asyncio.sleep(0.0 if MUTANT & {"does not drain", "deregisters too late"} else 1.0)
        if "does not end" not in MUTANT:
            server(number, None)

    def terminate(number: int, _: types.FrameType | None) -> None:
        loop.call_soon_threadsafe(lambda: leaving.append(loop.create_task(leave(number))))

    leaving: list[asyncio.Task[None]] = []
    signal.signal(signal.SIGTERM, terminate)
    await send({"type": "lifespan.startup.complete"})
    await receive()
    if "deregisters too late" in MUTANT:
        await asyncio.sleep(0.3)
        await asyncio.to_thread(put, f"deregister/{ID}")
    await send({"type": "lifespan.shutdown.complete"})


def health(asked: str | None) -> tuple[int, object]:
    if asked not in (None, ID) and "answers for anybody" not in MUTANT:
        return 404, {"detail": f"this is {ID}"}
    if "has no health" in MUTANT or ("disowns itself" in MUTANT and asked == ID):
        return 404, None
    sick = SICK.exists() or bool(MUTANT & {"healthy while sick", "sick without a reason"})
    shown = sick and "sick without a reason" not in MUTANT
    states = {"database": {"status": "unhealthy" if shown else "healthy"}}
    if "names no components" in MUTANT:
        return 200, {"status": "ok"}
    status = 503 if sick and "healthy while sick" not in MUTANT else 200
    said = "healthy" if status == 200 and "contradicts itself" not in MUTANT else "unhealthy"
    return status, {"status": said, "components": states}


def answer(scope: Scope) -> tuple[int, object]:
    stamp = next((value.decode() for name, value in scope["headers"] if name == b"x-request-deadline"), "")
    if "takes any deadline for late" in MUTANT and stamp:
        return 504, None
    with contextlib.suppress(ValueError):
        if float(stamp) < time.time() and "ignores the deadline" not in MUTANT:
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
    if "does not sign" in MUTANT or ("does not sign errors" in MUTANT and status == 404):
        headers.pop()
    elif "changes its name" in MUTANT:
        headers[-1] = (b"x-service-instance", b"%d" % time.time_ns())
    elif "signs with another id" in MUTANT:
        headers[-1] = (b"x-service-instance", b"somebody")
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})
