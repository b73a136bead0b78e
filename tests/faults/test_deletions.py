"""A queue that an operator deletes at the server, while clients and workers use it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtasks_kafka.connection import topic_name
from qtasks_rabbitmq.topology import Names
from tests.e2e.crash import Setting
from tests.faults.load import loaded
from tests.pairs import pair_of
from tests.rabbitmq.operator import operator
from tests.services import Service
from tests.services.kafka import asking


async def delete(server: Service, namespace: str) -> None:
    """Delete the default queue of an app."""
    if server.name == "kafka":
        async with asking(server.url) as admin:
            await admin.delete_topics([topic_name(namespace, "queue", "default")])
    else:
        async with operator(server.url) as channel:
            await channel.queue_delete(Names(namespace).queue("default"))


@pytest.mark.parametrize("backend", ["rabbitmq", "kafka"])
async def test_a_deleted_queue_is_made_again_and_served(
    request: pytest.FixtureRequest, tmp_path: Path, backend: str
) -> None:
    """It is empty when it is deleted, so nothing may be lost."""
    setting = Setting(pair_of(request, backend, tmp_path), tmp_path)
    server: Service = request.getfixturevalue(f"{backend}_server")
    async with loaded(setting) as load:
        await load.rest()
        await delete(server, setting.name)
        load.begin()
        await load.goes_on()
