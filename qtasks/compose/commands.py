"""The commands that come through several brokers at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from time import monotonic
from typing import Self

from msgspec.structs import replace
from uuid_utils import uuid7

from qtasks.client.retrying import Backoff
from qtasks.compose.members import SAME_OUTAGE, Member
from qtasks_core import Command
from qtasks_core.errors import QTasksError, Unavailable
from qtasks_core.receivers import Recent
from qtasks_core.together import together

_MOST = 100
"""Commands that wait for the next step. Further ones wait at their member."""


_MARK = "sent to several brokers as"
"""The argument by which the copies of a command are known."""


async def send_to_all(command: Command, members: Sequence[Member]) -> None:
    """Broadcast a command through all members. A `MergedCommands` returns it once."""
    copy = replace(command, arguments={**command.arguments, _MARK: str(uuid7())})
    await together([member.broker.broadcast(copy) for member in members])


class MergedCommands(AsyncIterator[Command]):
    """Iterates over the commands of all members, as they come.

    A member that is away holds up nobody: it is asked again after a pause. A step raises
    `Unavailable` only if all members are away. Then, and after a cancelled step, it is over.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self._came: asyncio.Queue[Command | QTasksError] = asyncio.Queue(_MOST)
        self._listeners: list[asyncio.Task[None]] = []
        self._failed_at: dict[Member, float] = {}
        self._over = False
        self._seen = Recent()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Command:
        if self._over:
            raise StopAsyncIteration
        if not self._listeners:
            self._listeners = [asyncio.create_task(self._listen(each)) for each in self._members]
        try:
            came = await self._came.get()
            if isinstance(came, QTasksError):
                raise came
        except BaseException:
            await self.close()
            raise
        return came

    async def _listen(self, member: Member) -> None:
        """Pass on the commands of one member, until that raises what asking again cannot mend."""
        backoff = Backoff()
        while True:
            try:
                async for command in member.broker.commands():
                    backoff.reset()
                    arguments = dict(command.arguments)
                    if (mark := arguments.pop(_MARK, None)) is None:
                        await self._came.put(command)
                    elif mark not in self._seen:
                        self._seen.add(mark)
                        await self._came.put(replace(command, arguments=arguments))
            except Unavailable as error:
                member.outage.failed(error)
                self._failed_at[member] = now = monotonic()
                recent = [each for each in self._failed_at.values() if now - each < SAME_OUTAGE]
                if len(recent) == len(self._members):
                    await self._came.put(error)
                    return
            except QTasksError as error:
                await self._came.put(error)
                return
            await asyncio.sleep(backoff.next())

    async def close(self) -> None:
        """Stop listening. Idempotent."""
        self._over = True
        for listener in self._listeners:
            listener.cancel()
        if self._listeners:
            await asyncio.wait(self._listeners)
