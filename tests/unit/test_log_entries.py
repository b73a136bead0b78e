"""The bytes of a log's entries: what other releases write and skip, and what garbage does."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qtasks_core import Task
from qtasks_core.errors import WireError
from qtasks_core.wire import decode_task, encode_task
from qtasks_log.entries import Claiming, Content, Deletion, Items, Setting, decode, encode

# Change a line only if two releases shall no longer share a log.
GOLDEN: dict[str, Content] = {
    "000193a576616c7565c4036f6e65a8772e313131313131": Setting(b"one", "w.111111"),
    "000193a576616c7565c0a0": Setting(None, ""),
    "000194a5636c61696da6686f73743a31cb403e000000000000a3772e31": Claiming("host:1", 30.0, "w.1"),
    "000194a5636c61696dc0cb0000000000000000a3772e32": Claiming(None, 0.0, "w.2"),
    "000193a56974656d7392c40131c400cb41d954fc40100000": Items((b"1", b""), 1_700_000_000.25),
    "000192a664656c657465c0": Deletion(),
    "000192a664656c657465a3772e33": Deletion("w.3"),
}


@pytest.mark.parametrize("golden", GOLDEN)
def test_golden_entry(golden: str) -> None:
    assert encode(GOLDEN[golden]).hex() == golden
    assert decode(bytes.fromhex(golden)) == GOLDEN[golden]


@pytest.mark.parametrize("golden", GOLDEN)
def test_a_release_that_knows_only_records_skips_it(golden: str) -> None:
    with pytest.raises(WireError):
        decode_task(bytes.fromhex(golden))


def test_a_record_is_what_it_is_everywhere() -> None:
    record = Task(uuid="u", task_name="n", status="success")
    assert encode(record) == encode_task(record)
    assert decode(encode_task(record)) == record


def test_a_later_release_may_add_a_field() -> None:
    assert decode(bytes.fromhex("000194a576616c7565c4036f6e65a3772e3107")) == Setting(b"one", "w.1")


@given(st.binary(max_size=40))
@example(b"")
@example(b"\x00")
@example(b"\x00\x01")
@example(b"\x00\x02" + encode(Deletion())[2:])
@example(b"\x00\x01\x91\xa7unknown")
@example(b"\x00\x01\x93\xa5value\xc4\x01")
def test_garbage_is_no_entry(data: bytes) -> None:
    """Whatever is read is an entry that can be written, everything else one kind of error."""
    try:
        content = decode(data)
    except WireError:
        return
    assert decode(encode(content)) == content
