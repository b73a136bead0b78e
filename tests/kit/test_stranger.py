"""A stranger's backend: one fixture, three empty classes, no option of pytest, and no hang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TESTS = """
import pytest
import qtasks_conformance.contracts.base as base
from qtasks_conformance import BrokerContract, CompositionContract, Part, StorageContract, Subject
from qtasks_memory import MemoryStorage

base.LIMIT = 1.0

class Hangs(MemoryStorage):
    async def get(self, uuids):
        await __import__("asyncio").Event().wait()

@pytest.fixture
def subject():
    return Subject(
        broker=Part("qtasks_memory:MemoryBroker", {"lease": 1.0}),
        storage=Part(STORAGE),
        lease=1.0,
        ends_with_process=True,
    )

class TestMyBroker(BrokerContract): ...
class TestMyStorage(StorageContract): ...
class TestMyPair(CompositionContract): ...
"""


def run(directory: Path, storage: str, *tests: str) -> str:
    (directory / "test_mine.py").write_text(f"STORAGE = {storage!r}\n{TESTS}")
    (directory / "pytest.ini").write_text("[pytest]\n")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests],
        cwd=directory, capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{directory}"},
    )  # fmt: skip
    return ran.stdout + ran.stderr


def test_no_option_is_needed(tmp_path: Path) -> None:
    told = run(
        tmp_path,
        "qtasks_memory:MemoryStorage",
        "test_mine.py::TestMyBroker::test_a_message_comes_as_it_went",
        "test_mine.py::TestMyBroker::test_guarantees_are_no_less_than_pinned",
        "test_mine.py::TestMyStorage::test_closing_twice_is_harmless",
        "test_mine.py::TestMyPair::test_a_submit_repeated_late_changes_nothing",
    )
    assert "4 passed" in told, told


def test_a_call_that_hangs_fails_its_test_and_no_other(tmp_path: Path) -> None:
    told = run(
        tmp_path,
        "test_mine:Hangs",
        "test_mine.py::TestMyStorage::test_get_answers_in_order",
        "test_mine.py::TestMyStorage::test_closing_twice_is_harmless",
    )
    assert "1 failed, 1 passed" in told, told
    assert "the test hung" in told, told
