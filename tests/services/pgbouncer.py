"""PgBouncer before a Postgres server: the connection pooler that most people have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from qtasks.testing.native import free_port
from tests.services.install import need_program
from tests.services.native import Native
from tests.services.service import Way


class NativePgBouncer(Native):
    """Debian's pgbouncer, which refuses to run as root. Settings are those it comes with."""

    account = "postgres"

    def __init__(self, server: str, pool_mode: str) -> None:
        super().__init__()
        self._server = urlsplit(server)
        self._pool_mode = pool_mode

    def find(self) -> None:
        self._program = need_program("pgbouncer", "pgbouncer")

    def prepare(self) -> str:
        self.port = free_port()
        server = self._server
        self.write("users", f'"{server.username}" "{server.password}"\n')
        self.write(
            "pgbouncer.ini",
            f"[databases]\n* = host={server.hostname} port={server.port}\n"
            "[pgbouncer]\nlisten_addr = 127.0.0.1\nunix_socket_dir =\n"
            f"listen_port = {self.port}\nauth_type = plain\nauth_file = users\n"
            f"pool_mode = {self._pool_mode}\n",
        )
        host = f"{server.username}:{server.password}@127.0.0.1:{self.port}"
        return server._replace(netloc=host).geturl()

    def command(self) -> list[str]:
        return [self._program, "pgbouncer.ini"]


@contextmanager
def bouncing(server: str, pool_mode: str) -> Iterator[str]:
    """Give the URL of a pooler before the server of another."""
    from tests.services.postgres import PostgresServer

    class Pooler(PostgresServer):
        def ways(self) -> tuple[Way, ...]:
            return (NativePgBouncer(server, pool_mode),)

    pooler = Pooler()
    try:
        yield pooler.start()
    finally:
        pooler.stop()
