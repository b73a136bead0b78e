"""A worker: it receives, runs and completes jobs. This module connects its objects.

A batch takes this way: `Consumer` receives it and asks the storage which jobs still have to run,
`Runner` runs those on the loop of the tasks, `Completer` saves the results and settles the
deliveries. Meanwhile `Heartbeat` extends the leases, and `Cancelling` looks for cancelled tasks.
All but the runner live on the I/O loop: a task that blocks its own loop holds up none of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine, Iterable
from contextlib import suppress
from typing import Any

from uuid_utils import uuid7

from qtasks.bridge.crossing import EntryQueue
from qtasks.client.client import Client
from qtasks.client.retrying import Retrying
from qtasks.worker.cancelling import Cancelling
from qtasks.worker.commands import Commands
from qtasks.worker.completer import Completer
from qtasks.worker.consumer import Consumer
from qtasks.worker.heartbeat import Heartbeat
from qtasks.worker.job import Jobs
from qtasks.worker.life import Life
from qtasks.worker.limits import Limits
from qtasks.worker.poison import PoisonCandidates
from qtasks.worker.registry import Registration
from qtasks.worker.retention import expire
from qtasks.worker.runner import Runner
from qtasks.worker.states import WorkerState
from qtasks.worker.watchdog import watch
from qtasks_core import Balancer, Subscription

logger = logging.getLogger("qtasks")

UNWIND_WITHIN = 3.0
"""Seconds in which a function that was cancelled has to return."""
DRAIN_WITHIN = 10.0
"""Seconds for recording the last results if the server does not answer."""


class Worker:
    """Receives from `queues` and keeps up to `concurrency` jobs running."""

    def __init__(
        self,
        client: Client,
        runner: Runner,
        known: Collection[str],
        queues: Iterable[str],
        concurrency: int,
        balancer: Balancer,
        limits: Limits,
    ) -> None:
        self.id = str(uuid7())
        self.limits = limits
        self._runner = runner
        self._storage = client.storage
        self._requirements = client.requirements
        self._lease = client.broker.guarantees.lease
        self._stop_task: asyncio.Task[None] | None = None
        self._most_grace: float | None = None
        """Upper limit of the grace period in seconds: 0 once running functions were released."""
        queues = tuple(queues)
        self._retrying = Retrying()
        self._jobs = Jobs(queues, runner.entry_queue)
        self._life = Life(self.id, self._jobs.notice)
        self._completer = Completer(
            client.composition,
            client.storage.guarantees,
            self._jobs,
            self._life,
            self._retrying,
            limits,
        )
        self._heartbeat = Heartbeat(self._jobs, self._completer, self._retrying)
        self._cancelling = Cancelling(self._jobs, client.storage, runner, self._retrying)
        self._candidates = PoisonCandidates(
            self._jobs, client.storage, self._completer, self._retrying, self._life.stopping
        )
        self._consumer = Consumer(
            self.id,
            client,
            known,
            queues,
            concurrency,
            balancer,
            self._jobs,
            self._completer,
            self._candidates,
            self._life,
            self._retrying,
        )
        self._registration = Registration(self.id, queues, concurrency, self._jobs, client.storage)
        self._commands = Commands(
            client.broker, self._consumer, self._cancelling, self._registration
        )
        runner.report_to(EntryQueue(asyncio.get_running_loop(), self._completer.take_back))

    @property
    def ready(self) -> bool:
        """Whether it receives, and its servers answer and guarantee what tasks require."""
        return (
            self._life.state is WorkerState.RECEIVING
            and self._retrying.healthy
            and not self._requirements.missing
        )

    @property
    def failure(self) -> Exception | None:
        """The first error that a retry cannot fix."""
        return self._life.failure

    async def failed(self) -> None:
        """Wait until the worker has failed, or has ended."""
        await self._life.failed.wait()

    # -- working ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until `stop`, and return when everything is settled.

        Raises the error of a broker or a storage that a retry cannot fix. The worker receives no
        more then, running functions may finish until `stop` is called, and `failed` returns at
        once.
        """
        try:
            await self._work()
        except Exception as error:  # noqa: BLE001  # raised below
            self._life.fail(error)
        finally:
            if not self._life.stopping.is_set():  # cancelled
                self._life.stop()
            self._life.end()
        if self.failure is not None:
            raise self.failure

    async def _work(self) -> None:
        subscription = await self._consumer.open()
        if subscription is None:
            return
        self._life.receive()
        async with asyncio.TaskGroup() as group:
            self._completer.open(subscription, group.create_task)
            receiving = group.create_task(self._vital(self._consumer.receive(subscription)))
            background = [group.create_task(call) for call in self._background(subscription)]
            await self._life.stopping.wait()
            self._stop_if_alone()
            await self._life.draining.wait()
            await receiving
            await self._drain()
            for task in background:
                task.cancel()
            await self._completer.close()

    def _background(self, subscription: Subscription) -> Iterable[Coroutine[Any, Any, None]]:
        """Return the background work of a worker. It costs nothing while there are no jobs."""
        return (
            self._vital(self._heartbeat.extend_leases(subscription, self._lease)),
            self._vital(self._heartbeat.note_running()),
            self._vital(self._cancelling.watch(self._lease)),
            self._vital(watch(self._jobs, self._runner)),
            _optional(self._registration.renew(), "the registry of workers"),
            _optional(self._commands.listen(), "commands"),
            _optional(self._requirements.watch(), "comparing what tasks require"),
            _optional(expire(self._storage, self.id), "deleting old records"),
        )

    async def _vital(self, call: Coroutine[Any, Any, None]) -> None:
        """Await a coroutine that tasks depend on: if it fails, the worker fails."""
        try:
            await call
        except Exception as error:  # noqa: BLE001  # raised by `run`
            self._life.fail(error)
            self._stop_if_alone()

    def _stop_if_alone(self) -> None:
        """Stop at once if the loop of the tasks is closed: then nothing there can call `stop`."""
        if self._runner.gone:
            self._begin_to_stop(0.0)

    # -- stopping --------------------------------------------------------------------------

    async def stop(self, grace: float | None) -> None:
        """Stop receiving, let running functions finish for `grace` seconds, release the rest.

        Returns when the worker has ended, also if it was called before.
        """
        await asyncio.shield(self._begin_to_stop(grace))

    def _begin_to_stop(self, grace: float | None) -> asyncio.Task[None]:
        if self._stop_task is None:
            self._stop_task = asyncio.create_task(self._stop(grace))
        return self._stop_task

    async def _stop(self, grace: float | None) -> None:
        if not self._life.stopping.is_set():
            self._life.stop()
        self.limits.close()
        try:
            await self._consumer.close()
            async with asyncio.timeout(grace if self._most_grace is None else self._most_grace):
                await self._jobs.until(lambda: self._jobs.idle or self._most_grace is not None)
        except TimeoutError:
            self._cancel_functions()
        finally:
            if self._life.state is WorkerState.STOPPING:
                self._life.drain()
        await self._life.ended.wait()

    def release(self) -> None:
        """Cancel running functions and release their messages now, without a grace period."""
        self._most_grace = 0.0
        self._cancel_functions()
        self._jobs.notice()

    def _cancel_functions(self) -> None:
        if not self._runner.gone:
            self._runner.cancel_all()

    async def _drain(self) -> None:
        """Complete what is left: results are recorded, the rest is released."""
        self._candidates.release()
        await self._abandon_functions()
        try:
            async with asyncio.timeout(DRAIN_WITHIN):
                await self._jobs.until(lambda: not self._jobs)
                await self._completer.drain()
        except TimeoutError:
            logger.error(
                "%d results could not be recorded before the stop; those tasks will run again",
                len(self._jobs),
            )

    async def _abandon_functions(self) -> None:
        """Stop waiting for functions that ignore their cancellation or block their loop."""
        with suppress(TimeoutError):
            async with asyncio.timeout(UNWIND_WITHIN):
                await self._jobs.until(lambda: self._jobs.idle)
        abandoned = self._jobs.with_the_runner()
        for job in abandoned:
            logger.error(
                "task %s %s still runs although it was cancelled; its message is released",
                job.message.task_name, job.message.uuid,
            )  # fmt: skip
        self._completer.release(abandoned)


async def _optional(call: Coroutine[Any, Any, None], what: str) -> None:
    """Await a coroutine that no task depends on: if it fails, the worker goes on without it."""
    try:
        await call
    except Exception as error:  # logged; the worker goes on
        logger.error("%s failed, and rests until the next start: %s", what, error, exc_info=error)
