"""`docs/guarantees.md` is what the parts say of themselves on the tests' servers.

`QTASKS_WRITE_DOCS=1 python -m pytest tests/docs/test_guarantees.py` writes it anew.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from uuid import uuid4

import pytest

from qtasks.cli.backends import missing_in
from qtasks_core import Broker, Guarantees, Storage
from qtasks_core.lookup import installed_parts, resolve_broker, resolve_storage
from tests.pairs import url_of
from tests.processes import ROOT

PAGE = ROOT / "docs" / "guarantees.md"
BACKENDS = ("memory", "sqlite", "redis", "postgres", "rabbitmq", "kafka")
HEAD = """# Guarantees

What each part promises as the tests start it; `app.guarantees()` says it of yours, as it is
configured and as its server is. `tests/docs/test_guarantees.py` writes this page from the code.
"""


async def test_the_page_says_what_the_parts_say(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    brokers: list[Guarantees] = []
    storages: list[Guarantees] = []
    for name in BACKENDS:
        url = "memory://" if name == "memory" else url_of(request, name, tmp_path)
        for part, told in ((resolve_broker(url), brokers), (resolve_storage(url), storages)):
            told.append(await guarantees_of(part))
    for scheme in ("kafka+transactional://", "kafka+share://"):
        other = url_of(request, "kafka", tmp_path).replace("kafka://", scheme)
        brokers.append(await guarantees_of(resolve_broker(other)))
    page = "\n".join([HEAD, *table("Brokers", brokers, broker_row), *table("Storages", storages)])
    if os.environ.get("QTASKS_WRITE_DOCS"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page, "the page is old: QTASKS_WRITE_DOCS=1 writes it anew"


async def guarantees_of(part: Broker | Storage) -> Guarantees:
    await part.start(f"docs-{uuid4().hex[:8]}")
    try:
        return part.guarantees
    finally:
        await part.stop()


def storage_row(told: Guarantees) -> dict[str, str]:
    return {
        "part": f"`{told.part}`",
        "survives": told.survives,
        "because": told.durability,
        "at best": f"{told.at_best}: {told.best_settings}" if told.at_best else "the same",
        "takes at most": size(told.largest),
    }


def size(largest: int | None) -> str:
    """Return how much an item may have; what is left out for its envelope is not worth a word."""
    return "no bound known" if largest is None else f"{-(-largest // 2**20)} MiB"


def broker_row(told: Guarantees) -> dict[str, str]:
    return {
        **storage_row(told),
        "lease": f"{told.lease:g} s",
        "settle is confirmed": yes(told.settle_confirmed),
        "a retry is one step": yes(told.atomic_retries),
        "leases survive a crash of the server": yes(told.leases_survive),
        "keeps order": {"queue": "yes", "partition": "in each partition", "none": "no"}[told.order],
        "counts deliveries": yes(told.counts_deliveries),
        "has priorities": yes(told.priorities),
    }


def named(what: str) -> str:
    """Return a command in backticks, and other words as they are."""
    return ", ".join(f"`{w}`" if w.startswith("qtasks ") else w for w in what.split(", "))


def yes(value: bool) -> str:
    return "yes" if value else "no"


def table(title: str, told: list[Guarantees], row=storage_row) -> list[str]:  # type: ignore[no-untyped-def]
    """Return a section: a table, then what each part notes and what it cannot do yet."""
    rows = [row(guarantees) for guarantees in told]
    lines = [f"## {title}", "", "| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    lines += ["| " + " | ".join(cells.values()) + " |" for cells in rows]
    lines.append("")
    for guarantees in told:
        notes = list(guarantees.notes)
        if guarantees.unsupported:
            notes.append(f"Not supported: {', '.join(map(named, missing_in(guarantees)))}.")
        if notes:
            lines += [f"**{guarantees.part}**", "", *(f"- {note}" for note in notes), ""]
    return lines


def test_the_page_promises_nothing_that_no_call_can_ask_for() -> None:
    """A broker may be able to join the caller's transaction; `add_task` cannot ask it to."""
    promised = [line for line in PAGE.read_text().splitlines() if "caller's transaction" in line]
    assert all("`add_task` has no way to say so yet" in line for line in promised)


def test_where_order_and_priorities_hold_is_what_the_brokers_say() -> None:
    """The table in `delivery.md`."""
    page = (ROOT / "docs" / "delivery.md").read_text()
    told: dict[str, tuple[str, bool]] = {}
    for names, order, priority in re.findall(
        r"^\| (`\w+Broker`.*?) \| (.*?) \| (.*?) \|$", page, re.MULTILINE
    ):
        kept = {"in a queue": "queue", "in each partition of a queue": "partition"}[order]
        for name in re.findall(r"`(\w+)`", names):
            told[name] = kept, priority == "yes"
    assert told == {one.part: (one.order, one.priorities) for one in installed_parts("broker")}
