"""The states of jobs and of workers: what is allowed, what is refused, and what the docs draw."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from qtasks.worker.job import Job
from qtasks.worker.life import Life
from qtasks.worker.states import (
    JOB_TRANSITIONS,
    WORKER_TRANSITIONS,
    IllegalTransition,
    JobState,
    Transition,
    WorkerState,
)
from qtasks_core import Ack, Delivery, Release, Retry, TaskMessage

ROOT = Path(__file__).parent.parent.parent
DESIGN = ROOT / "docs" / "design.md"
DELIVERY = Delivery(TaskMessage(uuid="1", task_name="t", queue="q"), "q", None)
OTHER = Delivery(DELIVERY.message, "q", None)


def job_in(state: JobState) -> Job:
    assert isinstance(DELIVERY.message, TaskMessage)
    job = Job(DELIVERY, DELIVERY.message, "worker/1")
    job.state = state
    return job


def life_in(state: WorkerState) -> Life:
    life = Life("worker", lambda: None)
    life.state = state
    return life


def attempts(transitions: tuple[Transition[Any], ...], states: type[Enum]) -> list[Any]:
    return [pytest.param(t, s, id=f"{t.name}-in-{s.value}") for t in transitions for s in states]


def check(
    build: Callable[[Any], Job] | Callable[[Any], Life], transition: Transition[Any], state: Enum
) -> None:
    one = build(state)
    change = getattr(one, transition.name)
    if state in transition.sources:
        change()
        assert one.state is transition.target
    else:
        with pytest.raises(IllegalTransition, match=f"{transition.name}: not allowed in"):
            change()
        assert one.state is state


@pytest.mark.parametrize(("transition", "state"), attempts(JOB_TRANSITIONS, JobState))
def test_a_job_changes_as_the_table_says(transition: Transition[JobState], state: JobState) -> None:
    check(job_in, transition, state)


@pytest.mark.parametrize(("transition", "state"), attempts(WORKER_TRANSITIONS, WorkerState))
async def test_a_worker_changes_as_the_table_says(
    transition: Transition[WorkerState], state: WorkerState
) -> None:
    check(life_in, transition, state)


def drawn(start: str) -> set[tuple[str, str, str]]:
    """Return the arrows of the diagram in the docs that starts with this state."""
    for diagram in re.findall(r"```mermaid\nstateDiagram-v2\n(.*?)```", DESIGN.read_text(), re.S):
        if f"[*] --> {start}\n" in diagram:
            return set(re.findall(r"^ +(\w+) --> (\w+) : (\w+)$", diagram, re.M))
    raise AssertionError(f"docs/design.md has no diagram that starts with {start}")


@pytest.mark.parametrize(
    ("transitions", "states"),
    [(JOB_TRANSITIONS, JobState), (WORKER_TRANSITIONS, WorkerState)],
    ids=["job", "worker"],
)
def test_the_docs_draw_the_tables(
    transitions: tuple[Transition[Any], ...], states: type[Enum]
) -> None:
    first = next(iter(states)).value
    in_code = {(s.value, t.target.value, t.name) for t in transitions for s in t.sources}
    assert drawn(first) == in_code
    text = DESIGN.read_text()
    for transition in transitions:
        assert f"\n- **{transition.name}**: " in text, "each transition has its sentence"


def test_only_two_classes_set_a_state() -> None:
    setting = re.compile(r"\.state = ")
    found = {p.name for p in (ROOT / "qtasks").rglob("*.py") if setting.search(p.read_text())}
    assert found == {"job.py", "life.py"}


def test_every_state_is_reached_and_left_but_the_last() -> None:
    for transitions, states in ((JOB_TRANSITIONS, JobState), (WORKER_TRANSITIONS, WorkerState)):
        first, *_, last = states
        reached = {transition.target for transition in transitions}
        left = {source for transition in transitions for source in transition.sources}
        assert reached == {*states} - {first}
        assert left == {*states} - {last}


class TestWhatIsSettled:
    def test_a_job_without_a_result_is_released(self) -> None:
        completion = job_in(JobState.FINISHED).settle()
        assert isinstance(completion.settlement, Release)
        assert completion.task is None

    def test_a_result_is_recorded_and_acknowledged(self) -> None:
        job = job_in(JobState.FINISHED)
        job.set_result("success", returning=b"1")
        completion = job.settle()
        assert isinstance(completion.settlement, Ack)
        assert completion.task is job.record is not None

    def test_a_retry_is_recorded_and_takes_the_place_of_the_message(self) -> None:
        job = job_in(JobState.FINISHED)
        job.set_retry(1.0, "error", None)
        completion = job.settle()
        assert isinstance(completion.settlement, Retry)
        assert completion.settlement.message.attempt == 2
        assert completion.task is not None
        assert completion.task.status == "retry"

    def test_of_a_discarded_job_the_result_does_not_count(self) -> None:
        job = job_in(JobState.DISCARDED)
        job.set_result("success", returning=b"1")
        completion = job.settle()
        assert isinstance(completion.settlement, Ack)
        assert completion.task is None

    @pytest.mark.parametrize("retried", [False, True])
    def test_without_a_lease_a_final_record_may_still_count(self, retried: bool) -> None:
        job = job_in(JobState.FINISHED)
        job.renew(DELIVERY, None)
        assert job.is_lost
        if retried:
            job.set_retry(1.0, "error", None)
        else:
            job.set_result("success")
        completion = job.settle()
        assert completion.settlement is None
        assert (completion.task is None) is retried

    def test_a_poison_candidate_that_is_released_is_not_counted(self) -> None:
        job = job_in(JobState.FINISHED)
        job.isolated_runs = 2
        completion = job.settle()
        assert isinstance(completion.settlement, Release)
        assert completion.task is not None
        assert completion.task.headers == {"qtasks-lone-runs": "1"}


class TestLeases:
    def test_the_newest_is_settled(self) -> None:
        job = job_in(JobState.RUNNING)
        job.adopt(OTHER)
        assert job.leases == (OTHER, DELIVERY)

    def test_while_one_is_being_settled_another_comes_last(self) -> None:
        job = job_in(JobState.SETTLING)
        job.adopt(OTHER)
        assert job.leases == (DELIVERY, OTHER)

    def test_one_that_is_being_settled_is_not_lost(self) -> None:
        job = job_in(JobState.SETTLING)
        job.renew(DELIVERY, None)
        assert job.leases == (DELIVERY,)

    def test_another_may_come_in_its_place(self) -> None:
        job = job_in(JobState.RUNNING)
        job.renew(DELIVERY, OTHER)
        assert job.leases == (OTHER,)

    def test_of_several_one_is_lost(self) -> None:
        job = job_in(JobState.RUNNING)
        job.adopt(OTHER)
        job.renew(OTHER, None)
        assert job.leases == (DELIVERY,)
        assert not job.is_lost

    def test_a_new_delivery_after_the_loss(self) -> None:
        job = job_in(JobState.RUNNING)
        job.renew(DELIVERY, None)
        job.adopt(OTHER)
        assert job.leases == (OTHER,)


class TestALife:
    async def test_its_events_follow_the_state(self) -> None:
        noticed: list[WorkerState] = []
        life = Life("worker", lambda: noticed.append(life.state))
        life.receive()
        assert not life.stopping.is_set()
        life.stop()
        assert life.stopping.is_set()
        assert not life.draining.is_set()
        life.drain()
        assert life.draining.is_set()
        assert not life.ended.is_set()
        life.end()
        assert life.ended.is_set()
        assert life.failed.is_set()
        assert noticed == [WorkerState.STOPPING, WorkerState.DRAINING]

    async def test_a_failure_stops_it_and_the_first_is_kept(self) -> None:
        life = Life("worker", lambda: None)
        first = RuntimeError("first")
        life.fail(first)
        assert life.stopping.is_set()
        life.drain()
        life.fail(RuntimeError("second"))
        assert life.failure is first
        assert life.state is WorkerState.DRAINING
