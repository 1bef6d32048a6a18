"""Turns an exception into the Failure that is recorded: type name, message and the user's part of the traceback.

Locals are never captured; every part is cut to a bound, and is text that can be encoded.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
from pathlib import Path
from traceback import FrameSummary, StackSummary, TracebackException

from toque.storage.records import Failure

TYPE_BYTES_MAX = 256
MESSAGE_BYTES_MAX = 4 * 1024
TRACEBACK_BYTES_MAX = 8 * 1024  # the mark of what was cut included
TRACEBACK_HEAD_BYTES = 2 * 1024
FRAMES_MAX = 50
LINE_BYTES_MAX = 1024
CHAIN_MAX = 20
_CUT = "…"
_MIDDLE = f"\n{_CUT}\n"


def describe_exception(error: BaseException) -> Failure:
    """What is kept of an exception. Never raises, whatever the exception's own methods do."""
    return Failure(_cut(_type_name(error), TYPE_BYTES_MAX), _cut(_message(error), MESSAGE_BYTES_MAX), _traceback(error))


def _type_name(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as failure:  # noqa: BLE001  # the user's own __str__, while another error is being told
        return f"<str() of the exception raised {type(failure).__name__}>"


def _traceback(error: BaseException) -> str:
    try:
        described = TracebackException.from_exception(error, limit=-FRAMES_MAX, max_group_width=5, max_group_depth=3)
        _keep_user_frames(described, CHAIN_MAX)
        text = "".join(_cut_line(line) for line in described.format())
    except Exception as failure:  # noqa: BLE001  # the user's own __str__, __notes__ …, while an error is being told
        return f"<the traceback cannot be shown: {type(failure).__name__}>"
    return _cut_middle(text)


def _keep_user_frames(described: TracebackException, chain_left: int) -> None:
    described.stack = StackSummary.from_list([frame for frame in described.stack if not _is_machinery(frame)])
    linked = [described.__cause__, described.__context__, *(described.exceptions or ())]
    for other in linked:
        if other is not None and chain_left:
            _keep_user_frames(other, chain_left - 1)
    if not chain_left:
        described.__cause__ = described.__context__ = None


def _machinery_folders() -> frozenset[str]:
    """Where frames lie that say nothing to the user: ours (but not the demo's), asyncio's and the thread pool's."""
    here = Path(__file__).parent
    own = [here, here / "workers", here / "storage"]
    standard = [Path(file).parent for file in (asyncio.__file__, concurrent.futures.__file__) if file]
    return frozenset(str(folder) for folder in [*own, *(folder.resolve() for folder in own), *standard])


_MACHINERY_FOLDERS = _machinery_folders()


def _is_machinery(frame: FrameSummary) -> bool:
    return os.path.dirname(frame.filename) in _MACHINERY_FOLDERS


def _cut_line(line: str) -> str:
    return line if len(line) <= LINE_BYTES_MAX else line[:LINE_BYTES_MAX] + _CUT + "\n"


def _cut_middle(text: str) -> str:
    data = text.encode(errors="backslashreplace")
    if len(data) <= TRACEBACK_BYTES_MAX:
        return data.decode()
    tail = data[TRACEBACK_HEAD_BYTES + len(_MIDDLE.encode()) - TRACEBACK_BYTES_MAX:]
    return data[:TRACEBACK_HEAD_BYTES].decode(errors="ignore") + _MIDDLE + tail.decode(errors="ignore")


def _cut(text: str, bytes_max: int) -> str:
    data = text[:bytes_max].encode(errors="backslashreplace")
    if len(data) <= bytes_max and len(text) <= bytes_max:
        return data.decode()
    return data[:bytes_max - len(_CUT.encode())].decode(errors="ignore") + _CUT
