"""The context of tasks that go on in the background, such as watches."""

import contextvars
from collections.abc import Callable

__all__ = ["background_context", "prepare_background"]

_preparations: list[Callable[[], object]] = []


def prepare_background(preparation: Callable[[], object]) -> None:
    """Runs it in the context of every background task that begins from now on, such as a watch."""
    _preparations.append(preparation)


def background_context() -> contextvars.Context:
    """An empty one: a task that goes on for ever must not carry the trace or the deadline of whoever started it."""
    context = contextvars.Context()
    for preparation in _preparations:
        context.run(preparation)
    return context
