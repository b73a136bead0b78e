"""An app as users write it: at import it names a server, which no test here may ask."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from decimal import Decimal
from uuid import UUID

from qtasks import AsyncRouter, QueueTasks, Reject, Retry, SyncRouter
from qtasks.asyncio import QueueTasks as AsyncQueueTasks

NOWHERE = "redis://127.0.0.1:1/0"
router = AsyncRouter()
blocking_router = SyncRouter()
sent: list[str] = []
threads: list[int] = []


@dataclass
class Order:
    item: str
    price: Decimal
    notes: list[str]


@router.task(queue="mail", priority=7)
async def send_mail(address: str, text: str = "hello") -> int:
    sent.append(address)
    return len(text)


@router.task()
async def place(order: Order, by: UUID | None = None) -> Order:
    order.notes.append("placed")
    await send_mail.add_task("ann@example.com", text=order.item)
    return order


@router.task(retry=3)
async def flaky(times: int) -> str:
    sent.append("try")
    if len(sent) < times:
        raise ConnectionError("busy")
    return f"after {len(sent)}"


@router.task()
async def again(after: float) -> str:
    sent.append("again")
    if len(sent) < 3:
        raise Retry(after=after)
    return "done"


@router.task()
async def wrong(text: str) -> None:
    raise ValueError(text)


@router.task()
async def rejected() -> None:
    raise Reject("no such order")


@router.task()
async def child(x: int) -> int:
    return x + 1


@router.task()
async def parent(x: int) -> int:
    return (await child.add_task(x, timeout=120)).returning * 10


@router.task()
def plain(text: str) -> str:
    threads.append(threading.get_ident())
    return text.upper()


@blocking_router.task()
def stamp(text: str) -> str:
    threads.append(threading.get_ident())
    sent.append(text)
    return text


@blocking_router.task()
def chain(left: int) -> None:
    sent.append(str(left))
    if left:
        chain.add_task(left - 1)


@blocking_router.task()
async def on_a_loop(text: str) -> int:
    threads.append(threading.get_ident())
    return len(text)


app = AsyncQueueTasks("shop", NOWHERE)
app.include_router(router)

blocking_app = QueueTasks("office", NOWHERE)
blocking_app.include_router(blocking_router)
