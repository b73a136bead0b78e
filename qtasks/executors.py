"""How a worker runs functions: coroutines on its loop, plain functions in threads or processes."""

from qtasks.execution.loop import LoopExecutor
from qtasks.execution.process import ProcessDied, ProcessExecutor
from qtasks.execution.thread import ThreadExecutor

__all__ = ["LoopExecutor", "ProcessDied", "ProcessExecutor", "ThreadExecutor"]
