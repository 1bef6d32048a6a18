"""Logging for pods and the CLI: structlog, one line per event on stderr, as text or JSON.

Payloads and secrets never get into a line: what is not a short scalar is replaced by its type, and long text is cut.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog
from structlog.stdlib import BoundLogger
from structlog.typing import EventDict, Processor, WrappedLogger

TEXT_LENGTH_MAX = 2_000
_SCALARS = (bool, int, float, type(None))
_STRUCTLOG_OWN = frozenset({"_record", "_from_structlog", "exc_info", "positional_args"})
_HANDLER_NAME = "toque"


def get_logger(name: str) -> BoundLogger:
    """A structlog logger over the standard library's of that name: `log.info("event", key=value)`.

    It changes nothing in the process: in a program that never calls `configure`, its own logging set-up holds.
    """
    logger: BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[structlog.stdlib.filter_by_level, *_shared(),
                    structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=BoundLogger,
        context_class=dict,
    )
    return logger


def configure(json: bool = False, level: int | str = logging.INFO) -> None:
    """Send every line of at least `level`, other libraries' too, to stderr. For pods and the CLI; call it any time.

    Text has colours only on a terminal. Raises ValueError for an unknown level name.
    """
    threshold = _level(level)
    handler = logging.StreamHandler(sys.stderr)
    handler.set_name(_HANDLER_NAME)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_shared(),
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(json)],
    ))
    root = logging.getLogger()
    root.handlers = [other for other in root.handlers if other.get_name() != _HANDLER_NAME] + [handler]
    root.setLevel(threshold)


def bound_values(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """The processor that keeps payloads out: only scalars and cut text pass, the rest shows as its type."""
    return {key: value if key in _STRUCTLOG_OWN else _bounded(value) for key, value in event.items()}


def _bounded(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= TEXT_LENGTH_MAX else value[:TEXT_LENGTH_MAX] + "…"
    if isinstance(value, _SCALARS):
        return value
    size = f" of {len(value)}" if isinstance(value, (bytes, list, tuple, dict, set, frozenset)) else ""
    return f"<{type(value).__name__}{size}>"


def _shared() -> list[Processor]:
    return [structlog.contextvars.merge_contextvars, structlog.stdlib.add_log_level, structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True), bound_values]


def _renderers(json: bool) -> list[Processor]:
    if json:
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(),
                                          exception_formatter=structlog.dev.plain_traceback)]


def _level(level: int | str) -> int:
    if isinstance(level, int):
        return level
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"unknown log level {level!r}; known are debug, info, warning, error, critical")
    return number
