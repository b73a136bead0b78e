"""An app starts only with a broker and a storage that guarantee what its tasks require."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from msgspec import convert

from qtasks import AsyncRouter, ConfigurationError, Requires
from qtasks.asyncio import QueueTasks
from qtasks.execution.definition import TaskOptions
from qtasks_core import Broker, Composition, Guarantees, Storage
from qtasks_memory import MemoryBroker, MemoryStorage


class Small(MemoryBroker):
    """A broker that takes little, in no order."""

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(
            part="Small", survives="client crash", durability="appendfsync no", lease=30.0,
            largest=100_000, order="partition",
        )  # fmt: skip


class Joining(MemoryBroker):
    """A broker that can take part in a transaction, but not in that of the storage."""

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(
            part="Joining", survives="nothing", durability="", lease=30.0, transactions=True
        )

    def join(self, storage: Storage) -> Composition | None:
        return None


class JoiningStorage(MemoryStorage):
    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(
            part="JoiningStorage", survives="nothing", durability="", transactions=True
        )


def app_of(broker: type[Broker], storage: type[Storage] = MemoryStorage, **more: Any) -> QueueTasks:
    name = uuid4().hex
    return QueueTasks("shop", broker(name), storage(name), **more)  # type: ignore[call-arg]


async def refusal(app: QueueTasks) -> str:
    with pytest.raises(ConfigurationError) as caught:
        await app.start()
    return str(caught.value)


@pytest.mark.parametrize(
    ("requires", "told"),
    [
        (Requires(survives="machine crash"), "Small has survives='client crash' (appendfsync no)"),
        (Requires(order="queue"), "Small has order='partition'"),
        (Requires(largest=100_001), "Small has largest=100000"),
        *(
            (convert({name: True}, Requires), f"Small has {name}=False")
            for name in (
                "priorities", "transactions", "atomic_retries", "leases_survive",
                "counts_deliveries",
            )
        ),
    ],
)  # fmt: skip
async def test_what_is_missing_is_named_with_those_that_have_it(
    requires: Requires, told: str
) -> None:
    app = app_of(Small)

    @app.task(name="charge", requires=requires)
    async def charge() -> None: ...

    said = await refusal(app)
    assert said.startswith("the app 'shop' does not run on these servers: charge requires ")
    assert f", but {told}; each broker that can: " in said
    assert "PostgresBroker" in said.partition("; each storage")[0]


@pytest.mark.parametrize(
    "requires",
    [
        Requires(),
        Requires(survives="client crash"),
        Requires(survives="nothing", order="none", largest=100_000),
        Requires(order="partition"),
        Requires(settle_confirmed=True),
    ],
)
async def test_what_is_there_is_enough(requires: Requires) -> None:
    class Lasting(MemoryStorage):
        @property
        def guarantees(self) -> Guarantees:
            return Guarantees(part="Lasting", survives="client crash", durability="")

    app = app_of(Small, Lasting, requires=requires)

    @app.task(requires=requires)
    async def one() -> int:
        return 1

    async with app.worker():
        assert (await one.add_task(timeout=120)).returning == 1


async def test_one_message_names_all_who_ask_and_all_that_is_missing() -> None:
    app = app_of(Small, requires=Requires(priorities=True))
    router = AsyncRouter()

    @router.task(name="charge", requires=Requires(priorities=True))
    async def charge() -> None: ...

    @router.task(name="ship", requires=Requires(survives="server crash"))
    async def ship() -> None: ...

    app.include_router(router)
    said = await refusal(app)
    assert "the app, charge requires priorities=True, but Small has priorities=False;" in said
    assert "ship requires survives='server crash', but Small has survives='client crash'" in said
    assert "ship requires survives='server crash', but MemoryStorage has survives='nothing'" in said
    assert "each storage that can: " in said
    with pytest.raises(ConfigurationError):
        async with app.worker():
            pass
    app.requires = Requires()
    app.definitions.clear()
    async with app:  # what was started for the check was stopped again
        pass


async def test_a_setting_that_would_do_is_named(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tasks.db'}"
    requires = Requires(survives="machine crash")
    said = await refusal(QueueTasks("shop", url, requires=requires))
    assert "the app requires survives='machine crash', but SqliteBroker has survives=" in said
    assert "; set ?synchronous=full; each broker that can: KafkaBroker, PostgresBroker, " in said
    async with QueueTasks("shop", f"{url}?synchronous=full", requires=requires):
        pass


async def test_parts_that_cannot_join_one_transaction() -> None:
    app = app_of(Joining, JoiningStorage, requires=Requires(transactions=True))
    said = await refusal(app)
    assert said.endswith("transactions=True, but Joining and JoiningStorage use two databases")


async def test_a_task_that_is_declared_later_is_checked_then() -> None:
    app = app_of(Small)
    async with app:
        with pytest.raises(ConfigurationError, match=r"late requires order='queue'"):

            @app.task(name="late", requires=Requires(order="queue"))
            async def late() -> None: ...


def test_nonsense_is_refused_where_it_is_written() -> None:
    with pytest.raises(ConfigurationError, match="survives='anything' must be one of 'nothing'"):
        Requires(survives="anything")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="order='key' must be one of 'none'"):
        Requires(order="key")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="largest=-1 must be a number of bytes"):
        Requires(largest=-1)
    wrong: Any = "priorities"
    with pytest.raises(ConfigurationError, match=r"requires='priorities' must be a qtasks\.Req"):
        QueueTasks("shop", "memory://", requires=wrong)
    with pytest.raises(ConfigurationError, match=r"requires='priorities' must be a qtasks\.Req"):
        TaskOptions(requires=wrong)
