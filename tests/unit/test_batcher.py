"""Batches: all of one turn together, bounded in items and in bytes."""

from __future__ import annotations

import asyncio

from qtasks.client.batcher import Batcher

MEBI = 2**20


async def batches(weights: list[int], size: int = 500) -> list[list[int]]:
    found: list[list[int]] = []

    async def flush(batch: list[int]) -> None:
        found.append(batch)

    batcher = Batcher(flush, size, 2, lambda weight: weight)
    for weight in weights:
        batcher.add(weight)
    await batcher.drain()
    return found


async def test_what_comes_in_one_turn_is_one_batch() -> None:
    assert await batches([1, 2, 3]) == [[1, 2, 3]]


async def test_a_batch_has_no_more_items_than_allowed() -> None:
    assert await batches([1] * 5, size=2) == [[1, 1], [1, 1], [1]]


async def test_a_batch_is_no_heavier_than_8_mebibytes() -> None:
    large = 3 * MEBI
    assert await batches([large] * 5) == [[large] * 2, [large] * 2, [large]]


async def test_what_is_too_heavy_by_itself_goes_alone() -> None:
    assert await batches([1, 9 * MEBI, 9 * MEBI, 1]) == [[1], [9 * MEBI], [9 * MEBI], [1]]


async def test_what_is_closed_before_its_flush_has_begun_is_returned() -> None:
    """Whatever the turn: each item is flushed, or is told to have been cancelled, or comes back."""
    for turns in range(5):
        begun: list[int] = []

        async def flush(batch: list[int], begun: list[int] = begun) -> None:
            begun.extend(batch)

        batcher = Batcher(flush, 2, 2, lambda weight: weight)
        batcher.extend([1, 2, 3, 4, 5])
        for _ in range(turns):
            await asyncio.sleep(0)
        left = await batcher.close()
        assert begun + left == [1, 2, 3, 4, 5]
