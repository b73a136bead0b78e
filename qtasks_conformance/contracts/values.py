"""Small shared values: set, compare-and-set, list, watch."""

from __future__ import annotations

import asyncio

import pytest

from qtasks_conformance.commands import count_up
from qtasks_conformance.contracts.base import Contract, needs
from qtasks_conformance.rig import SCRIPTS, Rig, longest_ids
from qtasks_conformance.waiting import SOON, patient
from qtasks_core import Storage
from qtasks_core.errors import Closed

VALUES = ("set", "get_value", "values")


class ValueContract(Contract):
    """`set`, `get_value`, `values` and `watch_value`, if the storage has them."""

    async def test_a_value_comes_as_it_went(self, rig: Rig) -> None:
        """Any bytes can be set, also empty ones; None deletes. Other clients see it at once."""
        needs(rig.subject.storage, *VALUES)
        storage, other = await rig.storage(), await rig.storage()
        assert await storage.get_value("a/ключ") is None
        for value in (bytes(range(256)), b"", b"x" * 5000, None, b"again"):
            assert await storage.set("a/ключ", value)
            assert await other.get_value("a/ключ") == value
        assert await storage.set("no such", None)
        assert await other.get_value("no such") is None

    @pytest.mark.parametrize("script", SCRIPTS)
    async def test_the_longest_keys_fit(self, rig: Rig, script: str) -> None:
        """Keys of 200 characters of any script work; each key has its own value."""
        needs(rig.subject.storage, *VALUES)
        storage, other = await rig.storage(), await rig.storage()
        keys = longest_ids(script)
        values = {key: b"%d" % at for at, key in enumerate(keys)}
        for key, value in values.items():
            assert await storage.set(key, value, expect=None)
        for key, value in values.items():
            assert await other.get_value(key) == value
        assert await other.values(keys[0][:100]) == values
        assert await other.values(keys[0]) == {keys[0]: values[keys[0]]}

    @pytest.mark.parametrize("script", SCRIPTS)
    async def test_the_longest_key_is_watched(self, rig: Rig, script: str) -> None:
        """A watcher sees the changes of its key, not those of a similar key."""
        needs(rig.subject.storage, *VALUES, "watch_value")
        storage, other = await rig.storage(), await rig.storage()
        key, near, _ = longest_ids(script)
        seen = watching(rig, storage, key)
        assert await see(seen, None) == [None]
        assert await other.set(near, b"near")
        await asyncio.sleep(0.2)
        assert await other.set(key, b"mine")
        assert await see(seen, b"mine") == [b"mine"]

    async def test_a_value_is_set_if_it_is_the_expected(self, rig: Rig) -> None:
        """`set` with `expect` changes a value only if it is the expected one; None means unset."""
        needs(rig.subject.storage, *VALUES)
        storage = await rig.storage()
        assert not await storage.set("key", b"1", expect=b"0")
        assert await storage.get_value("key") is None
        assert await storage.set("key", b"1", expect=None)
        assert not await storage.set("key", b"2", expect=None)
        assert not await storage.set("key", b"2", expect=b"")
        assert await storage.get_value("key") == b"1"
        assert await storage.set("key", b"2", expect=b"1")
        assert not await storage.set("key", None, expect=b"1")
        assert await storage.get_value("key") == b"2"
        assert await storage.set("key", None, expect=b"2")
        assert await storage.get_value("key") is None
        assert await storage.set("key", None, expect=None)

    async def test_processes_count_together(self, rig: Rig) -> None:
        """Concurrent compare-and-sets in two processes lose no update."""
        needs(rig.subject.storage, *VALUES)
        storage, here = await rig.storage(), await rig.storage()
        other = await rig.elsewhere()

        async def count(mine: Storage) -> None:
            for _ in range(20):
                await count_up(mine, "count")

        await asyncio.gather(count(storage), count(here), other.increment("count", 20))
        assert await storage.get_value("count") == b"60"

    async def test_a_value_outlives_its_process(self, rig: Rig) -> None:
        """A value stays after the process that set it was killed."""
        needs(rig.subject.storage, *VALUES)
        storage = await rig.storage()
        other = await rig.elsewhere()
        await other.set("worker/1", b"alive")
        await other.kill()
        assert await storage.get_value("worker/1") == b"alive"
        assert await storage.values("worker/") == {"worker/1": b"alive"}

    async def test_values_are_listed_by_prefix(self, rig: Rig) -> None:
        """`values` returns all keys with a prefix, no deleted ones; `*` and `_` are literal."""
        needs(rig.subject.storage, *VALUES)
        storage, other = await rig.storage(), await rig.storage()
        there = {
            "worker/1": b"1", "worker/größe": b"2", "worker/": b"", "worker": b"4", "workers": b"5",
            "w*": b"6", "w_rker/1": b"7", "worker/😀": b"8",
        }  # fmt: skip
        for key, value in there.items():
            assert await storage.set(key, value)
        assert await storage.set("worker/gone", b"x")
        assert await storage.set("worker/gone", None)
        for prefix in ("worker/", "worker", "w*", "w_", "w", "", "no such"):
            expected = {key: value for key, value in there.items() if key.startswith(prefix)}
            assert await other.values(prefix) == expected, prefix

    async def test_a_watcher_sees_changes(self, rig: Rig) -> None:
        """A watcher gets the current value first, then each change by any client or process."""
        needs(rig.subject.storage, *VALUES, "watch_value")
        storage, near = await rig.storage(), await rig.storage()
        far = await rig.elsewhere()
        seen = watching(rig, storage, "key")
        assert await see(seen, None) == [None]
        assert await near.set("key", b"1")
        assert await see(seen, b"1") == [b"1"]
        await far.set("key", b"2")
        assert await see(seen, b"2") == [b"2"]
        assert await storage.set("key", None)
        assert await see(seen, None) == [None]
        assert await near.set("other", b"3")
        late = watching(rig, near, "other")
        assert await see(late, b"3") == [b"3"]

    async def test_a_watcher_sees_the_last_of_many_changes(self, rig: Rig) -> None:
        """A watcher may skip values, but gets none twice or out of order, and always the last."""
        needs(rig.subject.storage, *VALUES, "watch_value")
        storage, near = await rig.storage(), await rig.storage()
        seen = watching(rig, storage, "key")
        await see(seen, None)
        for at in range(100):
            assert await near.set("key", b"%03d" % at)
        got = await see(seen, b"099")
        assert got == sorted({value for value in got if value is not None})

    async def test_stopping_ends_watching(self, rig: Rig) -> None:
        """`stop` makes a waiting watcher raise `Closed`. After a cancel, another can watch."""
        needs(rig.subject.storage, *VALUES, "watch_value")
        storage = await rig.storage()
        for end in ("cancel", "stop"):
            seen: asyncio.Queue[bytes | None] = asyncio.Queue()
            waiting = rig.background(watch_into(storage, "key", seen))
            await see(seen, None)
            if end == "cancel":
                waiting.cancel()
                await asyncio.wait({waiting})
        await storage.stop()
        with pytest.raises(Closed):
            async with asyncio.timeout(SOON):
                await waiting

    async def test_values_stay_in_their_namespace(self, rig: Rig) -> None:
        """The same key of another app has its own value."""
        needs(rig.subject.storage, *VALUES)
        storage = await rig.storage()
        other = await rig.storage(namespace="other" + rig.namespace)
        assert await storage.set("key", b"mine")
        assert await other.get_value("key") is None
        assert await other.values("") == {}
        assert await other.set("key", b"theirs", expect=None)
        assert await storage.get_value("key") == b"mine"
        assert await storage.values("") == {"key": b"mine"}


async def watch_into(storage: Storage, key: str, into: asyncio.Queue[bytes | None]) -> None:
    """Watch a key, and put each value into a queue."""
    async for value in storage.watch_value(key):
        into.put_nowait(value)


def watching(rig: Rig, storage: Storage, key: str) -> asyncio.Queue[bytes | None]:
    """Start a watcher; return the queue of its values."""
    seen: asyncio.Queue[bytes | None] = asyncio.Queue()
    rig.background(watch_into(storage, key, seen))
    return seen


async def see(seen: asyncio.Queue[bytes | None], until: bytes | None) -> list[bytes | None]:
    """Return the values that a watcher gets, up to `until`; fail if that does not come."""
    got: list[bytes | None] = []
    try:
        async with patient(SOON, f"seeing the value {until!r}"):
            while not got or got[-1] != until:
                got.append(await seen.get())
    except TimeoutError:
        raise AssertionError(
            f"a watcher did not get the value {until!r} within {SOON:g} s, only {got}"
        ) from None
    return got
