"""The commands that come through several brokers at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Self

from msgspec.structs import replace
from uuid_utils import uuid7

from qtasks.compose.members import Member
from qtasks.compose.merging import Merging
from qtasks_core import Command
from qtasks_core.errors import Unavailable
from qtasks_core.receivers import Recent
from qtasks_core.together import together

_MARK = "sent to several brokers as"
"""The argument by which the copies of a command are known."""


async def send_to_all(command: Command, members: Sequence[Member]) -> None:
    """Broadcast a command through all members. A `MergedCommands` returns it once."""
    copy = _marked(command)
    await together([member.broker.broadcast(copy) for member in members])


async def send_to_any(command: Command, members: Sequence[Member]) -> None:
    """Do the same, and raise `Unavailable` only if all members are away."""
    copy = _marked(command)
    results = await asyncio.gather(
        *(member.broker.broadcast(copy) for member in members), return_exceptions=True
    )
    errors = [result for result in results if isinstance(result, BaseException)]
    others = [error for error in errors if not isinstance(error, Unavailable)]
    if others or len(errors) == len(members):
        raise (others or errors)[0]


def _marked(command: Command) -> Command:
    return replace(command, arguments={**command.arguments, _MARK: str(uuid7())})


class MergedCommands(AsyncIterator[Command]):
    """Iterates over the commands of all members, as they come, until a step is cancelled or fails.

    A step raises `Unavailable` only if all members are away.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._merging = Merging(
            [member.broker.commands for member in members], "listening for commands"
        )
        self._seen = Recent()
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Command:
        while not self._over:
            try:
                command = await self._merging.next()
            except BaseException:
                await self.close()
                raise
            arguments = dict(command.arguments)
            mark = arguments.pop(_MARK, None)
            if mark is None:
                return command
            if mark not in self._seen:
                self._seen.add(mark)
                return replace(command, arguments=arguments)
        raise StopAsyncIteration

    async def close(self) -> None:
        """Stop listening. Idempotent."""
        self._over = True
        await self._merging.close()
