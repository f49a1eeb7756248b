"""The drawing: fixed lanes from callers over services to instances, so that nothing jumps when something changes."""

from collections.abc import Mapping, Sequence

from orchestrator.page.sheet import Cell, Drawing, Shape
from orchestrator.page.sight import Seen, Use
from orchestrator.page.tables import condition
from orchestrator.page.words import per_second, shorten

__all__ = ["draw"]

WIDTH = 760
HEIGHT = 26
GAP = 8
TOP = 34
LANES = {"callers": (0, 200), "services": (290, 150), "instances": (530, 230)}
"""Where each begins, and how wide it is."""
MOST = 15
"""Instances of one service; more are told as a number."""


def draw(services: Mapping[str, Sequence[Seen]], using: Sequence[Use]) -> Drawing:
    """Callers by name of their service, unless there is only one point of view."""
    shapes = [_heading(lane) for lane in LANES]
    middles, y = {}, TOP
    for service, instances in services.items():
        boxes = _instances(service, instances)
        middle = y + (len(boxes) * (HEIGHT + GAP) - GAP) / 2
        middles[service.lower()] = middle
        shapes += _box("services", f"service {service}", service, middle, Cell(text=""))
        for index, (key, label, cell) in enumerate(boxes):
            at = y + index * (HEIGHT + GAP) + HEIGHT / 2
            shapes.append(_link(f"{key} link", "services", middle, "instances", at, cell.tone, 1.0))
            shapes += _box("instances", key, label, at, cell)
        y += len(boxes) * (HEIGHT + GAP) + GAP
    calling = _callers(using)
    step = max((y - TOP) / max(len(calling), 1), HEIGHT + GAP)
    for index, (caller, called) in enumerate(calling.items()):
        at = TOP + step * (index + 0.5)
        shapes += _box("callers", f"caller {caller}", caller, at, Cell(text=""))
        for service, (rate, troubled) in called.items():
            if (to := middles.get(service)) is not None:
                tone = "ejected" if troubled else "live"
                width = 1.0 + min(rate, 400.0) ** 0.5 / 4
                shapes.append(_link(f"{caller} to {service}", "callers", at, "services", to, tone, width))
                if rate:
                    shapes.append(_rate(f"{caller} to {service} rate", at, to, rate))
    height = max(y, TOP + step * len(calling), TOP + HEIGHT)
    # What is drawn first lies below.
    shapes.sort(key=lambda shape: ("path", "rect", "text").index(shape.tag))
    return Drawing(width=WIDTH, height=round(height), shapes=tuple(shapes))


def _instances(service: str, instances: Sequence[Seen]) -> list[tuple[str, str, Cell]]:
    found = [(seen.key, f"{seen.zone}: {seen.id}" if seen.zone else seen.id, condition(seen)) for seen in instances]
    if len(found) <= MOST:
        return found or [(f"{service} nobody", "nobody", Cell(text="", tone="gone"))]
    # Those with something to tell come first.
    found.sort(key=lambda each: each[2].tone == "live")
    rest = found[MOST - 1 :]
    return [*found[: MOST - 1], (f"{service} more", f"and {len(rest)} more", Cell(text=""))]


def _callers(using: Sequence[Use]) -> dict[str, dict[str, tuple[float, bool]]]:
    """Each caller's services with calls per second, and whether any is in trouble."""
    callers: dict[str, dict[str, tuple[float, bool]]] = {}
    for use in using:
        called = callers.setdefault(use.caller.instance.service, {})
        rate, troubled = called.get(use.upstream.service.lower(), (0.0, False))
        rate += use.rates.calls if use.rates else 0.0
        called[use.upstream.service.lower()] = rate, troubled or bool(use.upstream.failing_fast_for)
    return dict(sorted(callers.items()))


def _heading(lane: str) -> Shape:
    return Shape(
        key=f"lane {lane}", tag="text", text=lane, attributes={"x": str(LANES[lane][0]), "y": "16", "class": "lane"}
    )


def _box(lane: str, key: str, label: str, middle: float, cell: Cell) -> list[Shape]:
    x, width = LANES[lane]
    frame = {"x": f"{x}", "y": f"{middle - HEIGHT / 2:.1f}", "width": f"{width}", "height": f"{HEIGHT}", "rx": "4"}
    text = shorten(label, round((width - 16) / 6.6))
    mark = {"ejected": "✕ ", "gone": "– ", "doubtful": "? "}.get(cell.tone, "")
    place = {"x": f"{x + 8}", "y": f"{middle + 4:.1f}"}
    return [
        Shape(key=key, tag="rect", attributes=frame | {"class": f"box {cell.tone}".strip()}),
        Shape(key=f"{key} label", tag="text", attributes=place | {"class": "label"}, text=mark + text),
    ]


def _link(key: str, from_lane: str, start: float, to_lane: str, end: float, tone: str, width: float) -> Shape:
    x0 = LANES[from_lane][0] + LANES[from_lane][1]
    x1 = LANES[to_lane][0]
    bend = (x1 - x0) / 2
    way = f"M{x0},{start:.1f} C{x0 + bend:.0f},{start:.1f} {x1 - bend:.0f},{end:.1f} {x1},{end:.1f}"
    return Shape(
        key=key, tag="path", attributes={"d": way, "class": f"link {tone}".strip(), "stroke-width": f"{width:.1f}"}
    )


def _rate(key: str, start: float, end: float, rate: float) -> Shape:
    x = LANES["callers"][0] + LANES["callers"][1] + 6
    y = start - 4 if end <= start else start + 13
    return Shape(
        key=key, tag="text", attributes={"x": f"{x}", "y": f"{y:.1f}", "class": "rate"}, text=f"{per_second(rate)}/s"
    )
