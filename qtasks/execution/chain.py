"""The middleware chain: plugins around the runs of a task, and their decisions after a failure."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from qtasks.plugins.retries import Backoff
from qtasks_core import Encoded, TaskMessage
from qtasks_core.contracts.plugin import Again, Decision, GiveUp, Plugin, Proceed, Run

Call = Callable[[TaskMessage], Awaitable[Any]]

_NO_RETRY = Backoff(0)
"""The decision if no plugin decides: retry only if the function raises `Retry`."""


def in_middleware(call: Call, plugins: Sequence[Plugin], decode: Callable[[bytes], Any]) -> Call:
    """Return a call within its plugins, the first outermost.

    Plugins without an `around_execute` of their own cost nothing. The others get a decoded result:
    one that comes encoded from another process is decoded for them, and is None if the task keeps
    no result.
    """
    middleware = [p for p in plugins if type(p).around_execute is not Plugin.around_execute]
    if not middleware:
        return call

    async def innermost(run: Run) -> Any:
        result = await call(run.message)
        if isinstance(result, Encoded):
            return decode(result.data) if result.data else None
        return result

    proceed: Proceed = innermost
    for plugin in reversed(middleware):
        proceed = _within(plugin, proceed)

    async def outermost(message: TaskMessage) -> Any:
        return await proceed(Run(message))

    return outermost


def _within(plugin: Plugin, proceed: Proceed) -> Proceed:
    return lambda run: plugin.around_execute(run, proceed)


async def decided(
    plugins: Sequence[Plugin], message: TaskMessage, error: BaseException
) -> Decision:
    """Ask the plugins from the innermost on; return the first decision.

    Raises the error of a plugin, and `TypeError` if a plugin does not return a decision.
    """
    run = Run(message)
    for plugin in reversed(plugins):
        decision = await plugin.decide(run, error)
        if isinstance(decision, Again | GiveUp):
            return decision
        if decision is not None:
            raise TypeError(f"{type(plugin).__name__}.decide returned {decision!r}")
    return _NO_RETRY.decide(run, error)
