"""Waking sleeping listeners in other processes, so that nobody polls the database.

A directory beside the database holds a datagram socket for each listener, named by its address.
While a listener sleeps for a queue, the directory also has an empty file
`q<queue>.<address>.<number>`. A writer rings while it still holds the write lock, and removes the
file. A listener that is rung looks under the same lock, so it sees what the ringer committed. If
the ringer dies, it leaves either no change or a rung bell.

Each sleep has another number. A listener may announce its next sleep before the ringer has removed
the file of the last one.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterable
from contextlib import suppress
from itertools import count
from pathlib import Path

from qtasks_core.errors import ConfigurationError, Unavailable

_LETTER = 1800 if hasattr(os, "uname") and os.uname().sysname == "Darwin" else 8000
"""The most bytes in one datagram."""
_FLOOD = 8
"""The socket's buffer may hold only this many datagrams. If so many arrive at once, some may be
lost."""
_PATH_LIMIT = 100
"""The longest path of a socket is 103 bytes on some systems."""
_ADDRESS = re.compile(r"(?:unix|udp-(?P<port>\d{1,5}))-[0-9a-f]{16}")


class Doorbell:
    """The directory of bells of one database, as one process sees it."""

    def __init__(self, database: Path) -> None:
        self.directory = database.with_name(database.name + "-doorbells")
        self.bells: set[Bell] = set()
        """The bells of this process."""
        self._descriptor: int | None = None
        self._senders: dict[int, socket.socket] = {}

    def open(self) -> None:
        """Create the directory, and remove the files that dead processes left in it.

        Raises `ConfigurationError` if another user owns it.
        """
        try:
            self.directory.mkdir(mode=0o700, exist_ok=True)
            if self._descriptor is None and hasattr(os, "O_DIRECTORY"):
                self._descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
            self._sweep()
        except PermissionError as error:
            raise ConfigurationError(
                f"{self.directory} is closed to this user: all processes on one database "
                "must run as the same user"
            ) from error
        except OSError as error:
            raise Unavailable(f"{self.directory}: {error.strerror}") from error

    def close(self) -> None:
        """Free the descriptors. Idempotent."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        for sender in self._senders.values():
            sender.close()
        self._senders.clear()

    def path(self, address: str) -> str:
        """Return the path of an address, short enough for a socket's name if possible."""
        path = str(self.directory / address)
        if len(os.fsencode(path)) > _PATH_LIMIT and self._descriptor is not None:
            return f"/proc/self/fd/{self._descriptor}/{address}"
        return path

    def sleeping(self, queue: int, address: str, number: int) -> Path:
        """Return the file that says that `address` sleeps for `queue`, for the `number`th time."""
        return self.directory / f"q{queue}.{address}.{number}"

    def addresses(self) -> list[str]:
        """Return the addresses that have a listener, or had one that died."""
        return [name for name in os.listdir(self.directory) if _ADDRESS.fullmatch(name)]

    def wake_all(self) -> None:
        """Make all listeners of this process look at everything."""
        for bell in self.bells:
            bell.flooded = True
            bell.wake()

    def ring_queues(self, queues: Iterable[int]) -> None:
        """Wake each listener that sleeps for these queues, once for each queue."""
        prefixes = {f"q{queue}" for queue in queues}
        for name in os.listdir(self.directory):
            prefix, *address = name.split(".")
            if address and prefix in prefixes:
                self._send(address[0], b"")
                # After the ring: if this process dies in between, the bell rings twice instead of
                # never.
                (self.directory / name).unlink(missing_ok=True)

    def ring_address(self, address: str, uuids: Iterable[str]) -> None:
        """Tell an inbox which records to read. An address without a listener is ignored."""
        # No uuid has a NUL, so NUL can replace the line feeds in a uuid.
        letter = "\n".join(uuid.replace("\n", "\0") for uuid in uuids).encode()
        if len(letter) <= _LETTER:
            self._send(address, letter)
            return
        lines: list[bytes] = []
        size = 0
        for line in letter.split(b"\n"):
            if lines and size + len(line) + 1 > _LETTER:
                self._send(address, b"\n".join(lines))
                lines, size = [], 0
            lines.append(line[:_LETTER])
            size += len(line) + 1
        self._send(address, b"\n".join(lines))

    def _send(self, address: str, letter: bytes) -> None:
        parsed = _ADDRESS.fullmatch(address)
        if parsed is None:
            return
        try:
            if parsed["port"] is None:
                self._sendto(socket.AF_UNIX, letter, self.path(address))
            elif (self.directory / address).exists():
                self._sendto(socket.AF_INET, letter, ("127.0.0.1", int(parsed["port"])))
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            (self.directory / address).unlink(missing_ok=True)

    def _sendto(self, family: int, letter: bytes, target: str | tuple[str, int]) -> None:
        # Datagrams that a frozen listener has not read fill the buffer of the sender. A fresh
        # socket tells a full sender from a full listener. A full listener notices the flood and
        # knows that it missed some.
        for _ in range(2):
            sender = self._senders.get(family)
            if sender is None:
                sender = self._senders[family] = socket.socket(family, socket.SOCK_DGRAM)
                sender.setblocking(False)
            try:
                sender.sendto(letter, target)
            except BlockingIOError:
                self._senders.pop(family).close()
            else:
                return

    def _sweep(self) -> None:
        names = os.listdir(self.directory)
        for address in names:
            parsed = _ADDRESS.fullmatch(address)
            if parsed is not None and not self._alive(address, parsed["port"]):
                (self.directory / address).unlink(missing_ok=True)
        alive = set(self.addresses())
        for name in names:
            if name.startswith("q") and [*name.split("."), ""][1] not in alive:
                (self.directory / name).unlink(missing_ok=True)

    def _alive(self, address: str, port: str | None) -> bool:
        family = socket.AF_INET if port is not None else socket.AF_UNIX
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                if port is None:
                    probe.connect(self.path(address))
                else:
                    probe.bind(("127.0.0.1", int(port)))
            except (ConnectionRefusedError, FileNotFoundError):
                return False
            except OSError:  # the port is taken, as it should be, or nothing can be told
                return True
            return port is None


class Bell:
    """One listener: a socket with its own address, and the letters that arrived."""

    def __init__(self, doorbell: Doorbell) -> None:
        self._doorbell = doorbell
        self._loop = asyncio.get_running_loop()
        self._rung = asyncio.Event()
        self._asleep: list[Path] = []
        self._sleeps = count(1)
        self.letters: set[str] = set()
        """The uuids that arrived and that the owner has not removed yet."""
        self.flooded = False
        """Letters may have been lost. The owner then looks at everything and resets this."""
        try:
            self._socket, self.address = self._bind()
        except OSError as error:
            raise Unavailable(f"cannot listen beside the database: {error.strerror}") from error
        self._loop.add_reader(self._socket, self._read)
        doorbell.bells.add(self)

    def _bind(self) -> tuple[socket.socket, str]:
        token = secrets.token_hex(8)
        if hasattr(socket, "AF_UNIX"):
            address = f"unix-{token}"
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            listener.setblocking(False)
            try:
                listener.bind(self._doorbell.path(address))
            except OSError:  # the path is too long, or the file system has no sockets
                listener.close()
            else:
                return listener, address
        listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        listener.setblocking(False)
        listener.bind(("127.0.0.1", 0))
        address = f"udp-{listener.getsockname()[1]}-{token}"
        Path(self._doorbell.path(address)).touch(mode=stat.S_IRUSR | stat.S_IWUSR)
        return listener, address

    def _read(self) -> None:
        letters = 0
        with suppress(BlockingIOError):
            while True:
                letter = self._socket.recv(65536)
                letters += 1
                if letter:
                    lines = letter.decode(errors="replace").split("\n")
                    self.letters.update(line.replace("\0", "\n") for line in lines)
        self.flooded = self.flooded or letters >= _FLOOD
        self._rung.set()

    def sleep_for(self, queues: Iterable[int]) -> None:
        """Announce that this listener is about to sleep for these queues. Then look, then wait."""
        last, number = self._asleep, next(self._sleeps)
        self._asleep = [self._doorbell.sleeping(queue, self.address, number) for queue in queues]
        try:
            for path in self._asleep:
                path.touch(mode=stat.S_IRUSR | stat.S_IWUSR)
            for path in last:
                path.unlink(missing_ok=True)  # it was not rung, or not by all
        except OSError as error:
            raise Unavailable(f"cannot listen beside the database: {error.strerror}") from error

    def awake(self) -> None:
        """Undo `sleep_for`."""
        for path in self._asleep:
            path.unlink(missing_ok=True)
        self._asleep = []

    def wake(self) -> None:
        """Ring the bell from this process."""
        self._rung.set()

    async def wait(self, seconds: float | None = None) -> None:
        """Return when the bell was rung since the last wait, or after this many seconds."""
        if seconds is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._rung.wait()
        else:
            await self._rung.wait()
        self._rung.clear()

    def close(self) -> None:
        """Give up the address. Idempotent."""
        self.awake()
        self._doorbell.bells.discard(self)
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()
            Path(self._doorbell.path(self.address)).unlink(missing_ok=True)
