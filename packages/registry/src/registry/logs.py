"""The logs of a service: one line for each record, as text or as JSON, with everything that is known of it.

Importing this changes nothing; ``setup_logging`` does, and a service calls it. The variables ``LOG_FORMAT`` and
``LOG_LEVEL`` decide.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import copy
from datetime import UTC, datetime
from typing import TextIO, TypeAlias

from registry.errors import InvalidInputError
from registry.settings import ServiceSettings

__all__ = ["Fields", "JsonFormatter", "LogHandler", "TextFormatter", "set_fields", "setup_logging", "take_over_uvicorn"]

Fields: TypeAlias = Callable[[], Mapping[str, object]]
"""What is known where a record is written, such as the current trace; called for each record, and never blocks."""

_LOGGERS = ("uvicorn", "uvicorn.error", "uvicorn.access")
# The formats that uvicorn and FastAPI's command line choose by themselves; any other was chosen by the user.
_DEFAULTS = {
    "%(levelprefix)s %(message)s",
    '%(levelprefix)s %(client_addr)s - "%(request_line)s" %(status_code)s',
    "%(levelprefix)s %(client_addr)s - '%(request_line)s' %(status_code)s",
}
_CHATTY = ("aiosqlite", "alembic", "httpcore", "httpcore2", "httpx", "httpx2")
"""Libraries that log each of their steps: shown from one level above."""
POLLED = frozenset({"/health", "/metrics", "/registry/state"})
"""Paths that machines ask every few seconds."""
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
"""What every record has, and uvicorn's second copy of the message."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PLAIN = re.compile(r"[^\s\"'=]+")

_fields: dict[str, Fields] = {}


def set_fields(key: str, fields: Fields) -> None:
    """Every record of this process shows these fields, too; what a record brings itself takes precedence.

    The last one given for a key counts. A field that is None is left out, and so is everything if ``fields`` fails.
    """
    _fields[key] = fields


def setup_logging(settings: ServiceSettings) -> None:
    """Every record of this process, uvicorn's own included, goes to stderr as ``LOG_FORMAT`` says (text or json), from
    ``LOG_LEVEL`` on (INFO).

    Call it before the app is made, so that it comes after uvicorn's own set-up. Polls of ``/health``, ``/metrics`` and
    ``/registry/state`` are logged as DEBUG. A set-up of your own stays as it is: nothing changes when the root logger
    or uvicorn's have other handlers than by default. uvicorn's ``--log-level`` (other than info) and
    ``--no-access-log`` keep their meaning.

    Raises: InvalidInputError, when a variable is invalid.
    """
    level, handler = _level(), LogHandler(settings.health_check_path)
    # The registrar finds out the address; until then it is unknown, unless the settings say it.
    about = {"instance": f"{settings.name}-{settings.address or '?'}-{settings.port}"}
    set_fields("settings", lambda: about)
    if _is_set_up_otherwise():
        return
    for name in _CHATTY:
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(max(level, min(level + 10, logging.WARNING)))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)
    take_over_uvicorn()


def take_over_uvicorn() -> None:
    """Uvicorn's records go the way of all others, where ``setup_logging`` has been called; else nothing changes.

    ``lifespan`` calls it, too: ``uvicorn.run(app)``, ``fastapi run`` and ``gunicorn --preload`` set up uvicorn's
    loggers after the app was made.
    """
    if not logging.getLogger().handlers or _is_set_up_otherwise():
        return
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if all(type(found) in {logging.StreamHandler, LogHandler} for found in logger.handlers):
            if logger.handlers:
                # A new list: gunicorn's worker shares the old one with gunicorn's own logger.
                logger.handlers, logger.propagate = [], True
            if logger.level == logging.INFO:
                logger.setLevel(logging.NOTSET)


def _is_set_up_otherwise() -> bool:
    """Whether a user has set up logging without us."""
    if any(not isinstance(found, LogHandler) for found in logging.getLogger().handlers):
        return True
    return any(_is_chosen(found) for name in _LOGGERS for found in logging.getLogger(name).handlers)


def _is_chosen(handler: logging.Handler) -> bool:
    """Whether a user set it up, rather than uvicorn by itself, or gunicorn by its options."""
    is_default = type(handler) is logging.StreamHandler and getattr(handler.formatter, "_fmt", None) in _DEFAULTS
    return not (is_default or isinstance(handler, LogHandler) or hasattr(handler, "_gunicorn"))


def _level() -> int:
    name = os.environ.get("LOG_LEVEL", "").upper() or "INFO"
    if name not in logging.getLevelNamesMapping():
        raise InvalidInputError("LOG_LEVEL: set it to DEBUG, INFO, WARNING, ERROR or CRITICAL")
    return logging.getLevelNamesMapping()[name]


class LogHandler(logging.StreamHandler[TextIO]):
    """Writes records to stderr as ``LOG_FORMAT`` says. Raises: InvalidInputError, when that is neither text nor json.

    For a ``logging`` configuration of your own, such as uvicorn's ``--log-config``; ``setup_logging`` installs it, too.
    """

    def __init__(self, health_path: str = "/health") -> None:
        super().__init__()
        name = os.environ.get("LOG_FORMAT", "").lower() or "text"
        if name not in {"text", "json"}:
            raise InvalidInputError("LOG_FORMAT: set it to text or json")
        self.setFormatter(JsonFormatter() if name == "json" else TextFormatter())
        self._polled = POLLED | {health_path}

    def handle(self, record: logging.LogRecord) -> bool:
        """Whether it was written. A poll, whatever its answer, is for whoever wants DEBUG."""
        access = _access(record)
        if access.get("method") in {"GET", "HEAD"} and str(access["path"]).partition("?")[0] in self._polled:
            record = copy(record)  # other handlers see it as it was
            record.levelno, record.levelname = logging.DEBUG, "DEBUG"
            if not logging.getLogger(record.name).isEnabledFor(logging.DEBUG):
                return False
        return bool(super().handle(record))


class JsonFormatter(logging.Formatter):
    """One JSON object in one line: ``time`` (UTC), ``level``, ``logger``, ``message``, and every field of the record.

    An exception is one string. What JSON has no form for is shown by its ``repr``.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        found: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
        }
        for name, value in (_known(record) | _access(record)).items():
            found[f"{name}_" if name in found else name] = value
        if trouble := _trouble(self, record):
            found["exception"] = trouble
        return f"{{{', '.join(f'{json.dumps(str(name))}: {_json(value)}' for name, value in found.items())}}}"


class TextFormatter(logging.Formatter):
    """For people: time (UTC), level, logger and message, then every field of the record as ``key=value``, in one line.

    An exception follows below, indented. Line breaks and other control characters are shown escaped, so that nobody
    outside can forge a line.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end, and below it the traceback, if any."""
        head = f"{_time(record)} {record.levelname:<7} {record.name}: {_message(record)}"
        known = " ".join(f"{name}={_word(value)}" for name, value in _known(record).items())
        trouble = _trouble(self, record).splitlines()
        return "\n    ".join(map(_visible, [f"{head}  {known}".rstrip(), *trouble]))


def _time(record: logging.LogRecord) -> str:
    return f"{datetime.fromtimestamp(record.created, UTC):%Y-%m-%dT%H:%M:%S}.{int(record.msecs):03}Z"


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage().strip()
    except Exception:  # arguments that don't fit: the standard library would print a traceback instead
        return f"{record.msg} {_repr(record.args)}"


def _trouble(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """The traceback and the stack that the record carries."""
    parts = [formatter.formatException(record.exc_info) if record.exc_info else record.exc_text or ""]
    return "\n".join(part for part in [*parts, record.stack_info or ""] if part)


def _known(record: logging.LogRecord) -> dict[str, object]:
    """What the record brings, and what is known where it is written."""
    known: dict[str, object] = {}
    for fields in tuple(_fields.values()):
        with suppress(Exception):  # a record must not be lost because something about it can't be said
            known |= {name: value for name, value in fields().items() if value is not None}
    own = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    return own | known | {name: value for name, value in own.items() if value is not None}


def _access(record: logging.LogRecord) -> dict[str, object]:
    """The parts of uvicorn's access line; of any other record, nothing."""
    if record.name != "uvicorn.access" or not isinstance(record.args, tuple) or len(record.args) != 5:
        return {}
    client, method, path, _, status = record.args
    return {"client": client, "method": method, "path": path, "status": status}


def _repr(value: object) -> str:
    try:
        return repr(value)
    except Exception as error:
        return f"<{type(value).__name__}, whose repr failed: {type(error).__name__}>"


def _json(value: object, *, ascii_only: bool = True) -> str:
    try:
        return json.dumps(value, default=_repr, allow_nan=False, ensure_ascii=ascii_only)
    except (TypeError, ValueError, RecursionError):  # a key that is no string, NaN, a list that holds itself
        return json.dumps(_repr(value), ensure_ascii=ascii_only)


def _word(value: object) -> str:
    return value if isinstance(value, str) and _PLAIN.fullmatch(value) else _json(value, ascii_only=False)


def _visible(line: str) -> str:
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], line)
