"""The deployments of docs/compose.md, storages.md and migrating.md, on real servers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from qtasks.asyncio import QueueTasks
from tests.docs.test_code_blocks import Block, blocks_of
from tests.processes import PATIENCE, ROOT, Process
from tests.services import Service

BLOCKS = [
    block for page in ("compose.md", "storages.md") for block in blocks_of(ROOT / "docs" / page)
]


@pytest.mark.parametrize("block", BLOCKS, ids=["routed", "sharded", "failover", "tiered"])
async def test_a_deployment(block: Block, redis_server: Service, tmp_path: Path) -> None:
    """One of the servers is Redis. The page's others are files here, which start at once."""
    code = block.code
    for shown, url in {
        "redis://localhost": redis_server.url,
        "kafka://localhost:9092": f"sqlite:///{tmp_path}/events.db",
        "amqp://localhost": f"sqlite:///{tmp_path}/first.db",
        "redis://one": redis_server.url,
        "redis://two": f"sqlite:///{tmp_path}/two.db",
        "postgresql://localhost/shop": f"sqlite:///{tmp_path}/records.db",
        '"shop"': f'"shop-{uuid4().hex[:8]}"',
    }.items():
        code = code.replace(shown, url)
    names: dict[str, object] = {"__name__": "shop", "QueueTasks": QueueTasks}
    exec(code, names)  # noqa: S102  # the page's own code
    app = names["app"]
    assert isinstance(app, QueueTasks)

    @app.task(name="here")
    async def here(queue: str) -> str:
        return queue

    async with app, app.worker(queues=["default", "events"]):
        for queue in ("default", "events"):
            task = await here.call(queue).add_task(queue=queue, timeout=PATIENCE)
            assert task.returning == queue


async def test_the_steps_of_a_move(
    redis_server: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`test_migrating` makes them with processes, under load; here with the code of the page."""
    name = f"shop-{uuid4().hex[:8]}"
    for block in blocks_of(ROOT / "docs" / "migrating.md"):
        code = block.code
        for shown, url in {
            "redis://localhost": redis_server.url,
            "kafka://localhost:9092": f"sqlite:///{tmp_path}/new.db",
            "postgresql://localhost/shop": f"sqlite:///{tmp_path}/records.db",
            '"shop"': f'"{name}"',
        }.items():
            code = code.replace(shown, url)
        (tmp_path / block.file).write_text(code)
    uuids: list[str] = []
    for stage in ("old", "moving", "new"):
        monkeypatch.setenv("STAGE", stage)
        names: dict[str, Any] = {"__name__": "shop"}
        exec((tmp_path / "shop.py").read_text(), names)  # noqa: S102  # the page's own code
        app = names["app"]
        async with app, app.worker():
            task = await names["send"].add_task(stage, timeout=PATIENCE)
            assert task.returning == f"sent to {stage}"
            uuids.append(task.uuid)
            if stage == "new":
                assert all([await app.get(uuid) is not None for uuid in uuids])
        if stage == "moving":
            with Process("copy_records.py", environment={}, cwd=tmp_path) as copying:
                assert await asyncio.to_thread(copying.wait) == 0, copying.output()
                assert copying.output() == "records copied: 1\n"
