"""``GET /``: the topology page, its stream, its script and its style. For the inside: it shows addresses and errors."""

from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from jinja2 import Environment, PackageLoader, StrictUndefined

from orchestrator.page.hub import Hub
from orchestrator.page.sheet import Sheet
from orchestrator.page.words import REASONS

__all__ = ["render", "router"]

router = APIRouter(include_in_schema=False)

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_TYPES = {"topology.js": "text/javascript", "topology.css": "text/css", "icon.svg": "image/svg+xml"}
_FILES = {name: files("orchestrator.page").joinpath("static", name).read_bytes() for name in _TYPES}
_PAGE = Environment(
    loader=PackageLoader("orchestrator.page"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
).get_template("topology.html")
_Caller = Annotated[str, Query(max_length=300)]


async def _hub(request: Request) -> Hub:
    hub: Hub = request.app.state.hub
    if hub.is_full:
        raise HTTPException(503, "This instance is leaving, or too many look already", {"Retry-After": "1"})
    return hub


_HubDependency = Annotated[Hub, Depends(_hub)]


def render(sheet: Sheet) -> str:
    """The page with these words; whatever they hold is text."""
    return _PAGE.render(sheet=sheet, reasons=REASONS)


@router.get("/")
async def page(hub: _HubDependency, caller: _Caller = "") -> HTMLResponse:
    """The page as it stands, whole and readable without its script."""
    sheet = await hub.sheet(caller)
    if sheet is None:
        raise HTTPException(503, "This instance is leaving", {"Retry-After": "1"})
    return HTMLResponse(render(sheet), headers=_HEADERS | {"Cache-Control": "no-store"})


@router.get("/topology/stream", response_class=EventSourceResponse)
async def stream(hub: _HubDependency, caller: _Caller = "") -> AsyncIterator[ServerSentEvent]:
    """The page's words, whole each time, about once a second."""
    async for text in hub.stream(caller):
        yield ServerSentEvent(raw_data=text, event="sheet")


@router.get("/topology/{name}")
async def static(name: str) -> Response:
    """The script, the style, the icon."""
    if name not in _FILES:
        raise HTTPException(404)
    return Response(_FILES[name], headers=_HEADERS | {"Cache-Control": "no-cache"}, media_type=_TYPES[name])
