"""What plugins do to a run: composed around its call once a task, asked after it failed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from qtasks.plugins.retries import Backoff
from qtasks_core import Encoded, TaskMessage
from qtasks_core.contracts.plugin import Again, Decision, GiveUp, Plugin, Proceed, Run

Call = Callable[[TaskMessage], Awaitable[Any]]

_NO_RETRY = Backoff(0)
"""What decides where no plugin did; a function may still ask for another run itself."""


def surrounded(call: Call, plugins: Sequence[Plugin], decode: Callable[[bytes], Any]) -> Call:
    """Return the call within the plugins, the first outermost; as it is where none has a hook.

    What comes encoded from elsewhere is decoded for the hooks; None, where none is kept.
    """
    hooked = [p for p in plugins if type(p).around_execute is not Plugin.around_execute]
    if not hooked:
        return call

    async def innermost(run: Run) -> Any:
        result = await call(run.message)
        if isinstance(result, Encoded):
            return decode(result.data) if result.data else None
        return result

    proceed: Proceed = innermost
    for plugin in reversed(hooked):
        proceed = _within(plugin, proceed)

    async def outermost(message: TaskMessage) -> Any:
        return await proceed(Run(message))

    return outermost


def _within(plugin: Plugin, proceed: Proceed) -> Proceed:
    return lambda run: plugin.around_execute(run, proceed)


async def decided(
    plugins: Sequence[Plugin], message: TaskMessage, error: BaseException
) -> Decision:
    """Return what the first plugin from the innermost on says that has an opinion.

    Raises what a plugin raises, `TypeError` when it answers what is no decision.
    """
    run = Run(message)
    for plugin in reversed(plugins):
        decision = await plugin.decide(run, error)
        if isinstance(decision, Again | GiveUp):
            return decision
        if decision is not None:
            raise TypeError(f"{type(plugin).__name__}.decide returned {decision!r}")
    return _NO_RETRY.decide(run, error)
