"""The other process of the kit: it answers, it tells errors, it is killed in whatever state."""

import asyncio
import os
from pathlib import Path

import pytest

from qtasks_conformance import Part, Subject
from qtasks_conformance.rig import Rig


@pytest.fixture
def subject() -> Subject:
    return Subject(
        broker=Part("qtasks_memory:MemoryBroker", {"lease": 30.0}),
        storage=Part("qtasks_memory:MemoryStorage"),
        lease=30.0,
    )


async def test_it_does_what_it_is_told(subject: Subject) -> None:
    rig = Rig(subject)
    other = await rig.elsewhere()
    messages = rig.messages(3)
    assert len(await other.submit(*messages)) == 3
    assert [seen.message for seen in await other.receive(3)] == messages
    assert await other.admit() == ["run"] * 3
    assert await other.extend() == [True] * 3
    outcomes = await other.complete((0, "ack", "success"), (1, "retry", "retry"))
    assert [outcome.status for outcome in outcomes] == ["done", "done"]
    assert [seen.message.attempt for seen in await other.receive(1)] == [1, 1, 1, 2]
    await rig.close()


async def test_its_errors_are_told(subject: Subject) -> None:
    rig = Rig(subject)
    other = await rig.elsewhere()
    with pytest.raises(AssertionError, match="nothing was received yet"):
        await other.extend()
    await other.kill()
    with pytest.raises(AssertionError, match="ended with -9"):
        await other.extend()
    await rig.close()


@pytest.mark.parametrize("state", ["idle", "busy", "stopped", "killed"])
async def test_none_outlives_its_rig(subject: Subject, state: str) -> None:
    rig = Rig(subject)
    before = children()
    other = await rig.elsewhere()
    (pid,) = children() - before
    if state == "busy":
        rig.background(other.receive(1))
        await asyncio.sleep(0.1)
    elif state == "stopped":
        other.pause()
    elif state == "killed":
        await other.kill()
    await rig.close()
    assert pid not in children()


def children() -> set[str]:
    """Return the pids of this process's children."""
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {pid for task in tasks for pid in task.read_text().split()}
