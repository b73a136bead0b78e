"""The wire format: what comes back, what an older release would see, and what garbage does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qtasks_core import Command, Raw, Task, TaskMessage
from qtasks_core.errors import WireError
from qtasks_core.schemas import LONGEST
from qtasks_core.wire import (
    VERSION,
    decode_command,
    decode_message,
    decode_task,
    encode_command,
    encode_message,
    encode_task,
)
from tests.unit.golden import vectors

GOLDEN = Path(__file__).parent / "golden"

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ids = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=200
)
names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", fullmatch=True)
number = st.floats(allow_nan=False)
seconds = st.floats(0, LONGEST)
messages = st.builds(
    TaskMessage,
    uuid=ids,
    task_name=text,
    queue=names,
    args=st.binary(max_size=40),
    kwargs=st.binary(max_size=40),
    encoding=text,
    priority=st.integers(0, 9),
    delay=seconds,
    attempt=st.integers(1, 2**31 - 1),
    reply_to=st.none() | ids,
    created_at=seconds,
    expires_at=st.none() | seconds,
    store_result=st.booleans(),
    retention=st.none() | seconds,
    headers=st.dictionaries(text, text, max_size=3),
    submission=text,
)
tasks = st.builds(
    Task,
    uuid=ids,
    task_name=text,
    status=st.sampled_from(["new", "scheduled", "process", "retry", "success", "error", "cancel"]),
    queue=text,
    args=st.binary(max_size=40),
    kwargs=st.binary(max_size=40),
    encoding=text,
    priority=st.integers(0, 9),
    attempt=st.integers(1, 2**63),
    execution=text,
    returning=st.none() | st.binary(max_size=40),
    error=st.none() | text,
    traceback=st.none() | text,
    dead=st.none() | text,
    worker=st.none() | text,
    reply_to=st.none() | ids,
    created_at=number,
    started_at=st.none() | number,
    finished_at=st.none() | number,
    due_at=st.none() | number,
    retention=st.none() | number,
    headers=st.dictionaries(text, text, max_size=3),
    submission=text,
)


def test_the_strategies_know_every_field() -> None:
    """So that a field which is added is drawn too: see `messages` and `tasks`."""
    assert TaskMessage.__struct_fields__ == (
        "uuid", "task_name", "queue", "args", "kwargs", "encoding", "priority", "delay", "attempt",
        "reply_to", "created_at", "expires_at", "store_result", "retention", "headers",
        "submission",
    )  # fmt: skip
    assert Task.__struct_fields__ == (
        "uuid", "task_name", "status", "queue", "args", "kwargs", "encoding", "priority", "attempt",
        "execution", "returning", "error", "traceback", "dead", "worker", "reply_to", "created_at",
        "started_at", "finished_at", "due_at", "retention", "headers", "submission",
    )  # fmt: skip


@given(messages)
def test_message_comes_back(message: TaskMessage) -> None:
    assert decode_message(encode_message(message)) == message


@given(tasks)
def test_record_comes_back(task: Task) -> None:
    assert decode_task(encode_task(task)) == task


@given(messages, tasks)
def test_any_buffer_will_do(message: TaskMessage, task: Task) -> None:
    """Drivers hand over bytearrays and memoryviews as well."""
    for kind in (bytearray, memoryview):
        assert decode_message(kind(encode_message(message))) == message  # type: ignore[arg-type]
        assert decode_task(kind(encode_task(task))) == task  # type: ignore[arg-type]


# -- releases that differ


def with_fields(data: bytes, **more: Any) -> bytes:
    fields = msgspec.msgpack.decode(data[1:])
    return data[:1] + msgspec.msgpack.encode(fields | more)


@given(messages, tasks)
def test_unknown_fields_are_ignored(message: TaskMessage, task: Task) -> None:
    more = {"from_the_future": [1, {"a": b"b"}], "": None}
    assert decode_message(with_fields(encode_message(message), **more)) == message
    assert decode_task(with_fields(encode_task(task), **more)) == task


def test_fields_at_their_default_are_left_out() -> None:
    fields = msgspec.msgpack.decode(encode_message(TaskMessage(uuid="u", task_name="n"))[1:])
    assert fields == {"uuid": "u", "task_name": "n"}
    fields = msgspec.msgpack.decode(encode_task(Task(uuid="u", task_name="n", status="new"))[1:])
    assert fields == {"uuid": "u", "task_name": "n", "status": "new"}


@pytest.mark.parametrize("version", [0, 2, 0x80, 255])
def test_another_version_is_refused_by_name(version: int) -> None:
    data = bytes([version]) + encode_message(TaskMessage(uuid="u", task_name="n"))[1:]
    raw = decode_message(data)
    assert raw == Raw(data, f"wire format {version}, this release reads {VERSION}")
    with pytest.raises(WireError, match=f"wire format {version}"):
        decode_task(data)


# -- garbage


def check_garbage(data: bytes) -> None:
    """A message or a Raw that keeps all of it; a record or a WireError; nothing else."""
    message = decode_message(data)
    if isinstance(message, Raw):
        assert message.data == data
        assert message.error
    else:
        assert isinstance(message, TaskMessage)
    try:
        task = decode_task(data)
    except WireError:
        pass
    else:
        assert isinstance(task, Task)
    try:
        command = decode_command(data)
    except WireError:
        return
    assert isinstance(command, Command)


@given(st.binary(max_size=60))
@example(b"")
@example(bytes([VERSION]))
def test_any_bytes(data: bytes) -> None:
    check_garbage(data)
    check_garbage(bytes([VERSION]) + data)


@given(messages, tasks, st.data())
def test_truncated(message: TaskMessage, task: Task, data: st.DataObject) -> None:
    for whole in (encode_message(message), encode_task(task)):
        part = whole[: data.draw(st.integers(0, len(whole) - 1))]
        assert isinstance(decode_message(part), Raw)
        with pytest.raises(WireError):
            decode_task(part)


@given(messages | tasks, st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255))))
def test_mutated(item: TaskMessage | Task, changes: list[tuple[int, int]]) -> None:
    encode = encode_message if isinstance(item, TaskMessage) else encode_task
    data = bytearray(encode(item))  # type: ignore[arg-type]
    for at, value in changes:
        data[at % len(data)] = value
    check_garbage(bytes(data))


@given(messages, st.binary(min_size=1, max_size=10))
def test_bytes_behind_the_end(message: TaskMessage, more: bytes) -> None:
    assert isinstance(decode_message(encode_message(message) + more), Raw)


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a", b"\x82\xa4uuid\xa1u\xa1x\x91"])
def test_deep_nesting_does_not_exhaust_the_stack(opening: bytes) -> None:
    check_garbage(bytes([VERSION]) + opening + b"\x91" * 1_000_000)
    check_garbage(bytes([VERSION]) + opening + b"\x81\xa1a" * 1_000_000)


@pytest.mark.parametrize(
    "fields",
    [
        {"uuid": "u"},
        {"uuid": "u", "task_name": None},
        {"uuid": "u", "task_name": b"n"},
        {"uuid": "u", "task_name": "n", "priority": "high"},
        {"uuid": "u", "task_name": "n", "attempt": 1.5},
        {"uuid": "u", "task_name": "n", "headers": {"a": 1}},
        {"uuid": "u", "task_name": "n", "args": "text"},
        ["u", "n"],
    ],
)
def test_wrong_types_are_named(fields: object) -> None:
    assert isinstance(decode_message(bytes([VERSION]) + msgspec.msgpack.encode(fields)), Raw)


@pytest.mark.parametrize("queue", ["", "a b", "a\n", "-a", "ä", "a" * 101])
def test_a_queue_that_is_no_name(queue: str) -> None:
    """Brokers rely on names, and a retry goes where the message says."""
    data = encode_message(TaskMessage(uuid="u", task_name="n", queue=queue))
    raw = decode_message(data)
    assert isinstance(raw, Raw)
    assert raw.data == data
    assert "no name of a queue" in raw.error


@pytest.mark.parametrize(
    "fields",
    [
        {"uuid": "u" * 201},
        {"uuid": ""},
        {"reply_to": "中" * 201},
        {"submission": "u" * 201},
        *({"priority": value} for value in (-1, 10, 2**63)),
        *({"attempt": value} for value in (0, -1, 2**31, 2**60, 2**64 - 1)),
        *(
            {name: value}
            for name in ("delay", "created_at", "expires_at", "retention")
            for value in (float("nan"), float("inf"), -1.0, 1e300)
        ),
    ],
    ids=str,
)
def test_a_value_that_some_server_cannot_hold_is_named(fields: dict[str, Any]) -> None:
    """A storage that fails at it would end each worker that receives the message."""
    ((name, _),) = fields.items()
    data = encode_message(TaskMessage(**{"uuid": "u", "task_name": "n", **fields}))
    raw = decode_message(data)
    assert isinstance(raw, Raw)
    assert raw.data == data
    assert f"`$.{name}`" in raw.error


@pytest.mark.parametrize("name", ["uuid", "reply_to"])
def test_a_nul_in_an_id_is_named(name: str) -> None:
    """Some servers cannot keep it."""
    fields: dict[str, Any] = {"uuid": "u", "task_name": "n", name: "a\0b"}
    data = encode_message(TaskMessage(**fields))
    raw = decode_message(data)
    assert isinstance(raw, Raw)
    assert raw.data == data
    assert name in raw.error


def test_the_longest_ids_are_taken() -> None:
    longest = "ü中🦀" * 66 + "ü中"
    message = TaskMessage(uuid=longest, task_name="n", reply_to=longest, submission=longest)
    task = Task(uuid=longest, task_name="n", status="new", reply_to=longest)
    assert decode_message(encode_message(message)) == message
    assert decode_task(encode_task(task)) == task


def test_unknown_status() -> None:
    data = encode_task(Task(uuid="u", task_name="n", status="new")).replace(b"new", b"old")
    with pytest.raises(WireError, match="status"):
        decode_task(data)


# -- golden vectors: the bytes that other releases wrote and will read


@pytest.mark.parametrize("name", vectors.MESSAGES)
def test_golden_message(name: str) -> None:
    golden = bytes.fromhex((GOLDEN / f"{name}.hex").read_text())
    assert encode_message(vectors.MESSAGES[name]) == golden
    assert decode_message(golden) == vectors.MESSAGES[name]


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("earlier/*.hex")), ids=lambda path: path.stem)
def test_message_written_earlier_is_read(path: Path) -> None:
    """A map of at most 15 fields had a shorter header; what is in it is the same."""
    assert decode_message(bytes.fromhex(path.read_text())) == vectors.MESSAGES[path.stem]


@pytest.mark.parametrize("name", vectors.TASKS)
def test_golden_record(name: str) -> None:
    golden = bytes.fromhex((GOLDEN / f"{name}.hex").read_text())
    assert encode_task(vectors.TASKS[name]) == golden
    assert decode_task(golden) == vectors.TASKS[name]


@pytest.mark.parametrize("name", vectors.COMMANDS)
def test_golden_command(name: str) -> None:
    golden = bytes.fromhex((GOLDEN / f"{name}.hex").read_text())
    assert encode_command(vectors.COMMANDS[name]) == golden
    assert decode_command(golden) == vectors.COMMANDS[name]


def test_every_golden_file_is_read() -> None:
    names = {path.stem for path in GOLDEN.glob("*.hex")}
    assert names == {*vectors.MESSAGES, *vectors.TASKS, *vectors.COMMANDS}
