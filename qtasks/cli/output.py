"""What commands print: JSON, one document or one object a line, and plain columns for people."""

from __future__ import annotations

import json
import logging
import math
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import date, datetime
from itertools import chain, islice
from typing import Any, TypeVar

import click
import msgspec

from qtasks.app import App
from qtasks.handle import Handle
from qtasks_core import Task
from qtasks_core.errors import SerializationError

Row = dict[str, Any]
F = TypeVar("F", bound=Callable[..., Any])
_MEASURED = 200
"""Rows that decide how wide the columns are; what comes later is printed as it arrives."""
_TIMES = ("created_at", "started_at", "finished_at", "due_at", "seen_at")
_SHORT = 60


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


def log_json() -> None:
    """Have all that is logged in this process printed as JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.getLogger().addHandler(handler)


def print_json(value: object) -> None:
    """Print one line of JSON."""
    click.echo(json.dumps(plain(value), ensure_ascii=False))


def confirm(question: str, yes: bool, as_json: bool) -> None:
    """Ask, unless `yes` is the answer; raise `Abort` for a no. Who reads JSON is not asked."""
    if as_json and not yes:
        raise click.UsageError("with --json nobody is asked: say --yes")
    if not yes:
        click.confirm(question, abort=True, err=True)


def print_rows(rows: Iterable[Row], columns: Sequence[str], as_json: bool) -> None:
    """Print rows as they come: one JSON object a line with all they hold, or these columns."""
    if as_json:
        for row in rows:
            print_json(row)
        return
    rest = iter(rows)
    first = list(islice(rest, _MEASURED))
    table = [[text(column, row.get(column)) for column in columns] for row in first]
    widths = [max(map(len, cells)) for cells in zip(columns, *table, strict=True)]
    later = ([text(column, row.get(column)) for column in columns] for row in rest)
    for cells in chain([[column.upper() for column in columns]], table, later):
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        click.echo(line.rstrip())


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
    """Return a cell; `-` where nothing is known."""
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
    if not short:
        return found or '""'
    found = " ".join(found.split())
    return found if len(found) <= _SHORT else found[: _SHORT - 1] + "…"


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
