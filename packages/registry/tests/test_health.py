"""``/health``: 200 or 503, which component and why, in bounded time, and only for the instance that was asked."""

import asyncio
import functools
import logging
import time
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from registry import Registrar, ServiceSettings
from registry.fastapi import Check, DegradedError, health_router


async def well() -> None:
    """A component that works."""


async def sick() -> None:
    """A component that fails, with a secret in its message."""
    raise ConnectionError("postgresql://cards:hunter2@db/cards")


async def partly() -> None:
    """A component that works in part."""
    raise DegradedError("the last write failed")


async def hanging() -> None:
    """A component that never answers."""
    await asyncio.Event().wait()


async def impatient() -> None:
    """A component with a time-out of its own."""
    raise TimeoutError("the pool had no connection")


async def ask(path: str = "/health", registrar: object = None, timeout: float = 1.0, **checks: Check) -> httpx.Response:
    """The answer of an app with these checks; checks come as ``name=function``."""
    app = FastAPI()
    app.include_router(health_router(timeout, **checks))
    if registrar is not None:
        app.state.registrar = registrar
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        return await client.get(path)


async def test_healthy_when_every_component_works() -> None:
    """200, with each component by name."""
    answer = await ask(database=well, queue=well)
    assert answer.status_code == 200
    components = {"database": {"status": "healthy"}, "queue": {"status": "healthy"}}
    assert answer.json() == {"status": "healthy", "components": components}


async def test_healthy_without_components() -> None:
    """A service without parts of its own is healthy when it answers, and names none."""
    assert (await ask()).json() == {"status": "healthy"}


async def test_what_works_in_part_is_told_and_stays_in_service() -> None:
    """200 with the reason; beside a component that does not work at all it is 503, and both are named."""
    degraded = {"status": "degraded", "error": "the last write failed"}
    answer = await ask(database=partly, queue=well)
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    assert answer.json()["components"] == {"database": degraded, "queue": {"status": "healthy"}}
    answer = await ask(database=partly, queue=sick)
    assert (answer.status_code, answer.json()["status"]) == (503, "unhealthy")
    assert answer.json()["components"] == {
        "database": degraded,
        "queue": {"status": "unhealthy", "error": "ConnectionError"},
    }


async def test_names_the_failing_component_and_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    """503 names the sick one and the kind of its error; its message is for the log only."""
    answer = await ask(database=sick, queue=well)
    assert answer.status_code == 503
    assert answer.json() == {
        "status": "unhealthy",
        "components": {
            "database": {"status": "unhealthy", "error": "ConnectionError"},
            "queue": {"status": "healthy"},
        },
    }
    (record,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert record.__dict__["component"] == "database"


async def test_hanging_checks_are_time_boxed(caplog: pytest.LogCaptureFixture) -> None:
    """Checks run side by side, and one that hangs is given up after the time-out; the log says so, too."""
    begun = time.monotonic()
    async with asyncio.timeout(5):
        answer = await ask(one=hanging, two=hanging, three=well, timeout=0.2)
    assert time.monotonic() - begun < 0.4
    assert answer.status_code == 503
    assert answer.json()["components"] == {
        "one": {"status": "unhealthy", "error": "no answer within 0.2 s"},
        "two": {"status": "unhealthy", "error": "no answer within 0.2 s"},
        "three": {"status": "healthy"},
    }
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sorted(told) == [f"health check failed: {name}: no answer within 0.2 s" for name in ("one", "two")]


async def test_a_time_out_of_the_component_is_its_error() -> None:
    """What the check itself raised is not taken for our own time-out."""
    answer = await ask(pool=impatient)
    assert answer.json()["components"]["pool"]["error"] == "TimeoutError"


@pytest.mark.parametrize("check", [lambda: None, time.sleep, functools.partial(time.sleep, 1)])
def test_blocking_checks_are_refused(check: Any) -> None:
    """A check that would block the event loop is an error when the app is built, not when it is asked."""
    with pytest.raises(TypeError, match="'disk' must be an async function"):
        health_router(disk=check)


async def test_answers_only_for_itself() -> None:
    """The check of another instance is 404; so is any, while the own id is unknown, and once the instance leaves."""
    registrar = Registrar(ServiceSettings(name="cards", port=8002, address="10.0.0.7"))
    assert (await ask("/health", registrar)).status_code == 200
    assert (await ask("/health?instance=cards-10.0.0.7-8002", registrar)).status_code == 404
    registrar.registration = await registrar._describe()
    assert (await ask("/health?instance=cards-10.0.0.7-8002", registrar)).status_code == 200
    assert (await ask("/health?instance=cards-10.0.0.7-8003", registrar)).status_code == 404
    await registrar.aclose()
    assert (await ask("/health?instance=cards-10.0.0.7-8002", registrar)).status_code == 404
    leaving = await ask("/health", registrar)
    assert (leaving.status_code, leaving.json()) == (503, {"status": "leaving"})


@pytest.mark.parametrize("asked", ["%C3%BC", "%FF", "%00", "%0D%0AX-Evil:1", "a" * 5000, "", "%E2%80%A8"])
async def test_any_id_gets_a_plain_answer(asked: str) -> None:
    """Whatever instance is asked for, in whatever characters: 404, with the own id in it and in a header's alphabet."""
    registrar = Registrar(ServiceSettings(name="cards", port=8002, address="my_host_1."))
    registrar.registration = await registrar._describe()
    answer = await ask(f"/health?instance={asked}", registrar)
    assert (answer.status_code, answer.headers["Content-Type"]) == (404, "application/problem+json")
    assert answer.json() == {"title": "Not Found", "status": 404, "detail": "this is cards-my_host_1.-8002"}
    await registrar.aclose()


async def test_without_presence_every_id_is_answered() -> None:
    """An app that somebody else registers does not know its id, and does not contradict."""
    assert (await ask("/health?instance=whatever")).status_code == 200


async def test_openapi_tells_of_the_failures() -> None:
    """A newcomer sees in the documentation that 503 and 404 are meant."""
    responses = (await ask("/openapi.json")).json()["paths"]["/health"]["get"]["responses"]
    assert {"200", "404", "503"} <= set(responses)
