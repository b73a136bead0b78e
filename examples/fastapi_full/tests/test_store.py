"""Runs the API and a worker in the event loop of each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
from httpx import ASGITransport, AsyncClient
from store.api import api
from store.queue import queue
from store.tasks.orders import confirm, place_order
from store.tasks.reports import yearly_report


@pytest.fixture
async def client() -> AsyncIterator[AsyncClient]:
    transport = ASGITransport(api)
    async with queue.worker(), AsyncClient(transport=transport, base_url="http://store") as client:
        yield client


async def test_an_order_and_its_receipt(client: AsyncClient) -> None:
    answer = await client.post("/orders", json={"item": "tea", "amount": 2, "mail": "a@b.c"})
    assert answer.json()["price"] == 9.0


async def test_a_failed_task_is_a_500_with_its_error(client: AsyncClient) -> None:
    answer = await client.post("/orders", json={"item": "gold", "amount": 1})
    assert answer.status_code == 500
    assert "we do not sell gold" in answer.json()["detail"]


async def test_a_report_by_its_uuid(client: AsyncClient) -> None:
    started = await client.post("/reports/2025", params={"seconds": 2})
    assert started.status_code == 202
    url = started.headers["Location"]
    late = await client.get(f"{url}/result", params={"wait": 0})
    assert (late.status_code, late.json()["uuid"]) == (504, started.json()["uuid"])
    report = await client.get(f"{url}/result", params={"wait": 30})
    assert report.json() == {"year": 2025, "sold": 42}
    assert (await client.get(url)).json()["status"] == "success"


async def test_an_unknown_uuid(client: AsyncClient) -> None:
    assert (await client.get(f"/tasks/{uuid4()}")).status_code == 404


async def test_nobody_waits_for_ever(client: AsyncClient) -> None:
    for wait in ("-1", "nan", "inf", "1e9"):
        answer = await client.get(f"/tasks/{uuid4()}/result", params={"wait": wait})
        assert answer.status_code == 422


async def test_tasks_are_functions_too() -> None:
    with pytest.raises(ValueError, match="1999"):
        yearly_report(1999)
    assert {task.definition.options.queue for task in (place_order, confirm, yearly_report)} == {
        "orders", "mail", "reports",
    }  # fmt: skip
