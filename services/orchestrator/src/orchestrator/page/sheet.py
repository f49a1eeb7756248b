"""What the page shows, in words: the same for the page's first text, for each later one, and for every viewer.

Whoever draws it, the template or the page's script, only puts these words in their places.
"""

from collections.abc import Mapping
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

__all__ = ["Cell", "Choice", "Drawing", "Group", "Line", "Row", "Shape", "Sheet", "Tone"]

Tone: TypeAlias = Literal["", "live", "ejected", "gone", "doubtful"]
"""A colour; never the only thing that tells."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Cell(_Part):
    """One cell of a table."""

    text: str
    detail: str = ""
    """In small letters below it."""
    tone: Tone = ""
    meter: str = ""
    """A share, 0 to 1, drawn as a bar; empty: none."""


class Row(_Part):
    """One line of a table; the first cell is its heading."""

    key: str
    """The same from sheet to sheet."""
    cells: tuple[Cell, ...]


class Group(_Part):
    """Rows under a heading of their own."""

    key: str
    heading: str
    detail: str
    rows: tuple[Row, ...]


class Line(_Part):
    """An item of a list."""

    key: str
    time: str
    text: str
    tone: Tone = ""


class Shape(_Part):
    """A part of the drawing: an SVG element, its attributes and its text."""

    key: str
    tag: Literal["path", "rect", "text"]
    attributes: Mapping[str, str]
    text: str = ""


class Drawing(_Part):
    """Three lanes: callers, services, instances."""

    width: int
    height: int
    shapes: tuple[Shape, ...]


class Choice(_Part):
    """A point of view."""

    value: str
    label: str


class Sheet(_Part):
    """The whole page at one moment, from one point of view."""

    epoch: str
    """Another one: another process answers, or it has begun anew."""
    number: int
    """Grows by one with each change."""
    at: str
    caller: str
    """From whose point of view; empty: all callers."""
    choices: tuple[Choice, ...]
    outage: str
    """Why Consul can't be asked; empty: it can."""
    summary: str
    freshness: str
    columns: tuple[str, ...]
    """Headings of the table of instances."""
    instances: tuple[Group, ...]
    calls: tuple[Row, ...]
    disagreements: tuple[Line, ...]
    journal: tuple[Line, ...]
    drawing: Drawing
