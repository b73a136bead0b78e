"""What a test leaves in its namespaces is removed by the subject, and by nobody before its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtasks_conformance import Part, Subject
from qtasks_conformance.rig import Rig
from qtasks_core import Broker
from qtasks_memory import MemoryBroker
from tests.kit.outside import run

RUNNING: set[Broker] = set()


class Seen(MemoryBroker):
    """A broker of which it is known whether it is stopped."""

    async def start(self, namespace: str) -> None:
        await super().start(namespace)
        RUNNING.add(self)

    async def stop(self) -> None:
        await super().stop()
        RUNNING.discard(self)


async def test_each_namespace_is_cleaned_up_once_all_is_stopped() -> None:
    """One that fails is told, and keeps no other from being cleaned up."""
    cleaned: list[str] = []

    async def clean_up(namespace: str) -> None:
        assert not RUNNING
        cleaned.append(namespace)
        raise OSError("no rights")

    storage = Part("qtasks_memory:MemoryStorage")
    broker = Part(f"{__name__}:Seen", {"lease": 1.0})
    rig = Rig(Subject(broker=broker, storage=storage, lease=1.0, clean_up=clean_up))
    await rig.broker()
    await rig.broker(namespace="other")
    await rig.storage(namespace="another")
    with pytest.raises(OSError, match="no rights") as told:
        await rig.close()
    assert sorted(cleaned) == sorted([rig.namespace, "other", "another"])
    note = f"raised by `clean_up` of the subject for namespace {cleaned[-1]}"
    assert told.value.__notes__ == [note]


TESTS = """
import pytest
from qtasks_conformance import BrokerContract, Part, Subject
from qtasks_memory import MemoryBroker

class Loses(MemoryBroker):
    async def publish(self, messages, transaction=None):
        return []

async def clean_up(namespace):
    raise OSError("no rights")

@pytest.fixture
def subject():
    return Subject(
        broker=Part("test_mine:Loses", {"lease": 1.0}),
        storage=Part("qtasks_memory:MemoryStorage"),
        lease=1.0,
        ends_with_process=True,
        clean_up=clean_up,
    )

class TestMyBroker(BrokerContract): ...
"""


def test_a_hook_that_fails_hides_no_failure(tmp_path: Path) -> None:
    told = run(tmp_path, TESTS, "test_mine.py::TestMyBroker::test_publish_answers_for_each")
    assert "1 failed, 1 error" in told, told
    assert "len(outcomes) == len(messages)" in told, told
    assert "OSError: no rights" in told, told
