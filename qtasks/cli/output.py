"""What commands print: JSON, one document or one object a line, and plain columns for people."""

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
"""Rows that decide how wide the columns are; what comes later is printed as it arrives."""
_TIMES = ("created_at", "started_at", "finished_at", "due_at", "seen_at")
_NARROW = 5
"""Columns of a terminal that are left of any cell."""


def json_option(command: F) -> F:
    """Add `--json` to a command."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


class JsonLines(logging.Formatter):
    """A record of the log as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        trace = self.formatException(record.exc_info) if record.exc_info else None
        said = {
            "time": record.created,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "traceback": trace,
        }
        return json.dumps(said, ensure_ascii=False)


class JsonLog(MemoryHandler):
    """The log of a command that prints JSON, held until the end: an error takes it into its own
    document.
    """

    def __init__(self) -> None:
        target = logging.StreamHandler()
        target.setFormatter(JsonLines())
        super().__init__(10_000, logging.CRITICAL + 1, target)

    def go_on(self) -> None:
        """Print each record as it comes from now on: the log of a worker."""
        self.flushLevel = logging.NOTSET
        self.flush()

    def take(self) -> list[str]:
        """Return the messages that are held, which are not printed then."""
        messages = [record.getMessage() for record in self.buffer]
        self.buffer.clear()
        return messages


def print_json(value: object) -> None:
    """Print one line of JSON."""
    click.echo(json.dumps(plain(value), ensure_ascii=False))


def confirm(question: str, yes: bool, as_json: bool) -> None:
    """Ask, unless `yes` is the answer; raise `Abort` for a no. Who reads JSON is not asked."""
    if as_json and not yes:
        raise click.UsageError("with --json nobody is asked: say --yes")
    if not yes:
        click.confirm(question, abort=True, err=True)


def print_rows(
    rows: Iterable[Row], columns: Sequence[str], as_json: bool, nothing: str = ""
) -> None:
    """Print rows as they come: one JSON object a line with all they hold, or these columns.

    On a terminal long cells are cut so that a row fits into a line. `nothing` is said on stderr
    where there is no row.
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
    """Return widths of columns that fit into a terminal's line, as far as that can be.

    The widest give way first. A uuid is never cut: it is what the next command needs.
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
    """Return a cell that is at most so wide."""
    return cell if len(cell) <= width else cell[: width - 1] + "…"


def print_fields(row: Row, as_json: bool) -> None:
    """Print one thing: a JSON document, or a line for each field that is set."""
    if as_json:
        print_json(row)
        return
    shown = {key: value for key, value in row.items() if value not in (None, {}, ())}
    width = max(map(len, shown), default=0)
    for key, value in shown.items():
        lines = (value if key == "traceback" else text(key, value, short=False)).splitlines()
        click.echo(f"\n{' ' * (width + 2)}".join([f"{key:{width}}  {lines[0]}", *lines[1:]]))


def text(name: str, value: object, short: bool = True) -> str:
    """Return a cell, `short` in one line; `-` where nothing is known."""
    if value is None:
        return "-"
    if name in _TIMES and isinstance(value, float):
        with suppress(ValueError, OverflowError):  # beyond the calendar it stays a number
            return datetime.fromtimestamp(value).astimezone().isoformat(" ", "seconds")
    if isinstance(value, str):
        found = value
    elif isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        found = ("\n" if any(" " in item for item in value) and not short else ", ").join(value)
    else:
        found = json.dumps(plain(value), ensure_ascii=False)
    return " ".join(found.split()) if short else found or '""'


def task_row(app: App, record: Task) -> Row:
    """Return what is printed of a task. Times are Unix times in seconds, as everywhere."""
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
    """Return what `read` does, or why it cannot: one bad record must not end a listing."""
    try:
        return read()
    except SerializationError as error:
        return f"<cannot be decoded: {error}>"


def plain(value: Any) -> Any:
    """Return a value as JSON can say it: bytes in base64, what else it does not know as text."""
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
        # What is within may still be what JSON cannot say, as a NaN.
        return plain(msgspec.to_builtins(value, enc_hook=str))
    except TypeError:
        return str(value)
