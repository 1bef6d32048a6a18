"""What the command line prints: tables or JSON on stdout, errors as one line on stderr, and the exit code of an error.

Everything that others wrote (payloads, names, error texts) goes through `printable`, so that it cannot steer a
terminal. Works without the `cli` extra, but for `console` and tables on a terminal.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import msgspec

from toque.errors import ToqueError, Unavailable, UsageError

if TYPE_CHECKING:
    from rich.console import Console

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNAVAILABLE: Final = 3
EXIT_INTERRUPTED: Final = 130

CELL_LENGTH_MAX: Final = 200
CELL_GAP: Final = 2  # between columns
# Control characters of both sets, and the marks that turn the direction of what follows.
_UNPRINTABLE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class Format(StrEnum):
    """Of reports."""

    TABLE = "table"
    JSON = "json"


class RowFormat(StrEnum):
    """Of reports that may have very many rows: `ndjson` is one JSON document a line, printed as it comes."""

    TABLE = "table"
    JSON = "json"
    NDJSON = "ndjson"


class ListFormat(StrEnum):
    """Of lists of instances: as RowFormat, and the bare ids, one a line, for other commands to read."""

    TABLE = "table"
    JSON = "json"
    NDJSON = "ndjson"
    IDS = "ids"


# -- text --------------------------------------------------------------------------------------------------------------

def printable(text: str) -> str:
    """The text with everything that a terminal would obey shown as an escape; tabs and line ends stay."""
    return _UNPRINTABLE.sub(lambda match: _escaped(match.group()), text)


def one_line(text: str, length_max: int = CELL_LENGTH_MAX) -> str:
    """Printable, on one line, and cut to a length."""
    flat = printable(text.replace("\r\n", "\n")).replace("\n", "⏎").replace("\t", " ")
    return flat if len(flat) <= length_max else flat[:length_max - 1] + "…"


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def time_text(time: datetime | None) -> str:
    """In the local time zone; nothing for a time that is not yet."""
    return "" if time is None else time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def age_text(seconds: float) -> str:
    """A short duration: "12 s", "3 m", "5 h", "2 d"."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"


def bytes_text(size: int) -> str:
    return f"{size / 1024 / 1024:.0f} MiB" if size >= 1024 * 1024 else f"{size} B"


# -- reports -----------------------------------------------------------------------------------------------------------

def json_text(value: Any) -> str:
    """One JSON document, safe to print: what a terminal would obey is written as \\u escapes, times as ISO 8601 UTC."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def show_json(value: Any) -> None:
    print(json_text(value))


def show_line(value: Any) -> None:
    """One JSON document on one line, safe to print."""
    text = msgspec.json.encode(value).decode()
    print(_UNPRINTABLE.sub(lambda match: f"\\u{ord(match.group()):04x}", text), flush=True)


def whole(report: Any) -> Any:
    """A report for JSON with all its fields: on the wire a struct leaves out those that are at their default."""
    match report:
        case msgspec.Struct():
            return {name: whole(getattr(report, name)) for name in report.__struct_fields__}
        case list():
            return [whole(item) for item in report]
        case _ if is_dataclass(report):
            return {field.name: whole(getattr(report, field.name)) for field in fields(report)}
        case _:
            return report


def console(*, error: bool = False) -> Console:
    """Colours only on a terminal, never with NO_COLOR; nothing in the text is read as markup."""
    from rich.console import Console

    stream = sys.stderr if error else sys.stdout
    return Console(file=stream, markup=False, highlight=False, emoji=False,
                   force_terminal=None if stream.isatty() else False, no_color=bool(os.environ.get("NO_COLOR")) or None)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *,
               numbers: AbstractSet[str] = frozenset()) -> None:
    """Print rows under their headings. `numbers` names the columns that stand right-aligned.

    On a terminal a table fits the width, broken between words, so that an id can be copied. When not even that fits,
    and when it is piped into something, each row is one whole line.
    """
    cells = [[one_line(str(cell)) for cell in row] for row in rows]
    widths = _fitting([columns, *cells], console().width) if sys.stdout.isatty() else None
    if widths is None:
        _show_plain([columns, *cells])
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, CELL_GAP, 0, 0))
    for column, width in zip(columns, widths, strict=True):
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold", width=width)
    for row in cells:
        table.add_row(*map(Text, row))
    console().print(table)


def _fitting(cells: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """The widths of the columns on so wide a terminal, the widest narrowed first; None when words would break."""
    columns = list(zip(*cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    least = [max((len(word) for cell in column for word in cell.split()), default=0) for column in columns]
    room = width - CELL_GAP * (len(columns) - 1)
    if sum(least) > room:
        return None
    while sum(widths) > room:
        widest = max((index for index, each in enumerate(widths) if each > least[index]), key=widths.__getitem__)
        widths[widest] -= 1
    return widths


def _show_plain(cells: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[index]) for row in cells) for index in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show_fields(fields: Mapping[str, object]) -> None:
    """Print names and values, one a line; empty values are left out. Values may have several lines."""
    width = max(len(name) for name in fields)
    for name, value in fields.items():
        text = printable(str(value))
        if text:
            print(f"{name.ljust(width)}  {text.replace(chr(10), chr(10) + ' ' * (width + 2))}")


def say(text: str) -> None:
    """A remark for people, on stderr, so that stdout keeps the report alone."""
    print(printable(text), file=sys.stderr, flush=True)


# -- errors ------------------------------------------------------------------------------------------------------------

def exit_code(error: BaseException) -> int:
    """0 is never among them: usage 2, unavailable 3, Ctrl-C 130, everything else 1."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, UsageError):
        return EXIT_USAGE
    return EXIT_UNAVAILABLE if isinstance(error, Unavailable) else EXIT_FAILED


def exit_code_of(errors: Iterable[ToqueError | None]) -> int:
    """Of many results, None where one is good: that of the errors if all have the same, else 1."""
    codes = {exit_code(error) for error in errors if error is not None}
    return EXIT_OK if not codes else codes.pop() if len(codes) == 1 else EXIT_FAILED


def report_error(error: BaseException) -> int:
    """Print one line about the error (a traceback too with TOQUE_DEBUG=1). Returns its exit code."""
    if os.environ.get("TOQUE_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    text = str(error) or type(error).__name__
    if not isinstance(error, ToqueError):
        text = f"{type(error).__name__}: {' '.join(text.split())} (unexpected; TOQUE_DEBUG=1 shows where)"
    say(f"toque: {text}")
    return exit_code(error)
