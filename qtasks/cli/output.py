"""How commands print: JSON (one document, or one object a line), or columns for people."""

from __future__ import annotations

import json
import logging
import math
import sys
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import date, datetime
from itertools import chain, islice
from logging.handlers import MemoryHandler
from shutil import get_terminal_size
from typing import Any, TypeVar

import click
import msgspec

from qtasks.app import App
from qtasks.declare.handle import Handle
from qtasks_core import Task
from qtasks_core.errors import SerializationError

Row = dict[str, Any]
F = TypeVar("F", bound=Callable[..., Any])
_MEASURED = 200
"""The first rows, which set the widths of the columns; later rows are printed as they arrive."""
_TIMES = ("created_at", "started_at", "finished_at", "due_at", "seen_at")
_NARROW = 5
"""The least width of a shortened cell, in characters."""


def json_option(command: F) -> F:
    """Add `--json` to a command."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


class JsonLines(logging.Formatter):
    """Formats each log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        trace = self.formatException(record.exc_info) if record.exc_info else None
        fields = {
            "time": record.created,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "traceback": trace,
        }
        return json.dumps(fields, ensure_ascii=False)


class JsonLog(MemoryHandler):
    """Holds the log of a command that prints JSON until it ends.

    If the command fails, the messages become a field of the document that describes the error.
    """

    def __init__(self) -> None:
        target = logging.StreamHandler()
        target.setFormatter(JsonLines())
        super().__init__(10_000, logging.CRITICAL + 1, target)

    def print_at_once(self) -> None:
        """Print each record as it comes from now on, for the log of a worker."""
        self.flushLevel = logging.NOTSET
        self.flush()

    def take(self) -> list[str]:
        """Return the messages that are held; they are not printed any more."""
        messages = [record.getMessage() for record in self.buffer]
        self.buffer.clear()
        return messages


def print_json(value: object) -> None:
    """Print one line of JSON."""
    click.echo(json.dumps(plain(value), ensure_ascii=False))


def confirm(question: str, yes: bool, as_json: bool) -> None:
    """Ask the user, unless `yes` is set; raise `Abort` if the answer is no.

    With JSON there is nobody to ask: raises `UsageError` without `yes`.
    """
    if as_json and not yes:
        raise click.UsageError("with --json no question is asked: confirm with --yes")
    if not yes:
        click.confirm(question, abort=True, err=True)


def print_rows(
    rows: Iterable[Row], columns: Sequence[str], as_json: bool, nothing: str = ""
) -> None:
    """Print rows as they come: all fields as one JSON object a line, or `columns` as a table.

    On a terminal, long cells are shortened so that a row fits into a line. If there are no rows,
    `nothing` is printed to stderr.
    """
    if as_json:
        for row in rows:
            print_json(row)
        return
    rest = iter(rows)
    first = list(islice(rest, _MEASURED))
    table = [[text(column, row.get(column)) for column in columns] for row in first]
    widths = [max(map(len, cells)) for cells in zip(columns, *table, strict=True)]
    cut = sys.stdout.isatty()
    if cut:
        widths = fitted(widths, columns, get_terminal_size().columns)
    later = ([text(column, row.get(column)) for column in columns] for row in rest)
    for cells in chain([[column.upper() for column in columns]], table, later):
        if cut:
            cells = [shortened(cell, width) for cell, width in zip(cells, widths, strict=True)]
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        click.echo(line.rstrip())
    if not first and nothing:
        click.echo(nothing, err=True)


def fitted(widths: Sequence[int], columns: Sequence[str], terminal: int) -> list[int]:
    """Return widths of columns that fit into a terminal's line, if that is possible.

    The widest columns shrink first. A uuid is never shortened: the next command needs it.
    """
    found = list(widths)
    left = [at for at, name in enumerate(columns) if name not in ("uuid", "id")]
    while sum(found) + 2 * (len(found) - 1) > terminal:
        widest = max(left, key=found.__getitem__)
        if found[widest] <= _NARROW:
            break
        found[widest] -= 1
    return found


def shortened(cell: str, width: int) -> str:
    """Return a cell of at most `width` characters."""
    return cell if len(cell) <= width else cell[: width - 1] + "…"


def print_fields(row: Row, as_json: bool) -> None:
    """Print one row: as a JSON document, or one line for each field that is set."""
    if as_json:
        print_json(row)
        return
    shown = {key: value for key, value in row.items() if value not in (None, {}, ())}
    width = max(map(len, shown), default=0)
    for key, value in shown.items():
        lines = (value if key == "traceback" else text(key, value, short=False)).splitlines()
        click.echo(f"\n{' ' * (width + 2)}".join([f"{key:{width}}  {lines[0]}", *lines[1:]]))


def text(name: str, value: object, short: bool = True) -> str:
    """Return a value as text for people, on one line if `short`; None is `-`."""
    if value is None:
        return "-"
    if name in _TIMES and isinstance(value, float):
        with suppress(ValueError, OverflowError):  # outside the calendar: shown as a number
            return datetime.fromtimestamp(value).astimezone().isoformat(" ", "seconds")
    if isinstance(value, str):
        found = value
    elif isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        found = ("\n" if any(" " in item for item in value) and not short else ", ").join(value)
    else:
        found = json.dumps(plain(value), ensure_ascii=False)
    return " ".join(found.split()) if short else found or '""'


def task_row(app: App, record: Task) -> Row:
    """Return the fields that are printed for a task. Times are Unix times in seconds."""
    handle: Handle[Any] = Handle(app, record, app.decoder_of(record))
    raw = record.encoding == "raw"
    return {
        "uuid": record.uuid,
        "task_name": record.task_name,
        "status": record.status,
        "queue": record.queue,
        "priority": record.priority,
        "attempt": record.attempt,
        "args": None if raw else decoded(lambda: handle.args),
        "kwargs": None if raw else decoded(lambda: handle.kwargs),
        "raw": record.args if raw else None,
        "returning": decoded(lambda: handle.returning) if record.status == "success" else None,
        "error": record.error,
        "dead": record.dead,
        "traceback": record.traceback,
        "worker": record.worker,
        "created_at": record.created_at or None,
        "started_at": record.started_at,
        "finished_at": record.finished_at,
        "due_at": record.due_at,
        "headers": record.headers,
    }


def decoded(read: Callable[[], object]) -> object:
    """Return the result of `read`, or a note: one bad record must not stop a listing."""
    try:
        return read()
    except SerializationError as error:
        return f"<cannot be decoded: {error}>"


def plain(value: Any) -> Any:
    """Return a value that JSON can represent: bytes as base64, any unknown type as text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes):
        return b64encode(value).decode()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, date):
        return value.isoformat()
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(mode="json"))
    try:
        # Again, because a value inside may still not fit JSON, for instance a NaN.
        return plain(msgspec.to_builtins(value, enc_hook=str))
    except TypeError:
        return str(value)
