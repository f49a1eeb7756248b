"""Calls per second of every client as an SVG: bars on a logarithmic scale, one group per number of callers."""

import math

from benchmarks.clients import CLIENTS
from benchmarks.results import Results

__all__ = ["plot"]

BAR, GAP, LEFT, WIDTH, RIGHT = 16, 26, 330, 420, 70
OURS, OTHERS = "#1f6feb", "#8c959f"


def plot(results: Results, instances: int) -> str:
    """The picture, at so many instances."""
    cells = {
        callers: [
            (client, results.median(client.name, callers, instances, lambda sample: sample.calls_per_second))
            for client in CLIENTS
        ]
        for callers in results.callers()
    }
    rates = [rate for group in cells.values() for _, rate in group]
    low, high = math.floor(math.log10(min(rates))), math.ceil(math.log10(max(rates)))

    def x(rate: float) -> float:
        return LEFT + WIDTH * (math.log10(rate) - low) / (high - low)

    parts, y = [], GAP
    for callers, group in cells.items():
        parts.append(_text(LEFT, y - 6, f"{callers} caller{'s' if callers > 1 else ''}", "start", "bold"))
        for client, rate in group:
            colour = OURS if client.title.startswith("ours") else OTHERS
            parts.append(_text(LEFT - 8, y + 12, client.title.replace("`", ""), "end"))
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{x(rate) - LEFT:.1f}" height="{BAR - 3}" fill="{colour}"/>')
            parts.append(_text(x(rate) + 4, y + 12, f"{rate:,.0f}", "start"))
            y += BAR
        y += GAP
    for power in range(low, high + 1):
        at = x(10**power)
        parts.insert(0, f'<line x1="{at:.1f}" y1="{GAP}" x2="{at:.1f}" y2="{y - GAP}" stroke="#d0d7de"/>')
        parts.append(_text(at, y - 8, f"{10**power:,}", "middle"))
    parts.append(_text(LEFT + WIDTH / 2, y + 8, f"calls per second, {instances} instances, logarithmic", "middle"))
    size = f'width="{LEFT + WIDTH + RIGHT}" height="{y + 18}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
            '<rect width="100%" height="100%" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _text(x: float, y: float, text: str, anchor: str, weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" font-weight="{weight}">{text}</text>'
