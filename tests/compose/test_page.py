"""The deployments of docs/compose.md, each on real servers."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from qtasks.asyncio import QueueTasks
from tests.docs.test_code_blocks import Block, blocks_of
from tests.processes import PATIENCE, ROOT
from tests.services import Service

BLOCKS = blocks_of(ROOT / "docs" / "compose.md")


@pytest.mark.parametrize("block", BLOCKS, ids=["routed", "sharded"])
async def test_a_deployment(block: Block, redis_server: Service, tmp_path: Path) -> None:
    """One of the servers is Redis. The page's others are files here, which start at once."""
    code = block.code
    for shown, url in {
        "redis://localhost": redis_server.url,
        "kafka://localhost:9092": f"sqlite:///{tmp_path}/events.db",
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
