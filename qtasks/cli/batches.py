"""Applies one operation to many tasks: a row for each, and a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import click

from qtasks.cli.output import Row, print_json
from qtasks_core import Outcome
from qtasks_core.errors import Refused

_BATCH = 200
Operation: TypeAlias = Callable[[list[str]], Iterable[Outcome]]


def apply(
    operation: Operation,
    uuids: list[str],
    as_json: bool,
    label: str,
    line: Callable[[Row], str],
    fields: Callable[[Outcome], Row],
) -> None:
    """Apply `operation` to tasks, batch by batch, and print the results.

    With JSON, a row is printed for each task: its uuid, `fields(outcome)`, and `error`, the reason
    if it was refused. Else `line(row)` is printed for each task that was not refused.
    Raises `Refused` at the end if any task was refused.
    """
    refused: list[str] = []
    with progress(label, length=len(uuids)) as bar:
        for at in range(0, len(uuids), _BATCH):
            batch = uuids[at : at + _BATCH]
            for uuid, outcome in zip(batch, operation(batch), strict=True):
                error = outcome.reason if outcome.status == "refused" else None
                row = {"uuid": uuid, **fields(outcome), "error": error}
                if error is not None:
                    refused.append(error)
                if as_json:
                    print_json(row)
                elif error is None:
                    click.echo(line(row))
                bar.update(1)
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise Refused(refused[0] + more)


def progress(label: str, items: Iterable[Any] | None = None, length: int | None = None) -> Any:
    """Return a progress bar on stderr.

    It is hidden if stderr is not a terminal, or if the rows are printed on the same terminal.
    """
    hidden = not sys.stderr.isatty() or sys.stdout.isatty()
    return click.progressbar(items, length, label=label, file=sys.stderr, hidden=hidden)
