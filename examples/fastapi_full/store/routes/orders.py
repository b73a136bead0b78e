"""Orders: the response waits for the receipt, but not for the mail."""

from __future__ import annotations

from fastapi import APIRouter

from ..models import Order, Receipt
from ..settings import settings
from ..tasks.orders import confirm, place_order

router = APIRouter(prefix="/orders")


@router.post("")
async def order(order: Order) -> Receipt:
    placed = await place_order.call(order).add_task(timeout=settings.patience)
    receipt = placed.returning  # raises if the task failed: a 500 (a timeout above: a 504)
    if order.mail:
        await confirm.call(receipt).add_task()  # returns as soon as the task is durable
    return receipt
