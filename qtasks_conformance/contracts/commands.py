"""Commands that are broadcast to all workers."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from qtasks_conformance.contracts.base import Contract, needs
from qtasks_conformance.rig import Rig, new_uuid
from qtasks_conformance.waiting import PATIENCE, SOON, patient, retry_call
from qtasks_core import Broker, Command
from qtasks_core.errors import Closed

HELLO = "hello"
"""The name of the command that is sent until a listener is known to listen."""


class CommandContract(Contract):
    """`broadcast` and `commands`, if the broker has them."""

    async def test_a_command_reaches_every_listener(self, rig: Rig) -> None:
        """Every listener gets every command unchanged and in order, also the sender's own."""
        needs(rig.subject.broker, "broadcast", "commands")
        brokers = [await rig.broker() for _ in range(2)]
        ears = [await listening(rig, broker, brokers[0]) for broker in (*brokers, brokers[0])]
        sent = [
            Command(name="cancel", target=new_uuid()),
            Command(name="ping"),
            Command(name="pause", target="größe", arguments={"ключ": "a\nb", "": ""}),
            *(Command(name="ping", target=str(at)) for at in range(20)),
        ]
        for command in sent:
            await brokers[0].broadcast(command)
        for ear in ears:
            assert await heard(ear, len(sent)) == sent

    async def test_a_command_comes_from_another_process(self, rig: Rig) -> None:
        """A command of another process reaches the listeners."""
        needs(rig.subject.broker, "broadcast", "commands")
        broker = await rig.broker()
        ear, other = await listening(rig, broker, broker), await rig.elsewhere()
        command = Command(name="resume", target="q")
        await other.broadcast(command)
        assert await heard(ear, 1) == [command]

    async def test_a_command_is_for_who_listens_now(self, rig: Rig) -> None:
        """A listener does not get commands from before it began to listen.

        Otherwise an old `pause` would pause a new worker.
        """
        needs(rig.subject.broker, "broadcast", "commands")
        broker = await rig.broker()
        ear = await listening(rig, broker, broker)
        await broker.broadcast(Command(name="pause"))
        assert await heard(ear, 1) == [Command(name="pause")]
        late: asyncio.Queue[Command] = asyncio.Queue()
        rig.background(listen_into(await rig.broker(), late))
        async with patient(PATIENCE, "listening to commands"):
            while late.empty():
                await broker.broadcast(Command(name=HELLO))
                await asyncio.sleep(0.02)
        assert {late.get_nowait().name for _ in range(late.qsize())} == {HELLO}

    async def test_commands_stay_in_their_namespace(self, rig: Rig) -> None:
        """Listeners of another app get nothing."""
        needs(rig.subject.broker, "broadcast", "commands")
        broker = await rig.broker()
        other = await rig.broker(namespace="other" + rig.namespace)
        ear = await listening(rig, broker, broker)
        theirs = await listening(rig, other, other)
        await broker.broadcast(Command(name="mine"))
        await other.broadcast(Command(name="theirs"))
        assert await heard(ear, 1) == [Command(name="mine")]
        assert await heard(theirs, 1) == [Command(name="theirs")]
        await asyncio.sleep(0.2)
        assert ear.empty()
        assert theirs.empty()

    async def test_stopping_ends_listening(self, rig: Rig) -> None:
        """`stop` makes a waiting listener raise `Closed`. After a cancel, another can listen."""
        needs(rig.subject.broker, "broadcast", "commands")
        broker, sender = await rig.broker(), await rig.broker()
        waiting = rig.background(listen_into(broker, asyncio.Queue()))
        await asyncio.sleep(0.2)
        waiting.cancel()
        await asyncio.wait({waiting})
        commands: asyncio.Queue[Command] = asyncio.Queue()
        waiting = rig.background(listen_into(broker, commands))
        await say_hello(commands, sender)
        await broker.stop()
        with pytest.raises(Closed):
            async with asyncio.timeout(SOON):
                await waiting


async def listen_into(broker: Broker, into: asyncio.Queue[Command]) -> None:
    """Listen, and put each command into a queue."""
    async for command in broker.commands():
        into.put_nowait(command)


async def listening(rig: Rig, broker: Broker, sender: Broker) -> asyncio.Queue[Command]:
    """Start a listener; return the queue of its commands when it is known to listen."""
    commands: asyncio.Queue[Command] = asyncio.Queue()
    rig.background(listen_into(broker, commands))
    await say_hello(commands, sender)
    return commands


async def say_hello(commands: asyncio.Queue[Command], sender: Broker) -> None:
    """Broadcast until a listener hears it; then remove these commands from its queue."""
    async with patient(PATIENCE, "listening to commands"):
        while commands.empty():
            await retry_call(lambda: sender.broadcast(Command(name=HELLO)))
            with suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    first = await commands.get()
                    commands.put_nowait(first)
    last = Command(name=HELLO, target=new_uuid())
    await retry_call(lambda: sender.broadcast(last))
    async with patient(SOON, "hearing the last command"):
        while await commands.get() != last:
            continue


async def heard(commands: asyncio.Queue[Command], count: int) -> list[Command]:
    """Return the next `count` commands, without the hellos that were meant for others."""
    got: list[Command] = []
    try:
        async with patient(SOON, f"hearing {count} commands"):
            while len(got) < count:
                command = await commands.get()
                if command.name != HELLO:
                    got.append(command)
    except TimeoutError:
        raise AssertionError(
            f"a listener got only {len(got)} of {count} commands within {SOON:g} s: {got}"
        ) from None
    return got
