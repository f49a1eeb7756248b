"""A trace in a terminal: the tree of its spans, with who served each, how long it took and why it failed."""

import asyncio
import time

from rich.markup import escape
from rich.tree import Tree

from demo.collector import Collector, Span

__all__ = ["find_trace", "tree"]

_SECONDS = 5.0
_PAUSE = 0.05


async def find_trace(collector: Collector, name: str) -> list[Span]:
    """The newest trace whose root has this name, once all of it is there; empty: that took longer than 5 s."""
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        complete = [spans for spans in collector.traces().values() if spans[0].name == name and _is_complete(spans)]
        if complete:
            return max(complete, key=lambda spans: spans[0].began)
        await asyncio.sleep(_PAUSE)
    return []


def _is_complete(spans: list[Span]) -> bool:
    """Whether the root, every span's parent, and what each answered attempt met at its instance have been exported."""
    ids, parents = {span.id for span in spans}, {span.parent for span in spans}
    answered = {span.id for span in spans if span.kind == "CLIENT" and "http.response.status_code" in span.attributes}
    return parents - ids == {""} and answered <= parents


def tree(spans: list[Span]) -> Tree:
    """The spans of one trace, in order, under its root."""
    below: dict[str, list[Span]] = {}
    for span in spans:
        below.setdefault(span.parent, []).append(span)
    [root] = below[""]
    whole = Tree(_line(root), guide_style="dim")
    _grow(whole, root, below)
    return whole


def _grow(node: Tree, span: Span, below: dict[str, list[Span]]) -> None:
    for child in below.get(span.id, ()):
        _grow(node.add(_line(child)), child, below)


def _line(span: Span) -> str:
    said = span.attributes
    words = [escape(span.name)]
    match span.kind:
        case "SERVER":
            words += ["at", str(said.get("registry.instance.id", span.service))]
        case "CLIENT":
            words += ["to", str(said.get("registry.instance.id")), f"({said.get('registry.pick.reason')})"]
            words += [f"again, {said['http.request.resend_count']}"] if "http.request.resend_count" in said else []
    outcome = said.get("error.type", said.get("http.response.status_code", said.get("registry.outcome", "")))
    colour = "red" if span.failed else "green"
    return f"{' '.join(words)} [{colour}]{escape(str(outcome))}[/] [dim]{span.seconds * 1000:.1f} ms[/]"
