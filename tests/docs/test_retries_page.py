"""The blocks of `docs/retries.md`, run in order; the tasks they declare do what the page says."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from qtasks import TaskFailed
from qtasks.asyncio import QueueTasks
from tests.docs.test_code_blocks import blocks_of, run
from tests.processes import ROOT


async def test_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[int] = []

    async def is_packed(order: int) -> bool:
        asked.append(order)
        return len(asked) > 2

    names: dict[str, Any] = {"__name__": "docs", "is_packed": is_packed}
    blocks = blocks_of(ROOT / "docs" / "retries.md")
    (looking_after,) = [block for block in blocks if "control.revive" in block.code]
    for block in blocks:
        if block is not looking_after:
            await run(block, names)
    app: QueueTasks = names["app"]
    app.include_router(names["router"])
    async with app.worker():
        await check_the_tasks(names)
        capsys.readouterr()
        await run(looking_after, names)
        assert "docs.fetch_price no retry is configured ValueError: no article" in (
            capsys.readouterr().out
        )
        revived = await asyncio.gather(*(app.wait(uuid, 10) for uuid in names["revived"]))
    assert sorted(str(record.dead) for record in revived) == [
        "no retry is configured", "no such order",
    ]  # fmt: skip


async def check_the_tasks(names: dict[str, Any]) -> None:
    assert (await names["greet"].add_task("you", timeout=120)).returning == "hello you"
    assert (await names["fetch_price"].add_task("tea", timeout=120)).returning == 9.5
    refused = await names["fetch_price"].add_task("", timeout=120)
    with pytest.raises(TaskFailed, match="no article"):
        _ = refused.returning
    collected = await names["collect"].add_task(1, timeout=120)
    assert (collected.returning, collected.attempt) == ("collected", 3)
    assert (await names["collect"].add_task(-1, timeout=120)).dead == "no such order"


async def test_how_often_each_runs() -> None:
    """What the page says of `retry=`, of routers and apps, and of exceptions."""
    names: dict[str, Any] = {"__name__": "docs"}
    blocks = blocks_of(ROOT / "docs" / "retries.md")
    for block in blocks[:2]:
        await run(block, names)
    retries = {
        name: [plugin.backoff(KeyError()).retries for plugin in names[name].definition.plugins]
        for name in ("send_receipt", "book_parcel", "charge_card")
    }
    # The last of them is asked first, and has an answer to everything.
    assert retries == {"send_receipt": [5, 3], "book_parcel": [5], "charge_card": [0]}
    careful = names["careful"]
    errors = [ConnectionRefusedError(), BrokenPipeError(), KeyError(), ValueError()]
    assert [careful.backoff(error).retries for error in errors] == [1, 10, 3, 0]
