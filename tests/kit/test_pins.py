"""What is pinned as not built yet is exact: one method more, or one less, fails."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from msgspec import structs

from qtasks_conformance.contracts.declaring import assert_at_least, assert_declared
from qtasks_conformance.subject import Least
from qtasks_core import Guarantees

PINNED = Least(lacks=("depth", "purge"))


def declaring(*unsupported: str) -> Guarantees:
    return Guarantees(part="P", survives="nothing", durability="none", unsupported=unsupported)


def test_what_is_pinned_passes() -> None:
    assert_at_least(declaring("purge", "depth"), PINNED)


@pytest.mark.parametrize("unsupported", [(), ("depth",), ("depth", "purge", "migrate")])
def test_any_other_list_fails(unsupported: tuple[str, ...]) -> None:
    with pytest.raises(AssertionError):
        assert_at_least(declaring(*unsupported), PINNED)


@pytest.mark.parametrize(
    ("field", "pinned", "less"),
    [
        ("survives", "server crash", "client crash"),
        ("settle_confirmed", True, False),
        ("counts_deliveries", True, False),
        ("priorities", True, False),
        ("transactions", True, False),
        ("atomic_retries", True, False),
    ],
)
def test_declaring_less_fails_and_more_passes(field: str, pinned: Any, less: Any) -> None:
    told, least = declaring("depth", "purge"), replace(PINNED, **{field: pinned})
    assert_at_least(structs.replace(told, **{field: pinned}), least)
    assert_at_least(structs.replace(told, **{field: pinned}), replace(PINNED, **{field: less}))
    with pytest.raises(AssertionError):
        assert_at_least(structs.replace(told, **{field: less}), least)


async def test_a_method_that_works_and_is_declared_not_to_fails() -> None:
    async def works() -> None: ...

    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        await assert_declared(works, "depth", ("depth",))
