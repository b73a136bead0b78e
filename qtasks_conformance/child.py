"""The other process of a test: `python -m qtasks_conformance.child`. It reads commands on stdin."""

from __future__ import annotations

import asyncio
import sys

from qtasks_conformance.commands import Answer, CommandRunner, encode, setup_decoder

LINE_LIMIT = 64 * 1024 * 1024
"""The longest line in bytes."""


async def main() -> None:
    """Execute the commands on stdin until it closes, which also happens when the parent dies."""
    lines = asyncio.StreamReader(limit=LINE_LIMIT)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    runner = CommandRunner(setup_decoder.decode(await lines.readline()))
    await runner.start()
    write(encode(Answer()))
    while line := await lines.readline():
        write(await runner.execute(line))
    await runner.stop()


def write(line: bytes) -> None:
    """Write one line to stdout at once."""
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    asyncio.run(main())
