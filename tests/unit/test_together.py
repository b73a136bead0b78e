"""Several calls at once."""

import asyncio

import pytest

from qtasks_core.together import together


async def gives(number: int) -> int:
    await asyncio.sleep(0)
    return number


@pytest.mark.parametrize("count", [0, 1, 3])
async def test_results_come_in_order(count: int) -> None:
    assert await together([gives(number) for number in range(count)]) == list(range(count))


async def test_all_calls_finish_before_the_first_error_is_raised() -> None:
    finished: list[str] = []

    async def fails(name: str) -> None:
        await asyncio.sleep(0)
        finished.append(name)
        raise ConnectionError(name)

    async def lasts() -> None:
        await asyncio.sleep(0.01)
        finished.append("lasts")

    with pytest.raises(ConnectionError, match="first"):
        await together([fails("first"), lasts(), fails("second")])
    assert finished == ["first", "second", "lasts"]
