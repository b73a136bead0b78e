"""How a worker runs functions: coroutines on its loop, plain functions in threads or processes."""

from qtasks.executors.loop import LoopExecutor
from qtasks.executors.process import ProcessDied, ProcessExecutor
from qtasks.executors.thread import ThreadExecutor

__all__ = ["LoopExecutor", "ProcessDied", "ProcessExecutor", "ThreadExecutor"]
