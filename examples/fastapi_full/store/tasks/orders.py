"""Tasks for orders."""

from __future__ import annotations

import asyncio

from qtasks import AsyncRouter, Reject

from ..models import Order, Receipt

router = AsyncRouter()
PRICES = {"tea": 4.5, "coffee": 7.25}


@router.task(queue="orders", priority=9, retry=3)
async def place_order(order: Order) -> Receipt:
    if order.item not in PRICES:
        raise Reject(f"we do not sell {order.item}")  # another attempt would not help
    await asyncio.sleep(0.01)  # instead of a call to the bank
    return Receipt(order=order, price=order.amount * PRICES[order.item])


@router.task(queue="mail", priority=2, retry=10, store_result=False)
async def confirm(receipt: Receipt) -> None:
    await asyncio.sleep(0.01)  # instead of a call to the mail server
