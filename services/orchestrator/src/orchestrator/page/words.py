"""Numbers, times and reasons, as people read them."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

__all__ = ["REASONS", "added", "clock", "counts", "per_second", "reasons", "seconds", "shorten", "whole_number"]

REASONS = {
    "p2c_cost": ("the cheaper", "of two drawn at random, the one with less under way and faster answers"),
    "p2c_turn": ("its turn", "two cost about the same: the one that has had less than its share"),
    "policy": ("own policy", "the caller has a policy of its own"),
    "only": ("the only one", "nobody else could be picked"),
    "probe": ("a probe", "to find out whether an ejected instance is back"),
    "half_open": ("a probe of all", "every instance fails: this call finds out whether one is back"),
    "trusted": ("it can be trusted", "the call can't be repeated, so no instance that failed lately"),
    "zone_few": ("own zone too small", "in another zone, as the own one has too few instances for its share of calls"),
    "zone_slow": ("own zone slow", "in another zone, as answers take longer in the own one"),
    "zone_sample": ("a look elsewhere", "in another zone, to know how long answers take there: one call in fifty"),
    "last_resort": ("last resort", "Consul lists it no more, and nobody else is left"),
}
"""Why an instance was picked: in two words, and explained."""


def clock(at: float) -> str:
    """The time of day, UTC."""
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S")


def seconds(value: float) -> str:
    """How long something takes."""
    if value < 1:
        return f"{value * 1000:.0f} ms" if value >= 0.01 else f"{value * 1000:.1f} ms"
    return f"{value:.1f} s" if value < 100 else f"{value:,.0f} s"


def per_second(value: float) -> str:
    """How often something happens."""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def whole_number(value: int) -> str:
    """With thousands set apart."""
    return f"{value:,}"


def counts(found: Mapping[str, int]) -> str:
    """As in ``118 ok, 2 refused``: the most frequent first."""
    most = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{whole_number(count)} {name.replace('_', ' ')}" for name, count in most if count)


def reasons(found: Mapping[str, int]) -> str:
    """As in ``84 % the cheaper, 16 % its turn``: at most three, the most frequent first."""
    total = sum(found.values())
    most = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:3]
    return ", ".join(f"{100 * count / total:.0f} % {REASONS.get(name, (name, ''))[0]}" for name, count in most if count)


def added(several: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums, name by name."""
    total: dict[str, int] = {}
    for each in several:
        for name, count in each.items():
            total[name] = total.get(name, 0) + count
    return total


def shorten(text: str, most: int) -> str:
    """Its beginning and its end, which tell instances of one service apart."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most - most // 2) :]}"
