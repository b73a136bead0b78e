"""The deployments of the page, each on real servers."""

from __future__ import annotations

from uuid import uuid4

import pytest

from qtasks.asyncio import QueueTasks
from tests.docs.test_code_blocks import Block, blocks_of
from tests.processes import PATIENCE, ROOT
from tests.services import Service

BLOCKS = blocks_of(ROOT / "docs" / "compose.md")


@pytest.mark.parametrize("block", BLOCKS, ids=["routed", "migrating", "failover", "sharded"])
async def test_a_deployment_of_the_page(
    block: Block,
    redis_server: Service,
    kafka_server: Service,
    postgres_server: Service,
    rabbitmq_server: Service,
) -> None:
    code = block.code
    for shown, url in {
        "redis://localhost": redis_server.url,
        "kafka://localhost:9092": kafka_server.url,
        "amqp://one": rabbitmq_server.url,
        "amqp://two": redis_server.url,
        "redis://one": redis_server.url,
        "redis://two": rabbitmq_server.url,
        "postgresql://localhost/shop": postgres_server.url,
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
