"""PostgreSQL for the tests, durable as it comes."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from tests.services.container import Contained
from tests.services.install import install_package
from tests.services.native import PASSWORD, Native, free_port
from tests.services.service import NotReady, Service, Unobtainable, Way

if TYPE_CHECKING:
    from testcontainers.core.container import DockerContainer

CONNECTIONS = 200


def programs() -> Path | None:
    """Return the directory of the newest server's programs; Debian keeps them out of PATH."""
    versions = Path("/usr/lib/postgresql").glob("*/bin/postgres")
    newest = max(versions, key=lambda path: int(path.parts[-3]), default=None)
    found = newest or shutil.which("postgres")
    return Path(found).resolve().parent if found else None


class NativePostgres(Native):
    """Debian's postgresql, which refuses to run as root."""

    account = "postgres"
    # Killed, it would leave a segment of shared memory behind; SIGQUIT stops it at once and clean.
    stop_signal = signal.SIGQUIT
    shut_down_signal = signal.SIGINT  # SIGTERM would wait for its clients to leave

    def find(self) -> None:
        found = programs()
        if not found:
            install_package("postgresql", "postgres")
            found = programs()
        if not found:
            raise Unobtainable("postgresql is installed, but its programs are not found")
        self._programs = found

    def prepare(self) -> str:
        self.port = free_port()
        password = self.write("password", PASSWORD)
        options = ["--pgdata=data", "--username=postgres", f"--pwfile={password}", "--no-sync"]
        options += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8"]
        self.run([str(self._programs / "initdb"), *options])
        return f"postgresql://postgres:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def kill(self) -> None:
        super().kill()
        # The killed server cannot take its segment of shared memory along, and only its next start
        # in this directory would: remove it, as long as the file that names it is there.
        pid_file = self.directory / "data" / "postmaster.pid"
        if pid_file.exists() and len(lines := pid_file.read_text().splitlines()) > 6:
            segment = lines[6].split()[1]
            subprocess.run(["ipcrm", "-m", segment], stderr=subprocess.DEVNULL, check=False)

    def command(self) -> list[str]:
        options = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": str(CONNECTIONS),
            "dynamic_shared_memory_type": "mmap",  # in the directory, not in /dev/shm
        }
        settings = [part for k, v in options.items() for part in ("-c", f"{k}={v}")]
        return [str(self._programs / "postgres"), "-D", "data", "-p", str(self.port), *settings]


class ContainedPostgres(Contained):
    """PostgreSQL by the class of testcontainers."""

    inside = 5432

    def make(self, image: str) -> DockerContainer:
        from testcontainers.community.postgres import PostgresContainer

        container = PostgresContainer(
            image, port=self.inside, username="postgres", password=PASSWORD, dbname="postgres"
        )
        return container.with_command(["postgres", "-c", f"max_connections={CONNECTIONS}"])

    def url(self) -> str:
        return f"postgresql://postgres:{PASSWORD}@127.0.0.1:{self.port}/postgres"


class PostgresServer(Service):
    name = "postgres"

    def native(self) -> Way:
        return NativePostgres()

    def container(self) -> Way:
        return ContainedPostgres(self.name)

    async def probe(self, url: str) -> str:
        import asyncpg

        try:
            connection = await asyncpg.connect(url, timeout=5)
        except (OSError, asyncpg.PostgresError) as error:
            raise NotReady(str(error)) from error
        try:
            return str(await connection.fetchval("SHOW server_version")).split()[0]
        finally:
            await connection.close()
