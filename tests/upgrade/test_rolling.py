"""A rolling upgrade: clients and workers of the previous release and of this one share queues."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from uuid import uuid4

import pytest

from tests.e2e.crash import Log
from tests.pairs import pair_of
from tests.processes import ROOT, Process, until

pytestmark = pytest.mark.full

PREVIOUS = "75788f5"
"""The commit of the release before. Until there is one, a state that was in use for a while."""
PAIRS = ("sqlite", "redis", "postgres", "rabbitmq", "kafka", "kafka+postgres", "rabbitmq+redis")
COUNT = 40


@pytest.fixture(scope="session")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the previous release, without its environment."""
    tree = tmp_path_factory.mktemp("previous")
    packed = subprocess.run(
        ["git", "archive", "--format=tar", PREVIOUS], cwd=ROOT, capture_output=True, check=True
    )
    with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
        archive.extractall(tree, filter="data")
    shutil.copy(Path(__file__).parent / "client.py", tree / "client.py")
    return tree


@pytest.mark.parametrize("names", PAIRS)
def test_two_releases_share_queues(
    request: pytest.FixtureRequest, previous: Path, tmp_path: Path, names: str
) -> None:
    """Each client gets its results, from workers of both, and can cancel."""
    this = tmp_path / "this"
    this.mkdir()
    shutil.copy(Path(__file__).parent / "client.py", this / "client.py")
    pair = pair_of(request, names, tmp_path)
    log = Log(tmp_path / "events")
    environment = {
        **pair.environment, "QTASKS_NAME": f"upgrade-{uuid4().hex[:8]}",
        "CRASH_LOG": str(log.path), "CRASH_CONCURRENCY": "2",
    }  # fmt: skip
    of_previous = {**environment, "PYTHONPATH": str(previous)}
    with ExitStack() as stack:

        def start(*arguments: str, old: bool) -> Process:
            process = Process(
                *arguments,
                environment=of_previous if old else environment,
                cwd=previous if old else ROOT if arguments[0] == "-m" else this,
            )
            return stack.enter_context(process)

        workers = [start("-m", "tests.e2e.crash_app", old=old) for old in (True, False)]
        firsts: list[int] = []

        def both_work() -> bool:
            """Let a client of each release enqueue; say whether both workers have done something.

            On Kafka, one of them has all partitions until the other one has joined.
            """
            clients = {}
            for old in (True, False):
                firsts.append(1000 * len(firsts))
                clients[firsts[-1]] = start("client.py", str(firsts[-1]), str(COUNT), old=old)
            for first, client in clients.items():
                assert client.wait() == 0, client.output()
                answer = json.loads(client.output().splitlines()[-1])
                keyed = first + COUNT + 1
                assert answer["results"] == [*range(first, keyed), keyed, keyed]
                assert answer["cancelled"] == "cancel"
            return all(log.numbers("saved", worker.pid) for worker in workers)

        until(both_work, "both at work")
        for worker in workers:
            assert worker.terminate() == 0, worker.output()
    accepted = log.accepted()
    assert {n for n, runs in accepted.items() if len(runs) != 1} == set()
    assert len(accepted) == len(firsts) * (COUNT + 2)


def test_the_previous_release_is_another_one(previous: Path) -> None:
    """Else the test above would compare this release with itself."""
    code = "import qtasks; print(qtasks.__file__)"
    with Process("-c", code, environment={"PYTHONPATH": str(previous)}, cwd=previous) as process:
        assert process.wait() == 0, process.output()
        assert process.output().strip() == str(previous / "qtasks" / "__init__.py")
