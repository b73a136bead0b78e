"""Which process gets which tests: played with processes that only note what they are given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.dealing import MOST, TOGETHER, Scheduling

TESTS = [
    *(f"tests/{name}/test_all.py::test_{n}" for name in ("redis", "unit") for n in range(40)),
    *(f"tests/conformance/test_pairs.py::TestRabbitMQAndRedis::test_{n}" for n in range(20)),
    *(f"tests/e2e/test_crash.py::test_{n}[{name}]" for name in MOST for n in range(20)),
    *(f"tests/kafka/test_rights.py::test_{n}" for n in range(20)),
    *(f"{directory}test_all.py::test_{n}" for directory in TOGETHER for n in range(20)),
]


class Process:
    """A test process as the scheduler sees it."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.shutting_down = False
        self.waiting: list[int] = []
        self.had: list[str] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        assert not self.shutting_down
        self.waiting += indices

    def shutdown(self) -> None:
        self.shutting_down = True


class Run:
    """A run of TESTS in so many processes, which take turns."""

    def __init__(self, count: int) -> None:
        config = SimpleNamespace(
            getvalue=lambda _: ["popen"] * count, option=SimpleNamespace(loadscopereorder=False)
        )
        self.dealing = Scheduling(config, None)
        self.all: list[Process] = []
        self.running: list[Process] = []
        for _ in range(count):
            self.begin()
        self.dealing.schedule()

    def begin(self) -> None:
        """Begin a process."""
        process = Process(f"gw{len(self.all)}")
        self.all.append(process)
        self.running.append(process)
        self.dealing.add_node(process)
        self.dealing.add_node_collection(process, TESTS)

    def crash(self, process: Process) -> str | None:
        """End a process in the midst of a test; return which test the scheduler holds for it."""
        self.running.remove(process)
        crashed: str | None = self.dealing.remove_node(process)
        return crashed

    def step(self) -> None:
        """Have each process run one test."""
        for process in list(self.running):
            # One of xdist's runs a test when it knows the next, or that there is none.
            if len(process.waiting) > (0 if process.shutting_down else 1):
                test = process.waiting.pop(0)
                process.had.append(TESTS[test])
                self.dealing.mark_test_complete(process, test)
            elif process.shutting_down:
                self.running.remove(process)
                assert self.dealing.remove_node(process) is None
        if self.dealing.tests_finished:
            for process in self.running:
                process.shutdown()

    def finish(self) -> None:
        """Run all tests that are left."""
        for _ in range(3 * len(TESTS)):
            self.step()
        assert not self.running, "a process waits for what never comes"

    def count(self, word: str) -> int:
        """Return how many processes had tests whose id has a word."""
        return sum(any(word in test for test in process.had) for process in self.all)

    def had(self) -> list[str]:
        """Return all tests that were run."""
        return sorted(test for process in self.all for test in process.had)


@pytest.mark.parametrize("count", range(1, 10))
def test_each_test_is_run_once_in_few_processes(count: int) -> None:
    run = Run(count)
    run.finish()
    assert run.had() == sorted(TESTS)
    for server, most in MOST.items():
        assert 1 <= run.count(f"[{server}]") <= most
    assert run.count("test_rights") == 1
    assert run.count("RabbitMQ") <= MOST["rabbitmq"]
    for directory in TOGETHER:
        assert run.count(directory) == 1


def test_what_takes_one_process_long_begins_at_once() -> None:
    run = Run(11)
    run.step()
    first = [*TOGETHER, "[secured kafka]", "[kafka]", "RabbitMQ", "[postgres]"]
    # The process that has all of `tests/packaging` starts a Kafka too, and counts as one of three.
    assert [run.count(word) for word in first] == [1, 1, 1, 1, 1, 2, 3, 1]


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("replaced", [True, False])
def test_after_a_crash_the_others_run_the_rest(count: int, replaced: bool) -> None:
    if count == 1 and not replaced:
        count = 3
    run = Run(count)
    for _ in range(25):
        run.step()
    for victim in run.running[:1]:
        crashed = run.crash(victim)
        assert crashed == TESTS[victim.waiting[0]], "it is the one that was running"
        if replaced:
            run.begin()
            run.dealing.schedule()
        run.finish()
        assert sorted([crashed, *run.had()]) == sorted(TESTS)
