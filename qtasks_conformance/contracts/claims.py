"""Claims: at most one owner per key, among all processes, for a limited time."""

from __future__ import annotations

import asyncio
import time

import pytest

from qtasks_conformance.contracts.base import Contract, needs
from qtasks_conformance.rig import SCRIPTS, Rig, longest_ids
from qtasks_core import Claim, Storage


class ClaimContract(Contract):
    """`claim` and `release`, if the storage has them."""

    async def test_one_of_many_has_a_claim(self, rig: Rig) -> None:
        """If several clients in several processes claim a key at once, exactly one gets it."""
        needs(rig.subject.storage, "claim", "release")
        storage, here = await rig.storage(), await rig.storage()
        other = await rig.elsewhere()
        for at in range(10):
            key = f"key {at}"
            mine, near, far = await asyncio.gather(
                storage.claim(key, "mine", 30.0),
                here.claim(key, "near", 30.0),
                other.claim(key, "far", 30.0),
            )
            assert sorted([mine is not None, near is not None, far]) == [False, False, True], (
                "exactly one of three owners must get the claim: decide it atomically"
            )

    async def test_a_claim_says_what_it_is(self, rig: Rig) -> None:
        """A claim has its key, its owner, and the Unix time at which it expires."""
        needs(rig.subject.storage, "claim", "release")
        storage = await rig.storage()
        claim = await storage.claim("a/ключ", "host:1 größe", 30.0)
        assert claim is not None
        assert (claim.key, claim.owner) == ("a/ключ", "host:1 größe")
        assert claim.expires_at == pytest.approx(time.time() + 30.0, abs=5.0)

    @pytest.mark.parametrize("script", SCRIPTS)
    async def test_the_longest_keys_and_owners_fit(self, rig: Rig, script: str) -> None:
        """Keys and owners of 200 characters of any script work, and similar ones are different."""
        needs(rig.subject.storage, "claim", "release")
        storage, other = await rig.storage(), await rig.storage()
        names = longest_ids(script)
        for key in names:
            claim = await storage.claim(key, names[0], 30.0)
            assert claim is not None
            assert (claim.key, claim.owner) == (key, names[0])
        for owner in names[1:]:
            assert await other.claim(names[0], owner, 30.0) is None
            await other.release(Claim(names[0], owner, 0.0))
        assert await other.claim(names[0], names[0], 30.0) is not None
        await other.release(Claim(names[0], names[0], 0.0))
        assert await storage.claim(names[1], names[1], 30.0) is None
        assert await storage.claim(names[0], names[1], 30.0) is not None

    async def test_a_claim_is_over_after_its_time(self, rig: Rig) -> None:
        """Another owner can get a claim after its time, and not before."""
        needs(rig.subject.storage, "claim", "release")
        storage, other = await rig.storage(), await rig.storage()
        began = time.monotonic()
        assert await storage.claim("key", "mine", 1.0) is not None
        held = time.monotonic()
        assert await wait_for(other, "key", "theirs", 1.0 + rig.subject.slack) is not None
        assert time.monotonic() - began >= 0.99
        assert time.monotonic() - held <= 1.0 + rig.subject.slack
        assert await storage.claim("key", "mine", 1.0) is None

    async def test_the_owner_extends_a_claim(self, rig: Rig) -> None:
        """The same owner extends its claim by claiming again, also from another client."""
        needs(rig.subject.storage, "claim", "release")
        storage, same = await rig.storage(), await rig.storage()
        assert await storage.claim("key", "mine", 1.0) is not None
        claim = await same.claim("key", "mine", 30.0)
        assert claim is not None
        assert claim.expires_at > time.time() + 20.0
        await asyncio.sleep(1.2)
        assert await storage.claim("key", "theirs", 1.0) is None

    async def test_a_released_claim_is_free(self, rig: Rig) -> None:
        """A released claim is free at once. Releasing a claim of another owner is ignored."""
        needs(rig.subject.storage, "claim", "release")
        storage, other = await rig.storage(), await rig.storage()
        mine = await storage.claim("key", "mine", 30.0)
        assert mine is not None
        await storage.release(mine)
        assert await other.claim("key", "theirs", 30.0) is not None
        await storage.release(mine)
        await storage.release(Claim("no such key", "mine", 0.0))
        assert await storage.claim("key", "mine", 30.0) is None

    async def test_a_killed_owner_loses_its_claim(self, rig: Rig) -> None:
        """The claim of a killed process ends with its time, neither earlier nor later."""
        needs(rig.subject.storage, "claim", "release")
        storage = await rig.storage()
        other = await rig.elsewhere()
        began = time.monotonic()
        assert await other.claim("key", "theirs", 2.0)
        await other.kill()
        assert await storage.claim("key", "mine", 30.0) is None
        assert await wait_for(storage, "key", "mine", 2.0 + rig.subject.slack) is not None
        assert time.monotonic() - began >= 1.99

    async def test_claims_stay_in_their_namespace(self, rig: Rig) -> None:
        """The same key of another app has its own claim."""
        needs(rig.subject.storage, "claim", "release")
        storage = await rig.storage()
        other = await rig.storage(namespace="other" + rig.namespace)
        assert await storage.claim("key", "mine", 30.0) is not None
        theirs = await other.claim("key", "theirs", 30.0)
        assert theirs is not None
        await other.release(theirs)
        assert await storage.claim("key", "theirs", 30.0) is None


async def wait_for(storage: Storage, key: str, owner: str, within: float) -> Claim | None:
    """Claim again and again until it is granted; None if that takes longer than `within`."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        claim = await storage.claim(key, owner, 30.0)
        if claim is not None:
            return claim
        await asyncio.sleep(0.02)
    return None
