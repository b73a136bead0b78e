"""The other process: `python -m qtasks_conformance.child`, told what to do line by line."""

from __future__ import annotations

import asyncio
import sys

from qtasks_conformance.commands import Answer, Hands, encode, setup_decoder

LINE_LIMIT = 64 * 1024 * 1024
"""Bytes of the longest line."""


async def main() -> None:
    """Obey lines of stdin until it closes, which also happens when the parent dies."""
    lines = asyncio.StreamReader(limit=LINE_LIMIT)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    hands = Hands(setup_decoder.decode(await lines.readline()))
    await hands.start()
    say(encode(Answer()))
    while line := await lines.readline():
        say(await hands.obey(line))
    await hands.stop()


def say(line: bytes) -> None:
    """Write one line at once."""
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    asyncio.run(main())
