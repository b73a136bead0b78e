"""The runner: it runs functions. Only this object of a worker lives on the loop of the tasks."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qtasks.bridge.crossing import EntryQueue
from qtasks.execution.chain import Call, decided, in_middleware
from qtasks.execution.definition import TaskDefinition
from qtasks.execution.failures import line_of, logged, reason_of, storable, trace_of
from qtasks.execution.loop import LoopExecutor
from qtasks.execution.thread import ThreadExecutor
from qtasks.signals import Reject, Retry
from qtasks.worker.job import Job
from qtasks_core import Encoded, Executor, Plugin
from qtasks_core.contracts.plugin import Decision, GiveUp
from qtasks_core.errors import BadArguments, UnstorableResult

logger = logging.getLogger("qtasks")


class Runner:
    """Runs jobs on the loop on which it was built, and posts them back once they have a result."""

    def __init__(
        self,
        definitions: Mapping[str, TaskDefinition],
        max_result: int,
        plugins: Sequence[Plugin] = (),
    ) -> None:
        self._pid = os.getpid()
        self._loop = asyncio.get_running_loop()
        self.thread = threading.get_ident()
        """The thread of the loop."""
        self._default = {True: LoopExecutor(), False: ThreadExecutor()}
        self._executors: set[Executor] = set()
        self._plugins = tuple(plugins)
        self._calls = {name: self._compile(d) for name, d in definitions.items()}
        self._definitions = definitions
        self._max_result = max_result
        self._running: dict[Job, asyncio.Task[None]] = {}
        self._returned: list[Job] = []
        self._report: EntryQueue[Job] | None = None
        self.entry_queue: EntryQueue[Job] = EntryQueue(self._loop, self._start)
        """The worker posts the jobs to run here."""

    def report_to(self, report: EntryQueue[Job]) -> None:
        """Post jobs back there from now on."""
        self._report = report

    @property
    def gone(self) -> bool:
        """Whether its loop is closed, so that no function runs any more."""
        return self._loop.is_closed()

    def cancel_all(self) -> None:
        """Cancel all functions that run; their jobs come back without a result. From any thread."""
        self._loop.call_soon_threadsafe(lambda: self._cancel(list(self._running)))

    def cancel(self, jobs: list[Job]) -> None:
        """Cancel these jobs if they still run. They come back without a result. From any thread."""
        self._loop.call_soon_threadsafe(self._cancel, jobs)

    def _cancel(self, jobs: list[Job]) -> None:
        for job in jobs:
            if (task := self._running.get(job)) is not None:
                # A task that is cancelled before its first step would never post its job back.
                self._loop.call_soon(task.cancel)

    def call_soon(self, call: Callable[[], object]) -> None:
        """Call something on the loop of the tasks. From any thread."""
        self._loop.call_soon_threadsafe(call)

    def current(self) -> Job | None:
        """Return the job whose function has the loop right now. From any thread."""
        running = asyncio.current_task(self._loop)
        return next((job for job, task in list(self._running.items()) if task is running), None)

    def stop(self) -> None:
        """Have the executors free what they no longer need."""
        for executor in self._executors:
            executor.stop()

    def _call_of(self, definition: TaskDefinition) -> Call:
        """Return the compiled call of a task. Compile it if needed: it may be declared late."""
        call = self._calls.get(definition.name)
        if call is None:
            call = self._calls[definition.name] = self._compile(definition)
        return call

    def _compile(self, definition: TaskDefinition) -> Call:
        """Return the call of one run: plugins, then the executor, which decodes and calls."""
        executor = definition.options.executor or self._default[definition.is_async]
        self._executors.add(executor)
        plugins = self._plugins_of(definition)
        return in_middleware(executor.bind(definition), plugins, definition.decode_result)

    def _plugins_of(self, definition: TaskDefinition) -> tuple[Plugin, ...]:
        """Return a task's plugins, the outermost first."""
        return (*self._plugins, *definition.plugins)

    def _start(self, jobs: list[Job]) -> None:
        for job in jobs:
            self._running[job] = self._loop.create_task(self._run(job))

    async def _run(self, job: Job) -> None:
        definition = self._definitions[job.message.task_name]
        try:
            result = await self._call_of(definition)(job.message)
        except asyncio.CancelledError as error:
            # Cancelled by `cancel`, or because the loop is being closed: it has no result.
            if not self._is_from_outside(job, error):
                self._fail(job, "CancelledError: the function cancelled itself", None, None)
        except Reject as reject:
            reason = reason_of(reject)
            self._fail(job, f"Reject: {reason}", None, reason)
        except BadArguments as error:
            # A retry would have the same arguments.
            self._fail(job, storable(f"BadArguments: {error}"), None, "bad arguments")
        except UnstorableResult as error:
            self._unstorable(job, str(error))
        except BaseException as error:  # the result of the run, unless the loop is being closed
            if self._is_from_outside(job, error):
                raise
            await self._raised(job, definition, error)
        else:
            self._succeed(job, definition, result)
        finally:
            del self._running[job]
            self._post_back(job)

    def _succeed(self, job: Job, definition: TaskDefinition, result: Any) -> None:
        returning = None
        try:
            if job.message.store_result:
                encoded = isinstance(result, Encoded)
                returning = result.data if encoded else definition.encode_result(result)
        except Exception as error:  # noqa: BLE001  # what a result's own methods raise
            self._unstorable(job, line_of(error))
        else:
            if returning is not None and len(returning) > self._max_result:
                self._unstorable(
                    job, f"it takes {len(returning)} bytes, the limit is {self._max_result}"
                )
            else:
                job.set_result("success", returning=returning)

    def _unstorable(self, job: Job, reason: str) -> None:
        self._fail(job, f"the result cannot be stored: {reason}", None, "unstorable result")

    async def _raised(self, job: Job, definition: TaskDefinition, error: BaseException) -> None:
        """Do what the plugins decide. Raises `CancelledError` if the run was cancelled."""
        if isinstance(error, Retry):
            line, trace = "Retry: the function asked for another run", None
        else:
            line, trace = line_of(error), trace_of(error)
        try:
            decision = await decided(self._plugins_of(definition), job.message, error)
        except BaseException as failure:
            if self._is_from_outside(job, failure):
                raise
            both = storable(f"{line}; then a plugin failed: {line_of(failure)}")
            self._fail(job, both, trace, "a plugin failed")
            logger.exception("a plugin of task %s %s failed", definition.name, job.message.uuid)
        else:
            self._follow(job, decision, line, trace)

    def _is_from_outside(self, job: Job, error: BaseException) -> bool:
        """Return whether the run was cancelled or its loop is being closed.

        Otherwise the function itself has raised the error.
        """
        if isinstance(error, asyncio.CancelledError):
            return self._running[job].cancelling() > 0
        return isinstance(error, GeneratorExit) and not self._loop.is_running()

    def _follow(self, job: Job, decision: Decision, line: str, trace: str | None) -> None:
        if isinstance(decision, GiveUp):
            self._fail(job, line, trace, storable(str(decision.reason)))
            return
        job.set_retry(decision.after, line, trace)
        if trace is not None:  # None: the function raised `Retry`, which is not a failure
            logger.warning(
                "task %s %s failed, attempt %d; again in %.1f s: %s",
                job.message.task_name, job.message.uuid, job.message.attempt, decision.after,
                logged(line),
            )  # fmt: skip

    def _fail(self, job: Job, error: str, trace: str | None, dead: str | None) -> None:
        job.set_result("error", error=error, traceback=trace, dead=dead or "no retry is configured")
        # Log last, here and elsewhere: it raises if a function has closed stderr.
        name, uuid = job.message.task_name, job.message.uuid
        logger.error("task %s %s failed: %s", name, uuid, logged(error))

    def _post_back(self, job: Job) -> None:
        """Post the jobs of one turn of the loop together."""
        self._returned.append(job)
        if len(self._returned) == 1:
            self._loop.call_soon(self._post)

    def _post(self) -> None:
        returned, self._returned = self._returned, []
        if self._report is not None:
            self._report.post_all(returned)
