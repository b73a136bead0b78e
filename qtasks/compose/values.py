"""A shared value that two storages have."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Self

from msgspec import UNSET, UnsetType

from qtasks.compose.merging import Merging
from qtasks_core import Storage


class MergedValue(AsyncIterator[bytes | None]):
    """Iterates over what `read` returns: at first, and after each change at one of the storages.

    It ends when a step is cancelled or fails.
    """

    def __init__(
        self, storages: Sequence[Storage], key: str, read: Callable[[str], Awaitable[bytes | None]]
    ) -> None:
        self._merging = Merging(
            [partial(storage.watch_value, key) for storage in storages], "watching a value"
        )
        self._read = partial(read, key)
        self._shown: bytes | UnsetType | None = UNSET
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes | None:
        while not self._over:
            try:
                await self._merging.next()
                value = await self._read()
            except BaseException:
                await self.close()
                raise
            if value != self._shown:
                self._shown = value
                return value
        raise StopAsyncIteration

    async def close(self) -> None:
        """Stop watching. Idempotent."""
        self._over = True
        await self._merging.close()
