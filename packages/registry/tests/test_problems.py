from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from starlette.responses import PlainTextResponse

from registry.fastapi import add_problem_handlers, problem_responses

PROBLEM = "application/problem+json"


class Body(BaseModel):
    count: int


async def ask(method: str, path: str, **kwargs: Any) -> httpx.Response:
    """What an app with the handlers answers."""
    app = FastAPI(max_body_size=100)
    add_problem_handlers(app)

    @app.get("/raise/{status}", responses=problem_responses({404: "No such thing."}))
    async def fail(status: int) -> None:
        raise HTTPException(status, "it went wrong", {"Retry-After": "1"})

    @app.get("/break")
    async def fail_badly() -> None:
        raise ZeroDivisionError("secret")

    @app.post("/count")
    async def count(body: Body) -> int:
        return body.count

    @app.get("/own")
    async def own() -> PlainTextResponse:
        return PlainTextResponse("too large for me", 413)

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        return await client.request(method, path, **kwargs)


@pytest.mark.parametrize(("status", "title"), [(404, "Not Found"), (503, "Service Unavailable"), (499, "Error")])
async def test_a_raised_status_is_a_problem(status: int, title: str) -> None:
    """RFC 9457: the status in words and as a number, what happened, and the headers that were given along."""
    answer = await ask("GET", f"/raise/{status}")
    assert (answer.status_code, answer.headers["Content-Type"], answer.headers["Retry-After"]) == (status, PROBLEM, "1")
    assert answer.json() == {"title": title, "status": status, "detail": "it went wrong"}


async def test_a_status_without_a_body_has_none() -> None:
    """304 stays 304."""
    answer = await ask("GET", "/raise/304")
    assert (answer.status_code, answer.content) == (304, b"")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("DELETE", "/count", 405)])
async def test_what_the_framework_refuses_is_a_problem(method: str, path: str, status: int) -> None:
    """Nobody has to tell the service's own errors from FastAPI's."""
    answer = await ask(method, path)
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, PROBLEM)
    assert answer.json()["status"] == status


@pytest.mark.parametrize("body", [b"{}", b'{"count": NaN}', b'{"count": "\\ud800"}', b"no json"])
async def test_refused_input_says_where_and_not_what(body: bytes) -> None:
    """422 lists each error with its place, and never repeats the value, which JSON may not be able to hold."""
    answer = await ask("POST", "/count", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.headers["Content-Type"]) == (422, PROBLEM)
    assert [set(error) for error in answer.json()["errors"]] == [{"type", "loc", "msg"}]


async def test_what_nobody_caught_is_a_problem_without_its_message() -> None:
    """A 500 has the same shape, and tells strangers nothing."""
    answer = await ask("GET", "/break")
    assert (answer.status_code, answer.headers["Content-Type"]) == (500, PROBLEM)
    assert "secret" not in answer.text


async def in_pieces() -> AsyncIterator[bytes]:
    """A hundred bytes and one, without a Content-Length."""
    for _ in range(101):
        yield b" "


@pytest.mark.parametrize("path", ["/count", "/nowhere"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_too_large_is_a_problem(path: str, chunked: bool) -> None:
    """What Starlette answers outside of all handlers has the same shape; what is not read is not too large."""
    answer = await ask("POST", path, content=in_pieces() if chunked else b" " * 101)
    status = 404 if chunked and path == "/nowhere" else 413
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, PROBLEM)
    assert answer.json()["status"] == status
    assert int(answer.headers["Content-Length"]) == len(answer.content)


async def test_a_413_of_the_apps_own_stays() -> None:
    """Only Starlette's is replaced."""
    answer = await ask("GET", "/own")
    assert (answer.status_code, answer.text) == (413, "too large for me")


async def test_openapi_shows_them() -> None:
    """A described problem stands there as what it is, and not as plain JSON."""
    page = (await ask("GET", "/openapi.json")).json()
    shown = page["paths"]["/raise/{status}"]["get"]["responses"]["404"]
    assert (shown["description"], list(shown["content"])) == ("No such thing.", [PROBLEM])
