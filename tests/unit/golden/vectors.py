"""What the golden files hold. `python -m tests.unit.golden.vectors` writes them anew."""

from __future__ import annotations

from pathlib import Path

from qtasks_core import Command, Task, TaskMessage
from qtasks_core.wire import encode_command, encode_message, encode_task

MESSAGES = {
    "message_least": TaskMessage(uuid="0190d2f4-7b5e-7c30-8000-000000000001", task_name="add"),
    "message_full": TaskMessage(
        uuid="0190d2f4-7b5e-7c30-8000-000000000002",
        task_name="mails.send",
        queue="mails",
        args=b"\x92\x01\x02",
        kwargs=b"\x81\xa1a\x01",
        encoding="json",
        priority=9,
        delay=1.5,
        attempt=3,
        reply_to="0190d2f4-7b5e-7c30-8000-00000000000a",
        created_at=1_700_000_000.25,
        expires_at=1_700_003_600.0,
        store_result=False,
        retention=86_400.0,
        headers={"traceparent": "00-ab-cd-01", "tenant": "größe"},
    ),
    "message_keyed": TaskMessage(
        uuid="5f0b7c3e-6a1d-5c8e-9b42-000000000004",
        task_name="mails.send",
        submission="0190d2f4-7b5e-7c30-8000-00000000000d",
    ),
}
TASKS = {
    "task_least": Task(uuid="0190d2f4-7b5e-7c30-8000-000000000001", task_name="add", status="new"),
    "task_success": Task(
        uuid="0190d2f4-7b5e-7c30-8000-000000000002",
        task_name="mails.send",
        status="success",
        queue="mails",
        args=b"\x92\x01\x02",
        kwargs=b"\x81\xa1a\x01",
        encoding="json",
        priority=9,
        attempt=3,
        execution="0190d2f4-7b5e-7c30-8000-00000000000b",
        returning=b"\x03",
        worker="host:1:a",
        reply_to="0190d2f4-7b5e-7c30-8000-00000000000a",
        created_at=1_700_000_000.25,
        started_at=1_700_000_001.0,
        finished_at=1_700_000_002.0,
        due_at=1_700_000_000.5,
        retention=86_400.0,
        headers={"traceparent": "00-ab-cd-01", "tenant": "größe"},
    ),
    "task_error": Task(
        uuid="0190d2f4-7b5e-7c30-8000-000000000003",
        task_name="mails.send",
        status="error",
        execution="0190d2f4-7b5e-7c30-8000-00000000000c",
        error="ValueError: no address",
        traceback="Traceback (most recent call last):\nValueError: no address\n",
        dead="no retries left",
    ),
    "task_keyed": Task(
        uuid="5f0b7c3e-6a1d-5c8e-9b42-000000000004",
        task_name="mails.send",
        status="new",
        execution="0190d2f4-7b5e-7c30-8000-00000000000d",
        submission="0190d2f4-7b5e-7c30-8000-00000000000d",
    ),
}
COMMANDS = {
    "command_least": Command(name="ping"),
    "command_full": Command(name="pause", target="mails", arguments={"why": "größe"}),
}


def write() -> None:
    """Write every file; do it only when the wire format changes on purpose."""
    encoded = {name: encode_message(message) for name, message in MESSAGES.items()}
    encoded |= {name: encode_task(task) for name, task in TASKS.items()}
    encoded |= {name: encode_command(command) for name, command in COMMANDS.items()}
    for name, data in encoded.items():
        lines = [data[at : at + 32].hex() for at in range(0, len(data), 32)]
        Path(__file__).with_name(f"{name}.hex").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write()
